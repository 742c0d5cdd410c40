"""Runs as separate processes: killed, stopped and resumed, alone and as two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mergevq.configuration import config_to_dict
from mergevq.files import load_tensors, read_json, write_json
from mergevq.tokenizer.config import (
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    QuantizerConfig,
    RecoveryConfig,
    TokenizerConfig,
)
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import (
    DataConfig,
    LossConfig,
    LossWeights,
    TokenizerLoopConfig,
    TokenizerOptimConfig,
    TokenizerRun,
)

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import torch
from mergevq.configuration import config_from_dict
from mergevq.training.config import HardwareConfig, TokenizerRun
from mergevq.training.tokenizer import train_tokenizer

torch.set_num_threads(1)
run = config_from_dict(TokenizerRun, json.load(open(sys.argv[1])))
devices = int(sys.argv[3])
train_tokenizer(run, sys.argv[2], resume="--resume" in sys.argv, hardware=HardwareConfig("cpu", devices))
"""

RUN = TokenizerRun(
    model=TokenizerConfig(
        image_size=32,
        num_bits=6,
        num_tokens=20,
        num_groups=4,
        encoder=EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=2, heads=2),
        quantizer=QuantizerConfig(norm="layer", temperature=1.0, groups=(3, 3)),
        decoder=DecoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), output_stride=2, depth=1, heads=2),
        recovery=RecoveryConfig(width=16, heads=2, cross_depth=1, self_depth=1),
        alignment=AlignmentConfig(head="two", teacher_dim=9),
    ),
    loss=LossConfig(
        weights=LossWeights(perceptual=0.0), disc_channels=4, disc_layers=2, disc_start=5, alignment="labels"
    ),
    data=DataConfig(train="embedded", workers=1),
    optim=TokenizerOptimConfig(lr=1e-3, schedule="cosine", warmup_steps=5),
    loop=TokenizerLoopConfig(
        steps=36,
        batch_size=2,
        accumulate=2,
        num_tokens=(64, 40, 20),
        val_num_tokens=(64, 20),
        val_every=18,
        val_images=6,
        save_every=1,
        log_every=1,
    ),
)


ENDLESS = replace(RUN, optim=replace(RUN.optim, schedule="constant"), loop=replace(RUN.loop, steps=100_000))
"""A run that is still going on when it is stopped, however fast the machine is.

It may be given another end later, since its learning rate does not depend on the end.
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a training process in `tmp_path / name`; what is left of it after the test is killed."""
    (tmp_path / "train.py").write_text(SCRIPT)
    write_json(tmp_path / "run.json", config_to_dict(RUN))
    started: list[subprocess.Popen[str]] = []

    def begin(name: str, *options: str, devices: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "train.py", "run.json", str(tmp_path / name), str(devices), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A session of its own, so that its process group holds it, its readers and its second process only.
        process = subprocess.Popen(
            command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        with suppress(ProcessLookupError):  # All of the group has ended.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def state_of(out: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    record = read_json(out / "state" / "state.json")
    return record, load_tensors(out / "state" / record["tensors"])[0]


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        log = out / "log.jsonl"
        if log.exists() and sum('"train"' in line for line in log.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def finish(process: subprocess.Popen[str]) -> str:
    message = process.communicate(timeout=240)[1]
    assert process.returncode == 0, message
    return message


def end_after(out: Path, steps: int) -> int:
    """Lets the run of `run.json` end so many steps after the last one of `out`, and returns where that is."""
    end = state_of(out)[0]["step"] + steps
    write_json(out.parent / "run.json", config_to_dict(replace(ENDLESS, loop=replace(ENDLESS.loop, steps=end))))
    return end


def assert_same(a: Path, b: Path, end: int) -> None:
    (_, first), (record, second) = state_of(a), state_of(b)
    assert record["step"] == end
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_process_killed_again_and_again_ends_with_the_same_bits(start, tmp_path):
    write_json(tmp_path / "run.json", config_to_dict(ENDLESS))
    for i, step in enumerate((4, 12, 21)):
        process = start("killed", *(["--resume"] if i else []))
        wait_for_step(tmp_path / "killed", step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = end_after(tmp_path / "killed", 6)
    finish(start("killed", "--resume"))
    finish(start("whole"))
    assert_same(tmp_path / "whole", tmp_path / "killed", end)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").open() if '"train"' in line]
    assert steps == list(range(1, end + 1))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_process_says_so_and_exits_as_the_shell_expects(start, tmp_path, signum, code):
    write_json(tmp_path / "run.json", config_to_dict(ENDLESS))
    process = start("run")
    wait_for_step(tmp_path / "run", 6, process)
    process.send_signal(signum)
    message = process.communicate(timeout=180)[1]
    assert process.returncode == code, message
    assert "everything saved: --resume goes on" in message
    assert "Traceback" not in message
    record, _ = state_of(tmp_path / "run")
    assert 6 <= record["step"] < ENDLESS.loop.steps
    MergeVQ.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_readers_of_images_too_and_disturbs_nothing(start, tmp_path, signum, code):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(24):
        Image.new("RGB", (200, 200), (10 * i, 100, 0)).save(images / f"{i}.png")
    run = replace(
        ENDLESS,
        data=DataConfig(train=str(images), val_fraction=0.3, workers=2),
        loss=replace(RUN.loss, weights=replace(RUN.loss.weights, alignment=0.0)),
    )
    write_json(tmp_path / "run.json", config_to_dict(run))
    process = start("run")
    wait_for_step(tmp_path / "run", 6, process)
    os.killpg(process.pid, signum)
    message = process.communicate(timeout=180)[1]
    assert process.returncode == code, message
    assert "Traceback" not in message
    assert "everything saved" in message


def test_two_processes_start_stop_and_resume(start, tmp_path):
    write_json(tmp_path / "run.json", config_to_dict(ENDLESS))
    process = start("stopped", devices=2)
    wait_for_step(tmp_path / "stopped", 6, process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=180)[1]
    assert process.returncode == 143, message
    end = end_after(tmp_path / "stopped", 6)
    finish(start("stopped", "--resume", devices=2))
    finish(start("whole", devices=2))
    assert_same(tmp_path / "whole", tmp_path / "stopped", end)
    assert state_of(tmp_path / "whole")[0]["processes"] == 2


def test_two_processes_refuse_an_existing_folder_without_hanging(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    process = start("run", devices=2)
    message = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "OutputExistsError" in message
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "mine.txt"]


def test_the_images_shown_to_two_processes_are_those_of_one(start, tmp_path):
    """With half the batch in each of two processes, the losses of the first step are those of one process."""
    run = replace(RUN, loop=replace(RUN.loop, steps=1, batch_size=2, num_tokens=(64,)))
    write_json(tmp_path / "run.json", config_to_dict(run))
    finish(start("two", devices=2))
    write_json(tmp_path / "run.json", config_to_dict(replace(run, loop=replace(run.loop, batch_size=4))))
    finish(start("one"))
    two, one = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("two", "one"))
    for name in ("reconstruction", "commitment", "entropy", "recovery", "alignment", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
