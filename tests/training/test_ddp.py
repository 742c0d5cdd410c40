"""Two gloo processes do what one process with the joined batch does, and stay equal."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergevq.data.folder import ImageFolder
from mergevq.errors import DataError, NonFiniteLossError
from mergevq.files import load_tensors, read_json
from mergevq.training.config import HardwareConfig, TokenizerRun
from mergevq.training.processes import agree, build_fabric
from mergevq.training.state import TrainState, build_state
from mergevq.training.tokenizer import train_step, train_tokenizer
from mergevq.training.validation import validate

TWO = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")


def draw(rank: int, step: int) -> list[dict[str, Tensor]]:
    """Two micro-batches of one process."""
    rng = torch.Generator().manual_seed(10 * step + rank)

    def images(side: int) -> Tensor:
        return torch.rand(2, 3, side, side, generator=rng) * 2 - 1

    return [{"image": images(32), "view_student": images(28), "view_teacher": images(32)} for _ in range(2)]


def joined(step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of both processes, as one process would have them."""
    pairs = zip(draw(0, step), draw(1, step), strict=True)
    return [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs]


def weights_of(state: TrainState) -> dict[str, Tensor]:
    tensors = {f"model.{name}": t.clone() for name, t in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": t.clone() for name, t in state.ema.state_dict().items()}
    if state.adversary is not None:
        # BatchNorm's running statistics are each process's own, and nothing reads them.
        parameters = state.adversary.discriminator.named_parameters()
        tensors |= {f"discriminator.{name}": p.detach().clone() for name, p in parameters}
        tensors |= {f"lecam.{name}": t.clone() for name, t in state.adversary.lecam.state_dict().items()}
    return tensors


def three_steps(fabric, run: TokenizerRun, perceptual, teacher, folder: Path) -> None:
    state = build_state(fabric, run, perceptual, teacher)
    drawn = []
    for step in range(3):
        report = train_step(state, draw(fabric.global_rank, step), run)
        drawn.append(report.num_tokens)
    save_file(weights_of(state), folder / f"{fabric.global_rank}.safetensors")
    (folder / f"{fabric.global_rank}.json").write_text(json.dumps({"drawn": drawn, "values": report.values}))


@pytest.fixture
def one_epoch(tiny_run) -> TokenizerRun:
    return replace(tiny_run, optim=replace(tiny_run.optim, schedule="constant", warmup_steps=0))


def both(run, perceptual, teacher, folder) -> tuple[list[dict[str, Tensor]], list[dict]]:
    build_fabric(TWO).launch(three_steps, run, perceptual, teacher, folder)
    return (
        [load_file(folder / f"{rank}.safetensors") for rank in range(2)],
        [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)],
    )


def test_two_processes_are_one_with_the_joined_batch(one_epoch, perceptual, teacher, tmp_path, fabric):
    # Without the discriminator: its BatchNorm is of the micro-batch. The codebook entropy is over all processes.
    off = replace(one_epoch.loss.weights, adversarial=0.0)
    run = replace(one_epoch, loss=replace(one_epoch.loss, weights=off))
    weights, reports = both(run, perceptual, teacher, tmp_path)
    state = build_state(fabric, run, perceptual, teacher)
    first = weights_of(state)
    for step in range(3):
        report = train_step(state, joined(step), run)
    assert [reports[rank]["drawn"][-1] for rank in range(2)] == [report.num_tokens] * 2
    assert reports[0]["values"] == pytest.approx(report.values, rel=2e-3)
    # Adam makes steps of the rounding errors of gradients near 0, so single weights may be further apart than most.
    last = {name: tensor for name, tensor in weights_of(state).items() if tensor.is_floating_point()}
    assert [name for name, tensor in last.items() if not torch.allclose(tensor, weights[0][name], atol=2e-4)] == []
    apart = sum((tensor - weights[0][name]).norm() ** 2 for name, tensor in last.items()) ** 0.5
    way = sum((tensor - first[name]).norm() ** 2 for name, tensor in last.items()) ** 0.5
    assert apart < 0.01 * way
    moved = [name for name in first if not torch.allclose(first[name], weights[0][name], atol=1e-4)]
    assert len(moved) > 0.9 * len(first)


def test_parameters_are_equal_on_both_processes_with_every_loss_on(one_epoch, perceptual, teacher, tmp_path):
    weights, reports = both(one_epoch, perceptual, teacher, tmp_path)
    assert any(name.startswith("discriminator.") for name in weights[0])
    assert weights[0].keys() == weights[1].keys()
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert reports[0] == reports[1]
    assert len(set(reports[0]["drawn"])) > 1


def one_nan(fabric, run: TokenizerRun, perceptual, teacher, folder: Path) -> None:
    state = build_state(fabric, run, perceptual, teacher)
    before = weights_of(state)
    batch = draw(fabric.global_rank, 0)
    if fabric.global_rank == 1:
        batch[0]["image"][0, 0, 0, 0] = math.nan
    try:
        train_step(state, batch, run)
    except NonFiniteLossError as error:
        same = all(torch.equal(t, before[name]) for name, t in weights_of(state).items())
        (folder / f"{fabric.global_rank}.txt").write_text(f"{same} {error}")


def test_a_nan_of_one_process_stops_both(one_epoch, perceptual, teacher, tmp_path):
    build_fabric(TWO).launch(one_nan, one_epoch, perceptual, teacher, tmp_path)
    messages = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("True expected finite losses at optimizer step 0")
    assert "reconstruction = nan" in messages[0]


def agreement(fabric, folder: Path) -> None:
    rank = fabric.global_rank
    (folder / f"{rank}.json").write_text(json.dumps(agree(fabric, 1.5 + rank, 15 * rank)))


def test_processes_agree_on_time_and_signals(tmp_path):
    build_fabric(TWO).launch(agreement, tmp_path)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[2.5, 15]] * 2


def validated(fabric, run: TokenizerRun, perceptual, teacher, images: ImageFolder, folder: Path) -> None:
    state = build_state(fabric, run, perceptual, teacher)
    answers = iter([False, True])
    try:
        found: object = validate(state, images, run)
        assert validate(state, images, run, lambda: next(answers)) is None
    except DataError as error:
        found = f"DataError {error}"
    (folder / f"{fabric.global_rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("readable", [3, 0])
def test_a_process_without_readable_held_out_images_leaves_none_waiting(
    tiny_run, perceptual, teacher, tmp_path, fabric, image_folder, readable
):
    """The second process has images 1, 3 and 5, none of them readable."""
    source, root = ImageFolder(image_folder), tmp_path / "images"
    root.mkdir()
    for i in range(6):
        source.read(i).image.save(root / f"{i}.png")
    images = ImageFolder(root)
    for i in range(6):  # Later: a folder without any readable image is refused when it is opened.
        if i % 2 or not readable:
            (root / f"{i}.png").write_bytes(b"no image")
    run = replace(tiny_run, loop=replace(tiny_run.loop, val_images=6, batch_size=2))
    build_fabric(TWO).launch(validated, run, perceptual, teacher, images, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    if not readable:
        assert all(text.startswith("DataError") and "\n" not in text for text in found)
        return
    alone = validate(build_state(fabric, run, perceptual, teacher), images.select([0, 2, 4]), run)
    assert found[0] == found[1]
    for name, value in alone[20].items():
        assert found[0]["20"][name] == pytest.approx(value, rel=1e-4), name


def test_a_whole_run_of_two_processes_resumes(tiny_run, perceptual, teacher, tmp_path):
    constant = replace(tiny_run.optim, schedule="constant")
    loop = replace(tiny_run.loop, batch_size=1, val_images=2, steps=2, save_every=2)
    half = replace(tiny_run, loop=loop, optim=constant)
    whole = replace(half, loop=replace(loop, steps=4))
    options = {"perceptual": perceptual, "teacher": teacher, "hardware": TWO}
    train_tokenizer(whole, tmp_path / "straight", **options)
    train_tokenizer(half, tmp_path / "resumed", **options)
    train_tokenizer(whole, tmp_path / "resumed", resume=True, **options)
    states = []
    for name in ("straight", "resumed"):
        record = read_json(tmp_path / name / "state" / "state.json")
        assert (record["processes"], record["step"]) == (2, 4)
        states.append(load_tensors(tmp_path / name / "state" / record["tensors"])[0])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    lines = [json.loads(line) for line in (tmp_path / "straight" / "log.jsonl").open()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
