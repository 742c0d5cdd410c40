"""What a whole run leaves behind, what validation sees, and what is refused before anything is written."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from mergevq import presets
from mergevq.configuration import config_to_dict
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.errors import CheckpointError, ConfigError, DataError, MissingDependencyError
from mergevq.metrics.image import psnr
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import HardwareConfig, TokenizerRun, flat_config
from mergevq.training.dry_run import count_parameters, dry_run
from mergevq.training.inputs import open_inputs, stream
from mergevq.training.state import build_state, start_from
from mergevq.training.tokenizer import train_step, train_tokenizer
from mergevq.training.validation import draw_held_out, validate


def changed(run: TokenizerRun, **parts: dict) -> TokenizerRun:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


@pytest.fixture
def state(fabric, tiny_run, perceptual, teacher, batch):
    """After one step, so that weights and average differ from the second on."""
    state = build_state(fabric, tiny_run, perceptual, teacher)
    for _ in range(2):
        train_step(state, batch, tiny_run)
    return state


@pytest.fixture
def folder(image_folder: Path) -> ImageFolder:
    return ImageFolder(image_folder)


# ------------------------------------------------------------------------------------------------------------ whole run


def test_a_run_leaves_a_model_a_log_pictures_and_its_configuration(tmp_path, tiny_run, perceptual, teacher, capfd):
    run = changed(tiny_run, loop={"steps": 3, "log_every": 2, "val_every": 2})
    before = torch.get_rng_state()
    model = train_tokenizer(run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    assert torch.equal(before, torch.get_rng_state())
    assert model == tmp_path / "run" / "model.safetensors"
    loaded = MergeVQ.from_pretrained(tmp_path / "run")
    assert loaded.config == run.model
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config == json.loads(json.dumps(config_to_dict(run)))

    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    kinds = [(r["kind"], r["step"]) for r in records]
    assert kinds == [("train", 2), ("val", 2), ("val", 2), ("train", 3), ("val", 3), ("val", 3)]
    train = records[0]
    assert train["num_tokens"] in run.loop.num_tokens
    named = {"reconstruction", "perceptual", "adversarial", "commitment", "entropy", "recovery", "alignment", "lecam"}
    assert named | {"discriminator", "grad_norm", "disc_grad_norm", "lr", "disc_lr"} < train.keys()
    assert train["images_per_second"] > 0
    assert [r["num_tokens"] for r in records if r["kind"] == "val"] == [64, 20, 64, 20]
    assert "adversarial" not in records[1] and "alignment" not in records[1]

    # The file is what the last validation measured: the averaged weights.
    inputs = open_inputs(run, None, None, perceptual, teacher, 1)
    images = torch.cat([batch["image"] for batch in evaluation_batches(inputs.val, 32, batch_size=2, limit=3)])
    measured = psnr(loaded.reconstruct(images, 20), images).mean()
    assert records[-1]["psnr"] == pytest.approx(float(measured), abs=1e-3)

    pictures = sorted((tmp_path / "run" / "images").iterdir())
    assert [path.name for path in pictures] == ["step_0000002.png", "step_0000003.png"]
    with Image.open(pictures[-1]) as picture:
        # Image, token map and two reconstructions side by side; as many rows as held-out images.
        assert picture.width / picture.height == pytest.approx(4 / len(inputs.val), rel=0.3)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100

    lines = capfd.readouterr().err.splitlines()
    assert any("images/s" in line and "left" in line for line in lines)


def test_training_makes_the_loss_smaller(tmp_path, tiny_run, perceptual, teacher):
    run = changed(
        tiny_run,
        loop={"steps": 16, "accumulate": 1, "val_every": 4, "num_tokens": (64,), "val_num_tokens": (64,)},
        optim={"lr": 1e-2, "schedule": "constant"},
    )
    train_tokenizer(run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    values = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    first, *_, last = (r["psnr"] for r in values if r["kind"] == "val")
    assert last > first + 0.3


def test_minutes_end_a_run_and_its_schedule(tmp_path, tiny_run, perceptual, teacher, monkeypatch):
    # A clock on which every step takes half a second.
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, 0.5).__next__)
    monkeypatch.setattr("mergevq.training.loop.time", clock)
    run = changed(tiny_run, loop={"steps": 10_000, "minutes": 0.02}, optim={"warmup_steps": 0})
    train_tokenizer(run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    steps = [r for r in records if r["kind"] == "train"]
    assert [r["elapsed"] for r in steps] == [0.5, 1.0, 1.5]
    assert steps[-1]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 1.0 / 1.2)))
    assert records[-1]["kind"] == "val"


def test_the_same_run_twice_gives_the_same_file_and_another_seed_another(tmp_path, tiny_run, perceptual, teacher):
    run = changed(tiny_run, loop={"steps": 2})
    files = []
    for name, this in (("a", run), ("b", run), ("c", changed(run, loop={"seed": 1}))):
        torch.rand(3)
        files.append(train_tokenizer(this, tmp_path / name, perceptual=perceptual, teacher=teacher).read_bytes())
    assert files[0] == files[1] != files[2]


def test_crops_are_made_for_the_losses_that_need_them(tiny_run, folder):
    off = changed(tiny_run, loss={"weights": replace(tiny_run.loss.weights, alignment=0.0)})
    labels = changed(tiny_run, loss={"alignment": "labels"})
    keys = [next(stream(run, folder, 0, 1, 0)).keys() for run in (off, labels, tiny_run)]
    assert keys[1] - keys[0] == {"view_student"}
    assert keys[2] - keys[1] == {"view_teacher"}


# ----------------------------------------------------------------------------------------------------------- validation


def test_validation_measures_the_average_and_changes_nothing(state, folder, tiny_run):
    held_out = folder.select([1, 4, 7])
    modules = (state.model, state.ema, state.adversary.discriminator, state.adversary.lecam)
    before = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    randomness = torch.get_rng_state(), state.rng.get_state()
    values = validate(state, held_out, tiny_run)
    assert torch.equal(randomness[0], torch.get_rng_state())
    assert torch.equal(randomness[1], state.rng.get_state())
    for module, old in zip(modules, before, strict=True):
        assert all(torch.equal(old[name], tensor) for name, tensor in module.state_dict().items())

    assert list(values) == [64, 20]
    batches = evaluation_batches(held_out, 32, batch_size=3)
    images = next(batches)["image"]
    averaged, weights = (psnr(m(images, 20).reconstruction, images).mean() for m in (state.ema.module, state.model))
    assert values[20]["psnr"] == pytest.approx(float(averaged), abs=1e-4)
    assert abs(values[20]["psnr"] - float(weights)) > 1e-4


def test_validation_weighs_images_and_not_batches(state, folder, tiny_run):
    held_out = folder.select([0, 1, 2])
    two, three = (validate(state, held_out, changed(tiny_run, loop={"batch_size": n})) for n in (2, 3))
    for name in ("psnr", "reconstruction", "perceptual", "commitment", "recovery", "sample_entropy"):
        assert two[20][name] == pytest.approx(three[20][name], rel=1e-4), name


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_validation_that_is_not_finite_is_told_and_ends_nothing(
    tmp_path, tiny_run, perceptual, teacher, monkeypatch, capfd, value
):
    monkeypatch.setattr("mergevq.training.validation.psnr", lambda x, y: torch.full((len(x),), value))
    run = changed(tiny_run, loop={"steps": 2, "val_every": 1})
    train_tokenizer(run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    values = [record["psnr"] for record in records if record["kind"] == "val"]
    assert values == [None] * 4
    assert f"not finite at step 1, null in log.jsonl: psnr = {value}" in capfd.readouterr().err.splitlines()


def test_reconstructions_that_are_not_finite_end_nothing(tmp_path, state, folder, tiny_run):
    with torch.no_grad():
        next(state.ema.module.decoder.parameters()).fill_(torch.nan)
    values = validate(state, folder.select([1, 4]), tiny_run)
    assert math.isnan(values[20]["psnr"]) and math.isnan(values[20]["reconstruction"])
    draw_held_out(tmp_path / "a.png", state, folder.select([1, 4]), tiny_run)
    assert not (tmp_path / "a.png").exists()


def test_unreadable_held_out_images_are_left_out_of_the_picture(tmp_path, state, folder, tiny_run):
    held_out = folder.select(range(9))
    root = tmp_path / "some"
    root.mkdir()
    for i in range(9):
        image = root / f"{i}.png"
        held_out.read(i).image.save(image)
        if i in (0, 2, 4, 6):  # The four that are evenly spread.
            image.write_bytes(b"no image")
    draw_held_out(tmp_path / "a.png", state, ImageFolder(root), changed(tiny_run, loop={"val_images": 9}))
    assert (tmp_path / "a.png").exists()


# ------------------------------------------------------------------------------------------------------ starting points


def test_init_starts_from_the_weights_of_a_model(state, tmp_path, tiny_run, perceptual, teacher, fabric):
    file = state.ema.module.save_pretrained(tmp_path / "model.safetensors")
    run = changed(tiny_run, optim={"lr": 0.0}, loop={"steps": 1})
    train_tokenizer(run, tmp_path / "run", init=file, perceptual=perceptual, teacher=teacher)
    given, came = MergeVQ.from_pretrained(file).state_dict(), MergeVQ.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(given[name], came[name]) for name in given)


def test_init_keeps_parts_that_the_model_lacks_and_says_so(state, tmp_path, tiny_run, perceptual, teacher, fabric):
    weights = replace(tiny_run.loss.weights, recovery=0.0, alignment=0.0)
    smaller = changed(tiny_run, loss={"weights": weights})
    old = build_state(fabric, smaller, perceptual)
    with torch.no_grad():
        for p in old.model.parameters():
            p.add_(0.5)
    file = old.model.save_pretrained(tmp_path / "model.safetensors")
    new = build_state(fabric, tiny_run, perceptual, teacher)
    recovery = {name: tensor.clone() for name, tensor in new.model.recovery.state_dict().items()}
    notices = start_from(new, file)
    assert len(notices) == 2 and "recovery" in notices[0] and "alignment" in notices[1]
    assert torch.equal(new.model.encoder.class_token, old.model.encoder.class_token)
    assert torch.equal(new.ema.module.encoder.class_token, old.model.encoder.class_token)
    assert all(torch.equal(recovery[name], tensor) for name, tensor in new.model.recovery.state_dict().items())
    # And the other way round.
    file = new.model.save_pretrained(tmp_path / "other.safetensors")
    assert all("left out" in notice for notice in start_from(old, file))


def test_init_at_another_image_size_resizes_the_queries_of_recovery(state, tmp_path, tiny_run, perceptual, fabric):
    weights = replace(tiny_run.loss.weights, alignment=0.0)
    file = state.ema.module.save_pretrained(tmp_path / "model.safetensors")
    run = changed(tiny_run, model={"image_size": 48}, loss={"weights": weights})
    new = build_state(fabric, run, perceptual)
    notices = start_from(new, file)
    assert "8 x 8" in notices[0] and "12 x 12" in notices[0] and "resized" in notices[0]
    assert "alignment" in notices[1] and len(notices) == 2
    image = torch.zeros(1, 3, 48, 48)
    # What the model of 32 pixels itself did with an image of 48.
    expected = state.ema.module.eval()(image, 20).recovery_logits
    for model in (new.model, new.ema.module):
        assert model.recovery.queries.shape[-2:] == (12, 12)
        torch.testing.assert_close(model.eval()(image, 20).recovery_logits, expected)


def test_init_refuses_a_model_that_would_compute_something_else(tmp_path, tiny_run, perceptual, teacher, fabric):
    # As many weights, other heads: they would load, and mean nothing.
    heads = replace(tiny_run.model.encoder, heads=4)
    other = build_state(fabric, changed(tiny_run, model={"encoder": heads}), perceptual, teacher)
    file = other.model.save_pretrained(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.encoder\.heads \(4 there, 2 here\)") as raised:
        start_from(build_state(fabric, tiny_run, perceptual, teacher), file)
    assert "\n" not in str(raised.value)


def test_a_model_that_is_not_there_leaves_no_run(tmp_path, tiny_run, perceptual, teacher):
    with pytest.raises(CheckpointError):
        train_tokenizer(tiny_run, tmp_path / "run", init=tmp_path / "no", perceptual=perceptual, teacher=teacher)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------- refusals


def test_missing_images_leave_no_run(tmp_path, tiny_run, perceptual, teacher):
    run = changed(tiny_run, data={"train": str(tmp_path / "nowhere")})
    with pytest.raises(DataError):
        train_tokenizer(run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_a_missing_extra_is_named(tmp_path, tiny_run, perceptual, teacher, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lightning.fabric", None)
    with pytest.raises(MissingDependencyError, match=r"mergevq\[train\]"):
        train_tokenizer(tiny_run, tmp_path / "run", perceptual=perceptual, teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_inputs_that_do_not_fit_are_refused(tiny_run, folder, perceptual, teacher):
    with pytest.raises(ConfigError, match="val_data"):
        open_inputs(tiny_run, folder, None, perceptual, teacher, 1)
    with pytest.raises(DataError, match="4 processes"):
        open_inputs(tiny_run, folder, folder.select([0, 1, 2]), perceptual, teacher, 4)
    teacher.width = 12
    with pytest.raises(ConfigError, match=r"expected 10 numbers from the teacher .*got 12"):
        open_inputs(tiny_run, folder, folder, perceptual, teacher, 1)
    labels = changed(tiny_run, loss={"alignment": "labels"})
    with pytest.raises(ConfigError, match=r"expected 10 classes .*got 2"):
        open_inputs(labels, folder, folder, perceptual, None, 1)
    unlabelled = ImageFolder(folder.root / "cats")
    with pytest.raises(DataError, match="class folders"):
        open_inputs(labels, unlabelled, unlabelled, perceptual, None, 1)
    names = ("cats", *(f"other {i}" for i in range(9)))
    with pytest.raises(DataError, match=r"class for every image .*got none for dogs/00\.png"):
        open_inputs(labels, ImageFolder(folder.root, classes=names), folder, perceptual, None, 1)


def test_networks_whose_loss_is_off_are_left_out(tiny_run, folder, perceptual, teacher):
    off = replace(tiny_run.loss.weights, perceptual=0.0, alignment=0.0)
    run = changed(tiny_run, loss={"weights": off})
    inputs = open_inputs(run, folder, folder, perceptual, teacher, 1)
    assert inputs.perceptual is inputs.teacher is None


def test_configurations_refuse_what_makes_no_sense(tiny_run):
    for parts, named in (
        ({"loop": {"num_tokens_probs": (1.0, -1.0, 1.0)}}, "num_tokens_probs"),
        ({"loop": {"num_tokens": (65,)}}, "1..64, got 65"),
        ({"loop": {"num_tokens": (0,)}}, "1..64, got 0"),
        ({"loop": {"accumulate": 0}}, "accumulate"),
        ({"optim": {"ema_decay": 1.5}}, "ema_decay"),
    ):
        with pytest.raises(ConfigError, match=named):
            changed(tiny_run, **parts)
    with pytest.raises(ConfigError, match="devices"):
        HardwareConfig(devices=0)
    if not torch.cuda.is_available():
        from mergevq.training.processes import build_fabric

        with pytest.raises(ConfigError, match="GPU"):
            build_fabric(HardwareConfig(accelerator="cuda"))


# -------------------------------------------------------------------------------------------------------------- dry run


def test_dry_run_shows_configuration_difference_and_parameters(tiny_run):
    preset = presets.tokenizer("gr_256")
    run = changed(preset, optim={"lr": 3e-4})
    text = dry_run(run, preset)
    for name, value in flat_config(run).items():
        assert f"{name} = {value!r}" in text
    difference = text[text.index("different from the preset:") :].splitlines()
    assert difference[1] == "optim.lr = 0.0003 (preset 0.0001)"
    assert difference[2] == ""
    assert "different" not in dry_run(run)
    counts = count_parameters(tiny_run)
    model = MergeVQ(tiny_run.model)
    parts = {
        name: nn.utils.parameters_to_vector(part.parameters()).numel()
        for name, part in model.named_children()
        if list(part.parameters())
    }
    assert parts.items() <= counts.items()
    assert counts["tokenizer"] == sum(parts.values())
    assert counts["discriminator"] > 0
    assert f"{counts['tokenizer']:,}" in dry_run(tiny_run)
