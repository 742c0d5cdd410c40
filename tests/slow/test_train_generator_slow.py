"""The command that trains a generator, as a process that is killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mergevq.data.cache_writer import write_token_cache
from mergevq.data.embedded import EmbeddedImages
from mergevq.files import load_tensors, read_json
from mergevq.tokenizer.model import MergeVQ

pytestmark = pytest.mark.slow


@pytest.fixture
def options(tiny_tokenizer: MergeVQ, tmp_path: Path) -> list[str]:
    """Two small caches, and a run that goes on for long whose learning rate does not depend on its end."""
    for split, count in (("train", 40), ("val", 8)):
        images = EmbeddedImages(split).select(range(count))  # type: ignore[arg-type]
        write_token_cache(tiny_tokenizer, images, tmp_path / split, num_tokens=(40, 20), workers=0)
    return [
        *("--preset", "tiny", "--accelerator", "cpu", "--optim.schedule", "constant"),
        *("--data.tokens", str(tmp_path / "train"), "--data.val-tokens", str(tmp_path / "val")),
        *("--loop.minutes", "0", "--loop.val-every", "7", "--loop.val-images", "8"),
        *("--loop.save-every", "3", "--loop.log-every", "1", "--model.dropout", "0.1"),
    ]


def begin(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mergevq.cli.main", "train", "generator", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_step(out: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        log = out / "log.jsonl"
        if log.exists() and sum('"train"' in line for line in log.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"step {step} was not reached")


def test_a_killed_command_ends_with_the_bits_of_one_that_was_not(options: list[str], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for i, step in enumerate((5, 12)):
        words = ["--resume"] if i else options
        process = begin("--out", str(killed), *words)
        wait_for_step(killed, step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    end = str(read_json(killed / "state" / "state.json")["step"] + 4)
    for words in (["--out", str(killed), "--resume"], ["--out", str(whole), *options]):
        process = begin(*words, "--loop.steps", end)
        message = process.communicate(timeout=240)[1]
        assert process.returncode == 0, message
    states = []
    for out in (killed, whole):
        record = read_json(out / "state" / "state.json")
        assert record["step"] == int(end)
        states.append(load_tensors(out / "state" / record["tensors"])[0])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").open() if '"train"' in line]
    assert steps == list(range(1, int(end) + 1))
