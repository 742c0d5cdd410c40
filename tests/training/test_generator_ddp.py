"""Two gloo processes train a generator as one process with the joined batch does, and stay equal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergevq.files import load_tensors, read_json
from mergevq.training.config import HardwareConfig
from mergevq.training.generator import train_generator, train_step
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_state import build_state
from mergevq.training.generator_validation import validate
from mergevq.training.processes import build_fabric
from mergevq.training.token_inputs import open_tokens, token_stream

TWO = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")


def two_steps(fabric, run: GeneratorRun, folder: Path) -> None:
    run, inputs = open_tokens(run)
    state = build_state(fabric, run)
    batches = token_stream(run, inputs, fabric.global_rank, fabric.world_size, 0)
    reports = [train_step(state, [next(batches), next(batches)], run).values for _ in range(2)]
    found = validate(state, inputs, run)
    name = f"{fabric.world_size}-{fabric.global_rank}"
    save_file(dict(state.model.state_dict()), folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"reports": reports, "val": found}))


def test_two_processes_are_one_with_the_joined_batch(either_run, tmp_path, fabric):
    """With random orders and dropped classes, unequal K, and an odd number of held-out images."""
    model = replace(either_run.model, token_dropout=0.0, dropout=0.0, class_dropout=0.5)
    run = replace(either_run, model=model)
    build_fabric(TWO).launch(two_steps, run, tmp_path)
    joined = replace(run, loop=replace(run.loop, batch_size=4))
    two_steps(fabric, joined, tmp_path)
    weights = {name: load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")}
    said = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in weights}
    assert said["2-0"] == said["2-1"]
    for one, two in zip(said["1-0"]["reports"], said["2-0"]["reports"], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert said["1-0"]["val"]["20"] == pytest.approx(said["2-0"]["val"]["20"], rel=1e-4)
    for name, tensor in weights["1-0"].items():
        assert torch.equal(weights["2-0"][name], weights["2-1"][name]), name
        # Adam divides by the size of gradients, so rounding moves a weight by up to a few hundredths of a step of 0.01.
        assert torch.allclose(tensor, weights["2-0"][name], atol=3e-4), name


def test_a_run_of_two_processes_resumes_with_dropout_of_each_its_own(generator_run, tmp_path):
    constant = replace(generator_run, optim=replace(generator_run.optim, schedule="constant"))
    loop = replace(constant.loop, batch_size=1, val_images=2, steps=4, save_every=2)
    whole = replace(constant, loop=loop)
    half = replace(constant, loop=replace(loop, steps=2))
    train_generator(whole, tmp_path / "straight", hardware=TWO)
    train_generator(half, tmp_path / "resumed", hardware=TWO)
    train_generator(whole, tmp_path / "resumed", hardware=TWO, resume=True)
    states = []
    for name in ("straight", "resumed"):
        record = read_json(tmp_path / name / "state" / "state.json")
        assert (record["processes"], record["step"]) == (2, 4)
        states.append(load_tensors(tmp_path / name / "state" / record["tensors"])[0])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
