"""A run that was interrupted ends with the very bits of one that was not."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mergevq.data.folder import ImageFolder
from mergevq.data.sources import training_and_validation
from mergevq.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, OutputExistsError, WriteError
from mergevq.files import load_tensors, read_json
from mergevq.tokenizer.model import MergeVQ
from mergevq.training import checkpoint
from mergevq.training.config import HardwareConfig, TokenizerRun
from mergevq.training.log import truncate_log
from mergevq.training.run_folder import begin, load_run
from mergevq.training.signals import TrainingStopped
from mergevq.training.state import build_state
from mergevq.training.tokenizer import train_step, train_tokenizer


class Watched(nn.Module):
    """A perceptual network that does something before its n-th call."""

    def __init__(self, network: nn.Module, calls: int, action) -> None:
        super().__init__()
        self.network, self.left, self.action = network, calls, action

    def forward(self, reconstruction, image):
        self.left -= 1
        if self.left == 0:
            self.action()
        return self.network(reconstruction, image)


def die() -> None:
    raise RuntimeError("the machine is gone")


def send(signum: int):
    return lambda: os.kill(os.getpid(), signum)


def state_of(out: Path):
    record = read_json(out / "state" / "state.json")
    return record, load_tensors(out / "state" / record["tensors"])[0]


def assert_same_state(a: Path, b: Path) -> None:
    (record_a, tensors_a), (record_b, tensors_b) = state_of(a), state_of(b)
    assert {**record_a, "elapsed": 0} == {**record_b, "elapsed": 0}
    assert tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []


def loop(run: TokenizerRun, **fields) -> TokenizerRun:
    return replace(run, loop=replace(run.loop, **fields))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def uninterrupted(finished, tiny_run, perceptual, teacher) -> Path:
    """Six steps without interruption, made once."""
    if not finished.exists():
        train_tokenizer(tiny_run, finished, perceptual=perceptual, teacher=teacher)
    return finished


# An epoch of eleven images has five micro-batches, a step takes two: the state of step 3 lies within an epoch.
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_killed_after_its_third_step_ends_with_the_same_bits(
    uninterrupted, tmp_path, tiny_run, perceptual, teacher, workers
):
    run = replace(tiny_run, data=replace(tiny_run.data, workers=workers))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train_tokenizer(run, tmp_path / "run", perceptual=Watched(perceptual, 10, die), teacher=teacher)
    assert state_of(tmp_path / "run")[0]["step"] == 3
    assert not (tmp_path / "run" / "model.safetensors").exists()
    torch.rand(7)  # The random state of the process that resumes has nothing to do with it.
    model = train_tokenizer(run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    assert_same_state(uninterrupted, tmp_path / "run")
    assert model.read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(
    uninterrupted, tmp_path, tiny_run, perceptual, teacher, signum, capfd
):
    before = signal.getsignal(signum)
    # In the first micro-batch of step 4 (counted from 0).
    watched = Watched(perceptual, 9, send(signum))
    with pytest.raises(TrainingStopped, match="after step 5") as stopped:
        train_tokenizer(tiny_run, tmp_path / "run", perceptual=watched, teacher=teacher)
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) == before
    assert "after step 5, everything saved: --resume goes on" in capfd.readouterr().err
    assert state_of(tmp_path / "run")[0]["step"] == 5
    assert MergeVQ.from_pretrained(tmp_path / "run").config == tiny_run.model
    train_tokenizer(tiny_run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    assert_same_state(uninterrupted, tmp_path / "run")


def test_the_second_signal_is_not_held_back(tmp_path, tiny_run, perceptual, teacher):
    def twice() -> None:
        # Not `send`: where there are other threads, two signals to the process may arrive as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A job in the background of a shell ignores Ctrl-C, and its children do.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(tiny_run, tmp_path / "run", perceptual=Watched(perceptual, 9, twice), teacher=teacher)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_log_of_a_resumed_run_has_each_step_once(uninterrupted, tmp_path, tiny_run, perceptual, teacher):
    with pytest.raises(RuntimeError):
        train_tokenizer(tiny_run, tmp_path / "run", perceptual=Watched(perceptual, 11, die), teacher=teacher)
    log = tmp_path / "run" / "log.jsonl"
    # Steps 4 and 5 were logged and not saved, and the process died in the middle of a line.
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4, 5]
    with log.open("a") as file:
        file.write('{"kind": "train", "st')
    train_tokenizer(tiny_run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    records = [[json.loads(line) for line in (out / "log.jsonl").open()] for out in (tmp_path / "run", uninterrupted)]
    for record in (*records[0], *records[1]):
        record.pop("elapsed", None)
        record.pop("images_per_second", None)
    assert records[0] == records[1]


def test_truncating_a_log_that_is_not_there_does_nothing(tmp_path):
    truncate_log(tmp_path / "log.jsonl", 3)
    assert not (tmp_path / "log.jsonl").exists()


def test_every_part_of_the_state_comes_back(fabric, tiny_run, perceptual, teacher, batch, tmp_path):
    state, other = (build_state(fabric, tiny_run, perceptual, teacher) for _ in range(2))
    for _ in range(2):
        train_step(state, batch, tiny_run)
    state.position, state.elapsed = 4, 12.5
    checkpoint.save_state(tmp_path, state)
    checkpoint.load_state(tmp_path, other)
    assert (other.step, other.position, other.elapsed) == (2, 4, 12.5)
    assert torch.equal(state.rng.get_state(), other.rng.get_state())
    assert int(other.ema.n_averaged) == 2
    assert float(other.adversary.lecam.real) == float(state.adversary.lecam.real) != 0
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.ckpt"))
    for _ in range(2):
        a, b = train_step(state, batch, tiny_run), train_step(other, batch, tiny_run)
        assert a == b


def test_a_death_between_the_files_leaves_the_state_before(
    fabric, tiny_run, perceptual, teacher, batch, tmp_path, monkeypatch
):
    state = build_state(fabric, tiny_run, perceptual, teacher)
    train_step(state, batch, tiny_run)
    checkpoint.save_state(tmp_path, state)
    train_step(state, batch, tiny_run)
    for function in ("save_tensors", "write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, function, lambda *a: (_ for _ in ()).throw(WriteError("no room")))
            with pytest.raises(WriteError):
                checkpoint.save_state(tmp_path, state)
        restored = build_state(fabric, tiny_run, perceptual, teacher)
        checkpoint.load_state(tmp_path, restored)
        assert restored.step == 1
    checkpoint.save_state(tmp_path, state)
    checkpoint.load_state(tmp_path, restored)
    assert restored.step == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def validations(out: Path) -> list[tuple[int, int]]:
    records = [json.loads(line) for line in (out / "log.jsonl").open()]
    return [(record["step"], record["num_tokens"]) for record in records if record["kind"] == "val"]


EVERY_THIRD = [(3, 64), (3, 20), (6, 64), (6, 20)]
"""Validations of six steps; the perceptual network is called twice a step, and four times in each validation."""


@pytest.fixture
def data(tiny_run, image_folder) -> dict:
    """The images that `tiny_run` trains on, and enough to validate on for two batches."""
    train, _ = training_and_validation(image_folder, val_fraction=tiny_run.data.val_fraction)
    return {"train_data": train, "val_data": ImageFolder(image_folder)}


def test_a_validation_that_a_kill_cut_short_is_made_up_for(
    uninterrupted, tmp_path, tiny_run, perceptual, teacher, data
):
    run, out = loop(tiny_run, val_every=3), tmp_path / "run"
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train_tokenizer(run, out, perceptual=Watched(perceptual, 9, die), teacher=teacher, **data)
    assert state_of(out)[0]["step"] == 3
    assert validations(out) == []
    train_tokenizer(run, out, resume=True, perceptual=perceptual, teacher=teacher, **data)
    assert validations(out) == EVERY_THIRD
    assert sorted(path.name for path in (out / "images").iterdir()) == ["step_0000003.png", "step_0000006.png"]
    assert_same_state(uninterrupted, out)


def test_a_validation_that_is_in_the_log_is_not_made_again(
    uninterrupted, tmp_path, tiny_run, perceptual, teacher, data
):
    run, out = loop(tiny_run, val_every=3), tmp_path / "run"
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train_tokenizer(run, out, perceptual=Watched(perceptual, 11, die), teacher=teacher, **data)
    assert validations(out) == EVERY_THIRD[:2]
    for _ in range(2):  # The second time it is finished.
        train_tokenizer(run, out, resume=True, perceptual=perceptual, teacher=teacher, **data)
        assert validations(out) == EVERY_THIRD
    assert_same_state(uninterrupted, out)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_validation_saves_at_once(uninterrupted, tmp_path, tiny_run, perceptual, teacher, data, signum):
    run, out = loop(tiny_run, val_every=3, save_every=1000), tmp_path / "run"
    watched = Watched(perceptual, 7, send(signum))  # In the first of two batches.
    with pytest.raises(TrainingStopped, match="after step 3"):
        train_tokenizer(run, out, perceptual=watched, teacher=teacher, **data)
    assert watched.left == -1  # The other K of that batch, no further batch.
    assert state_of(out)[0]["step"] == 3
    assert validations(out) == []
    train_tokenizer(run, out, resume=True, perceptual=perceptual, teacher=teacher, **data)
    assert validations(out) == EVERY_THIRD
    assert_same_state(uninterrupted, out)


def test_what_killed_saves_left_behind_goes(fabric, tiny_run, perceptual, teacher, tmp_path):
    leftover = tmp_path / ".tensors-000000003.0a1b2c3d.tmp.safetensors"
    leftover.write_bytes(b"half")
    checkpoint.save_state(tmp_path, build_state(fabric, tiny_run, perceptual, teacher))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "tensors-000000000.safetensors"]


# ------------------------------------------------------------------------------------------------------------- refusals


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def test_resuming_with_another_configuration_names_the_fields(uninterrupted, tiny_run, perceptual, teacher):
    before = (uninterrupted / "run.json").read_bytes()
    run = replace(tiny_run, optim=replace(tiny_run.optim, lr=5e-4), loop=replace(tiny_run.loop, batch_size=3))
    with pytest.raises(ConfigError) as raised:
        train_tokenizer(run, uninterrupted, resume=True, perceptual=perceptual, teacher=teacher)
    message = one_line(raised.value)
    assert "optim.lr (0.001 before, 0.0005 now)" in message
    assert "loop.batch_size (2 before, 3 now)" in message
    assert "weight_decay" not in message
    assert (uninterrupted / "run.json").read_bytes() == before


def test_steps_and_intervals_may_change_on_the_way(uninterrupted, tmp_path, tiny_run, perceptual, teacher):
    shutil.copytree(uninterrupted, tmp_path / "run")
    run = loop(tiny_run, steps=7, log_every=2, save_every=2, val_every=7, val_images=2, val_num_tokens=(30,))
    train_tokenizer(run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    assert state_of(tmp_path / "run")[0]["step"] == 7
    assert load_run(tmp_path / "run", TokenizerRun) == run
    assert len(read_json(tmp_path / "run" / "run.json")["commands"]) == 2
    assert {"loop.steps", "loop.val_num_tokens", "data.workers"} < set(TokenizerRun.free_fields)


def test_images_may_move_but_not_change(uninterrupted, tmp_path, tiny_run, perceptual, teacher, image_folder):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.copytree(image_folder, tmp_path / "moved")
    run = replace(tiny_run, data=replace(tiny_run.data, train=str(tmp_path / "moved")))
    options = {"resume": True, "perceptual": perceptual, "teacher": teacher}
    train_tokenizer(loop(run, steps=7), tmp_path / "run", **options)
    assert state_of(tmp_path / "run")[0]["step"] == 7
    next((tmp_path / "moved").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="the same images") as raised:
        train_tokenizer(loop(run, steps=8), tmp_path / "run", **options)
    one_line(raised.value)
    assert state_of(tmp_path / "run")[0]["step"] == 7


def test_resuming_a_finished_run_changes_no_weight(uninterrupted, tmp_path, tiny_run, perceptual, teacher):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    train_tokenizer(tiny_run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    assert_same_state(uninterrupted, tmp_path / "run")
    expected = (uninterrupted / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


def test_a_folder_with_something_in_it_is_refused_or_cleaned(uninterrupted, tmp_path, tiny_run, perceptual, teacher):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="force=True"):
        train_tokenizer(tiny_run, out, perceptual=perceptual, teacher=teacher)
    run = loop(tiny_run, steps=1)
    train_tokenizer(run, out, force=True, perceptual=perceptual, teacher=teacher)
    assert (out / "notes.txt").read_text() == "mine"
    assert state_of(out)[0]["step"] == 1
    assert {json.loads(line)["step"] for line in (out / "log.jsonl").open()} == {1}
    assert [path.name for path in (out / "images").iterdir()] == ["step_0000001.png"]


@pytest.mark.parametrize("is_run", [True, False])
def test_starting_again_takes_a_runs_own_files_alone(tmp_path, tiny_run, is_run):
    own = ["log.jsonl", "model.safetensors", "state/state.json", "state/tensors-000000003.safetensors"]
    results = ["result.json", "images/step_0000003.png"]
    others = ["state/notes.txt", "state/sub/tensors-1.safetensors", "images/mine.png", "images/step_dir.png/x"]
    for name in (*own, *results, *others, *(["run.json"] if is_run else [])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("written before")
    begin(tmp_path, tiny_run, resume=False, caches={}, train=9, val=4)
    kept = {*others, "run.json", *([] if is_run else results)}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == kept
    assert all((tmp_path / name).read_text() == "written before" for name in kept - {"run.json"})


def test_there_must_be_something_to_resume(tmp_path, tiny_run, perceptual, teacher):
    with pytest.raises(CheckpointError, match="drop --resume") as raised:
        train_tokenizer(tiny_run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    one_line(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("other", [{"force": True}, {"init": "model.safetensors"}])
def test_resume_goes_with_neither_force_nor_init(uninterrupted, tiny_run, perceptual, teacher, other):
    with pytest.raises(ConfigError, match="--resume"):
        train_tokenizer(tiny_run, uninterrupted, resume=True, perceptual=perceptual, teacher=teacher, **other)


@pytest.mark.parametrize("damage", ["truncated", "other processes", "no tensors", "other shapes"])
def test_a_state_that_does_not_fit_is_one_line(uninterrupted, tmp_path, tiny_run, perceptual, teacher, damage):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    record = read_json(out / "state" / "state.json")
    tensors = out / "state" / record["tensors"]
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "other processes":
        (out / "state" / "state.json").write_text(json.dumps({**record, "processes": 2}))
    else:
        config = json.loads((out / "run.json").read_text())
        config["config"]["model"]["encoder"]["depth"] = 3
        (out / "run.json").write_text(json.dumps(config))
        tiny_run = replace(tiny_run, model=replace(tiny_run.model, encoder=replace(tiny_run.model.encoder, depth=3)))
    with pytest.raises(CheckpointError) as raised:
        train_tokenizer(tiny_run, out, resume=True, perceptual=perceptual, teacher=teacher)
    one_line(raised.value)


@pytest.mark.parametrize(
    ("file", "field"),
    [
        ("state/state.json", "position"),
        ("state/state.json", "processes"),
        ("state/state.json", "tensors"),
        ("run.json", "config"),
        ("run.json", "images"),
    ],
)
def test_a_missing_field_is_one_line(uninterrupted, tmp_path, tiny_run, perceptual, teacher, file, field):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    record = json.loads((out / file).read_text())
    del record[field]
    (out / file).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"expected the field {field}") as raised:
        train_tokenizer(tiny_run, out, resume=True, perceptual=perceptual, teacher=teacher)
    one_line(raised.value)


def test_a_nan_leaves_the_last_state_to_resume_from(uninterrupted, tmp_path, tiny_run, perceptual, teacher):
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.calls = perceptual, 0

        def forward(self, reconstruction, image):
            self.calls += 1
            return self.network(reconstruction, image) * (torch.nan if self.calls == 10 else 1)

    with pytest.raises(NonFiniteLossError, match=r"step 4 .*perceptual = nan"):
        train_tokenizer(tiny_run, tmp_path / "run", perceptual=Poisoned(), teacher=teacher)
    train_tokenizer(tiny_run, tmp_path / "run", resume=True, perceptual=perceptual, teacher=teacher)
    assert_same_state(uninterrupted, tmp_path / "run")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_deterministic_run_on_a_gpu_resumes_with_the_same_bits(tmp_path, tiny_run, perceptual, teacher, precision):
    run = loop(tiny_run, deterministic=True, precision=precision, channels_last=True)
    options = {"teacher": teacher, "hardware": HardwareConfig("cuda")}
    train_tokenizer(run, tmp_path / "whole", perceptual=perceptual, **options)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train_tokenizer(run, tmp_path / "run", perceptual=Watched(perceptual, 10, die), **options)
    train_tokenizer(run, tmp_path / "run", resume=True, perceptual=perceptual, **options)
    assert_same_state(tmp_path / "whole", tmp_path / "run")
