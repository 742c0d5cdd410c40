"""Training that aligns with cached features of the teacher: the same losses, and no teacher."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from mergevq.data.sources import training_and_validation
from mergevq.data.teacher_cache import TeacherCache, write_teacher_cache
from mergevq.errors import ConfigError, DataError, TokenFileError
from mergevq.layers.teachers import load_teacher
from mergevq.training.config import TokenizerRun
from mergevq.training.inputs import open_inputs, stream
from mergevq.training.state import build_state
from mergevq.training.tokenizer import train_step, train_tokenizer


def changed(run: TokenizerRun, **parts: dict) -> TokenizerRun:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


@pytest.fixture
def run(tiny_run: TokenizerRun, teacher: nn.Module, tmp_path: Path) -> TokenizerRun:
    """Trains on nine square images, which a teacher sees whole; what it makes of them is in the folder `cache`."""
    rng = torch.Generator().manual_seed(6)
    for i in range(12):
        coarse = torch.randint(0, 256, (5, 5, 3), generator=rng, dtype=torch.uint8)
        path = tmp_path / "square" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse.numpy()).resize((40, 40), Image.Resampling.BICUBIC).save(path)
    run = changed(
        tiny_run,
        data={"train": str(tmp_path / "square"), "teacher_cache": str(tmp_path / "cache")},
        loss={"teacher": "Teacher"},
        loop={"steps": 2},
    )
    train, _ = training_and_validation(run.data.train, val_fraction=run.data.val_fraction)
    write_teacher_cache(teacher, train, tmp_path / "cache", size=32, shard_size=4, workers=0)
    return run


def test_the_losses_are_those_of_the_teacher_itself(run, perceptual, teacher, fabric):
    reports, batches = [], []
    for one in (run, changed(run, data={"teacher_cache": ""})):
        inputs = open_inputs(one, None, None, perceptual, teacher, 1)
        assert (inputs.teacher is None) == bool(one.data.teacher_cache) == (inputs.teacher_cache is not None)
        batch = list(islice(stream(one, inputs.train, 0, 1, 0, inputs.teacher_cache), 2))
        batches.append(batch[0])
        state = build_state(fabric, one, inputs.perceptual, inputs.teacher)
        reports.append(train_step(state, batch, one).values)
    cached, live = batches
    assert live.keys() - cached.keys() == {"view_teacher"} and cached.keys() - live.keys() == {"teacher"}
    for name in ("image", "view_student", "number"):
        assert torch.equal(cached[name], live[name])
    torch.testing.assert_close(cached["teacher"], teacher(live["view_teacher"]).detach(), rtol=1e-5, atol=1e-5)
    assert reports[0] == pytest.approx(reports[1], rel=1e-4, abs=1e-6)
    assert reports[0]["alignment"] > 0


def test_a_run_needs_no_teacher_and_goes_on_with_the_same_cache_alone(run, perceptual, tmp_path):
    class Other(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :10]

    out = tmp_path / "run"
    train_tokenizer(run, out, perceptual=perceptual)
    records = [json.loads(line) for line in (out / "log.jsonl").open()]
    assert all(record["alignment"] > 0 for record in records if record["kind"] == "train")
    assert json.loads((out / "run.json").read_text())["teacher_cache"] == TeacherCache(tmp_path / "cache").fingerprint

    shutil.move(tmp_path / "cache", tmp_path / "moved")
    moved = changed(run, data={"teacher_cache": str(tmp_path / "moved")}, loop={"steps": 3})
    train_tokenizer(moved, out, resume=True, perceptual=perceptual)
    other = Other()
    other.__class__.__name__ = "Teacher"
    train, _ = training_and_validation(run.data.train, val_fraction=run.data.val_fraction)
    write_teacher_cache(other, train, tmp_path / "other", size=32, workers=0)
    for folder in ("", str(tmp_path / "other")):
        with pytest.raises(DataError, match=r"features of the teacher that .*point data.teacher_cache at the same"):
            again = changed(run, data={"teacher_cache": folder}, loop={"steps": 4})
            train_tokenizer(again, out, resume=True, perceptual=perceptual, teacher=other if not folder else None)


def test_features_that_do_not_fit_the_run_are_refused(run, perceptual, teacher, tmp_path, monkeypatch):
    for parts, error, match in (
        ({"loss": {"teacher": "lite0"}}, ConfigError, "features of teacher lite0 .*got those of Teacher"),
        ({"data": {"val_fraction": 0.5}}, DataError, r"--split and --val-fraction"),
        ({"data": {"teacher_cache": str(tmp_path / "none")}}, TokenFileError, "`mergevq cache-teacher` wrote"),
        (
            {"model": {"alignment": replace(run.model.alignment, teacher_dim=12)}},
            ConfigError,
            r"expected 12 numbers from the teacher .*got 10",
        ),
        ({"model": {"image_size": 40, "num_tokens": 20}}, ConfigError, "with --size 40"),
    ):
        with pytest.raises(error, match=match) as caught:
            open_inputs(changed(run, **parts), None, None, perceptual, None, 1)
        assert "\n" not in str(caught.value)
    # The file of weights is read, as its name tells nothing about the features.
    loaded = []

    def load(name, weights=None):
        if not isinstance(name, str):
            return load_teacher(name)
        loaded.append((name, weights))
        return load_teacher(changed_weights)

    changed_weights = copy.deepcopy(teacher)
    monkeypatch.setattr("mergevq.training.inputs.load_teacher", load)
    given = changed(run, loss={"teacher_weights": "other.safetensors"})
    assert open_inputs(given, None, None, perceptual, None, 1).teacher_cache is not None
    next(changed_weights.parameters()).data.add_(1)
    with pytest.raises(ConfigError, match="with the weights and the preprocessing that were given"):
        open_inputs(given, None, None, perceptual, None, 1)
    assert loaded == [("Teacher", "other.safetensors")] * 2
    # Where nothing is aligned, nothing is opened.
    off = changed(run, loss={"weights": replace(run.loss.weights, alignment=0.0)}, data={"teacher_cache": "nowhere"})
    assert open_inputs(off, None, None, perceptual, None, 1).teacher_cache is None
