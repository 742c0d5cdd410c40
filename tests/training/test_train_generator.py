"""What a generator's run leaves behind, what validation tells, and what is refused before anything is written."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq import presets
from mergevq.data.cache_writer import write_token_cache
from mergevq.data.folder import ImageFolder
from mergevq.data.token_cache import TokenCache
from mergevq.errors import CheckpointError, ConfigError, DataError, TokenFileError
from mergevq.files import load_tensors, read_json
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.quantize import split_index
from mergevq.tokenizer.config import RecoveryConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training import generator
from mergevq.training.generator import train_generator, train_step
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_state import GeneratorState, build_state
from mergevq.training.generator_validation import draw_samples, validate
from mergevq.training.run_folder import load_run
from mergevq.training.signals import TrainingStopped
from mergevq.training.token_inputs import TokenInputs, open_tokens, token_stream
from mergevq.training.tokenizer import train_tokenizer


def changed(run: GeneratorRun, **parts: dict) -> GeneratorRun:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


def log_of(out: Path, kind: str) -> list[dict]:
    return [record for line in (out / "log.jsonl").open() if (record := json.loads(line))["kind"] == kind]


def state_of(out: Path):
    record = read_json(out / "state" / "state.json")
    return record, load_tensors(out / "state" / record["tensors"])[0]


def assert_same_state(a: Path, b: Path) -> None:
    (record_a, tensors_a), (record_b, tensors_b) = state_of(a), state_of(b)
    assert {**record_a, "elapsed": 0} == {**record_b, "elapsed": 0}
    assert tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []


def stirred(state: GeneratorState) -> GeneratorState:
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in state.ema.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return state


def refused(error: type[Exception], match: str, run: GeneratorRun, out: Path, **options) -> None:
    with pytest.raises(error, match=match) as raised:
        train_generator(run, out, **options)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_leaves_its_model_its_log_its_samples_and_its_state(either_run, tmp_path, capfd):
    run = changed(
        either_run, loop={"sample_classes": 8, "sample_images": 2, "val_every": 4, "val_num_tokens": (40, 10)}
    )
    model = train_generator(run, tmp_path / "run")
    assert model == tmp_path / "run" / "model.safetensors"
    kind = MergeAR if run.model.order == "raster" else RandomAR
    assert kind.from_pretrained(model).config == run.model
    assert read_json(tmp_path / "run" / "run.json")["mergevq"] == "generator-run/1"
    assert load_run(tmp_path / "run", GeneratorRun) == run

    steps = log_of(tmp_path / "run", "train")
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "group_0", "group_1", "grad_norm", "lr", "images_per_second"} <= steps[0].keys()
    assert steps[0]["group_0"] == pytest.approx(math.log(8), rel=1e-5), "new heads know nothing"
    found = log_of(tmp_path / "run", "val")
    assert [(record["step"], record["num_tokens"]) for record in found] == [(4, 40), (4, 10), (6, 40), (6, 10)]
    assert ("duplicate" in found[0]) == (run.model.order == "raster")

    pictures = sorted((tmp_path / "run" / "images").iterdir())
    assert [path.name for path in pictures] == ["step_0000004.png", "step_0000006.png"]
    with Image.open(pictures[0]) as sheet:
        assert sheet.height > 2 * 96 and sheet.width > 2 * 96, "a row for each of two classes, two samples each"
    assert "9 images and 4 held out" in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(either_run, tmp_path, monkeypatch, signum):
    """Stopped within an epoch, and with dropout, dropped classes and random orders on."""
    train_generator(either_run, tmp_path / "whole")
    real, calls = generator.train_step, []

    def watched(*arguments):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signum)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "train_step", watched)
        with pytest.raises(TrainingStopped, match="after step 5"):
            train_generator(either_run, tmp_path / "run")
    torch.rand(7)  # The random state of the process that resumes has nothing to do with it.
    model = train_generator(either_run, tmp_path / "run", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert model.read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_from_its_last_state(generator_run, tmp_path, monkeypatch):
    train_generator(generator_run, tmp_path / "whole")
    real, calls = generator.train_step, []

    def watched(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the machine is gone")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(generator, "train_step", watched)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train_generator(generator_run, tmp_path / "run")
    assert state_of(tmp_path / "run")[0]["step"] == 3
    train_generator(generator_run, tmp_path / "run", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "run")
    assert [record["step"] for record in log_of(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_generator_learns_by_heart(generator_run, tmp_path):
    """Three images: the entropy of single tokens is what a model without context could reach at best."""
    run = changed(
        generator_run,
        model={"width": 32, "token_dropout": 0.0, "dropout": 0.0},
        loss={"label_smoothing": 0.0},
        loop={"steps": 80, "batch_size": 3, "accumulate": 1, "num_tokens": (20,), "val_num_tokens": (20,)},
    )
    caches = [TokenCache(run.data.tokens), TokenCache(run.data.val_tokens)]
    images = caches[1].batch([0, 1, 2], 20)
    index = images["index"].gather(1, images["source"])
    share = index.flatten().bincount().double() / index.numel()
    entropy = -(share[share > 0] * share[share > 0].log()).sum().item()
    train_generator(run, tmp_path / "run", cache=caches[1], val_cache=caches[1])
    losses = [record["loss"] for record in log_of(tmp_path / "run", "train")]
    assert losses[0] > entropy > losses[-1]
    assert log_of(tmp_path / "run", "val")[-1]["loss"] < 0.7 * entropy


def test_images_are_encoded_as_they_come_and_a_resumed_run_sees_the_same(
    generator_run, caches, tmp_path, image_folder, monkeypatch
):
    run = changed(
        generator_run,
        data={"tokens": "", "val_tokens": "", "train": str(image_folder), "val_fraction": 0.3, "workers": 0},
        loop={"num_tokens": (), "val_num_tokens": (), "steps": 4, "save_every": 2},
    )
    whole = train_generator(run, tmp_path / "whole")
    resolved = load_run(tmp_path / "whole", GeneratorRun)
    tok = MergeVQ.from_pretrained(caches.tokenizer)
    assert resolved.loop.num_tokens == (tok.config.num_tokens,)
    assert resolved.model.tokenizer == tok.fingerprint() and resolved.model.class_names == ("cats", "dogs")
    half = train_generator(changed(run, optim={"schedule": "constant"}, loop={"steps": 2}), tmp_path / "resumed")
    assert half.exists()
    constant = changed(run, optim={"schedule": "constant"})
    train_generator(constant, tmp_path / "resumed", resume=True)
    train_generator(constant, tmp_path / "straight")
    assert_same_state(tmp_path / "straight", tmp_path / "resumed")
    assert log_of(tmp_path / "whole", "val")[0]["num_tokens"] == 20 and whole.exists()


def test_images_come_as_the_cache_has_them(generator_run, caches, image_folder):
    """Middle squares, not mirrored: the same tokens, encoded as they come or read."""
    tok, numbers = MergeVQ.from_pretrained(caches.tokenizer), range(9)
    run = changed(
        generator_run, data={"tokens": "", "val_tokens": "", "train": str(image_folder), "crop": "center", "workers": 0}
    )
    inputs = TokenInputs(ImageFolder(image_folder).select(numbers), ImageFolder(image_folder), tok)
    came = next(token_stream(run, inputs, 0, 1, 0))
    order = {int(number): row for row, number in enumerate(TokenCache(caches.train).numbers)}
    rows = [order[int(number)] for number in came["number"]]
    kept = TokenCache(caches.train).batch(rows, came["num_tokens"].tolist())
    assert all(torch.equal(came[name], kept[name]) for name in ("index", "source", "num_tokens", "label"))


def test_init_starts_from_the_weights_of_another_run(generator_run, tmp_path):
    first = train_generator(generator_run, tmp_path / "first")
    plain = changed(generator_run, optim={"lr": 0.0}, loop={"steps": 1})
    mask = replace(generator_run.model.mask, recent=4)
    second = train_generator(
        changed(plain, model={"mask": mask, "dropout": 0.0}), tmp_path / "second", init=tmp_path / "first"
    )
    before, after = load_tensors(first)[0], load_tensors(second)[0]
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    wide = changed(plain, model={"width": 32})
    refused(ConfigError, r"model.width \(16 there, 32 here\)", wide, tmp_path / "third", init=first)
    other = changed(plain, model={"order": "random"})
    refused(CheckpointError, "order random, got one of order raster", other, tmp_path / "third", init=first)


# ----------------------------------------------------------------------------------------------------------- validation


def test_kinds_of_tokens_add_up_to_the_whole_and_are_what_they_say(generator_run, fabric, caches):
    run = changed(generator_run, loop={"val_images": 4, "batch_size": 3, "val_num_tokens": (40, 10)})
    run, inputs = open_tokens(run)
    state = stirred(build_state(fabric, run))
    found = validate(state, inputs, run)
    assert list(found) == [40, 10]
    for count, values in found.items():
        batch = inputs.val.batch(range(4), count)
        full = batch["index"].gather(1, batch["source"])
        with torch.no_grad():
            logits = state.ema.module(full, batch["label"], batch["num_tokens"])
        sums: dict[str, list[float]] = {"first": [], "duplicate": [], "group_0": [], "group_1": [], "right": []}
        parts = split_index(full, run.model.groups)
        for b in range(4):
            seen: set[int] = set()
            for t in range(64):
                losses = [-logits[g][b, t].log_softmax(-1)[parts[b, t, g]].item() for g in range(2)]
                kind = "duplicate" if int(full[b, t]) in seen else "first"
                sums[kind].append(sum(losses))
                sums["group_0"].append(losses[0])
                sums["group_1"].append(losses[1])
                sums["right"].append(float(all(logits[g][b, t].argmax() == parts[b, t, g] for g in range(2))))
                seen.add(int(full[b, t]))
        for name in ("first", "duplicate", "group_0", "group_1"):
            assert values[name] == pytest.approx(sum(sums[name]) / len(sums[name]), rel=1e-4), name
        share = len(sums["duplicate"]) / 256
        assert values["duplicates"] == pytest.approx(share) and 0 < share < 1
        assert values["accuracy"] == pytest.approx(sum(sums["right"]) / 256)
        whole = values["first"] * (1 - share) + values["duplicate"] * share
        assert values["loss"] == pytest.approx(whole) == pytest.approx(values["group_0"] + values["group_1"])


def test_validation_changes_nothing_and_repeats_itself(either_run, fabric):
    run, inputs = open_tokens(either_run)
    state = stirred(build_state(fabric, run))
    state.model.train()
    random, weights = torch.get_rng_state(), {n: t.clone() for n, t in state.ema.state_dict().items()}
    assert validate(state, inputs, run) == validate(state, inputs, run)
    assert torch.equal(torch.get_rng_state(), random) and state.rng.get_state().equal(
        build_state(fabric, run).rng.get_state()
    )
    assert all(torch.equal(t, weights[n]) for n, t in state.ema.state_dict().items())
    stop = iter([False, True])
    assert validate(state, inputs, changed(run, loop={"batch_size": 1}), lambda: next(stop)) is None


def test_random_order_tells_no_kinds_and_counts_no_padding(generator_run, fabric):
    run = changed(generator_run, model={"order": "random"}, loop={"val_images": 4, "val_num_tokens": (40,)})
    run, inputs = open_tokens(run)
    state = stirred(build_state(fabric, run))
    values = validate(state, inputs, run)[40]
    assert {"loss", "group_0", "group_1", "accuracy"} == values.keys()
    assert values["loss"] == pytest.approx(values["group_0"] + values["group_1"])
    small = validate(state, inputs, changed(run, loop={"batch_size": 1}))[40]
    assert values == pytest.approx(small, rel=1e-5)


def test_pictures_need_a_tokenizer_and_for_random_order_its_recovery(generator_run, fabric, caches, tmp_path, capfd):
    run = changed(generator_run, loop={"sample_classes": 2, "sample_images": 1, "steps": 1})
    tok = MergeVQ.from_pretrained(caches.tokenizer)
    bare = MergeVQ(replace(tok.config, recovery=RecoveryConfig(enabled=False)))
    bare.load_state_dict({k: v for k, v in tok.state_dict().items() if not k.startswith("recovery.")})
    assert bare.fingerprint() == tok.fingerprint()
    blind, random = changed(run, data={"tokenizer": ""}), changed(run, model={"order": "random"})
    for i, (this, given, drawn) in enumerate(
        [(blind, None, False), (blind, tok, True), (random, bare, False), (run, bare, True)]
    ):
        train_generator(this, tmp_path / str(i), tokenizer=given)
        assert (tmp_path / str(i) / "images").exists() == drawn
        assert ("has no recovery" in capfd.readouterr().err) == (i == 2)


def test_a_picture_shows_the_averaged_weights_with_seeds_of_its_own(generator_run, fabric, caches, tmp_path):
    run = changed(generator_run, loop={"sample_classes": 1, "sample_images": 2, "sample_guidance": 1.5})
    tok, state = MergeVQ.from_pretrained(caches.tokenizer), stirred(build_state(fabric, run))
    draw_samples(tmp_path / "a.png", state, tok, run)
    images = tok.decode(state.ema.module.generate([0, 0], guidance=1.5, seeds=[0, 1]))
    with Image.open(tmp_path / "a.png") as sheet:
        cell = sheet.crop((sheet.width - 104, 8, sheet.width - 8, 104)).resize((32, 32), Image.Resampling.BOX)
    drawn = torch.from_numpy(np.array(cell)).float().permute(2, 0, 1)
    assert (drawn - (images[1].clamp(-1, 1) + 1) * 127.5).abs().mean() < 8
    with torch.no_grad():
        state.ema.module.transformer.norm.weight[0] = torch.nan
    draw_samples(tmp_path / "b.png", state, tok, run)
    assert not (tmp_path / "b.png").exists()


# ------------------------------------------------------------------------------------------------ what the tokens say


def test_the_tokens_decide_what_the_model_is(caches, generator_run):
    run, inputs = open_tokens(changed(presets.generator("s_64"), data=vars(generator_run.data)))
    model = run.model
    assert (model.grid, model.num_bits, model.groups) == ((8, 8), 6, (3, 3))
    assert (model.num_classes, model.class_names) == (2, ("cats", "dogs"))
    assert model.tokenizer == MergeVQ.from_pretrained(caches.tokenizer).fingerprint()
    assert (model.trained_num_tokens, model.num_tokens) == ((10, 40), 20)
    assert (run.loop.num_tokens, run.loop.val_num_tokens) == ((10, 20, 40), (20,))
    assert (model.width, run.optim) == (192, presets.generator("s_64").optim)
    assert open_tokens(run)[0] == run, "fitted once is fitted for good"
    assert isinstance(inputs.train, TokenCache) and len(inputs.train) == 9


def test_k_of_probability_0_is_not_trained(generator_run):
    law = {"num_tokens": (40, 10, 20), "num_tokens_probs": (0.0, 1.0, 1.0), "val_num_tokens": ()}
    run, _ = open_tokens(changed(generator_run, model={"num_tokens": 40}, loop=law))
    assert (run.model.trained_num_tokens, run.model.num_tokens) == ((10, 20), 20)


def test_groups_of_ones_own_are_refused_if_they_do_not_fit(generator_run, tmp_path):
    own = changed(generator_run, model={"num_bits": 12, "groups": (4, 8)})
    refused(ConfigError, r"sum to the tokens' 6 bits, got \(4, 8\): use others, 3 3 for", own, tmp_path / "run")
    three = changed(generator_run, model={"groups": (2, 2, 2)})
    assert open_tokens(three)[0].model.groups == (2, 2, 2)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_tokens_that_do_not_fit_are_one_line(generator_run, caches, tmp_path, tiny_config, image_folder):
    out = tmp_path / "run"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        other = MergeVQ(tiny_config).eval()
    refused(TokenFileError, "expected tokens of tokenizer", generator_run, out, tokenizer=other)
    refused(TokenFileError, "cache-tokens", changed(generator_run, data={"tokens": str(tmp_path)}), out)
    refused(ConfigError, "data.val_tokens", changed(generator_run, data={"val_tokens": ""}), out)
    neither = changed(generator_run, data={"tokens": "", "val_tokens": ""})
    refused(ConfigError, "expected data.tokens", neither, out)
    refused(ConfigError, "data.tokenizer", changed(neither, data={"train": str(image_folder), "tokenizer": ""}), out)
    refused(CheckpointError, "missing.safetensors", changed(neither, data={"tokenizer": "missing.safetensors"}), out)

    images = ImageFolder(image_folder).select(range(9, 13))
    foreign = write_token_cache(other, images, tmp_path / "foreign", num_tokens=20, workers=0)
    refused(DataError, "got tokenizer .* instead of", generator_run, out, val_cache=foreign)
    tok = MergeVQ.from_pretrained(caches.tokenizer)
    few = write_token_cache(tok, images, tmp_path / "few", num_tokens=10, workers=0)
    refused(ConfigError, "expected num_tokens among 10, got 20", generator_run, out, val_cache=few)
    law = changed(generator_run, loop={"num_tokens": (40, 30)})
    refused(ConfigError, "among the 10, 20, 40 that were encoded, got 30", law, out)
    assert not out.exists()


def test_resuming_with_other_tokens_is_refused(generator_run, caches, tmp_path, image_folder):
    out = tmp_path / "run"
    train_generator(generator_run, out)
    before = (out / "model.safetensors").read_bytes()
    moved = shutil.copytree(caches.train, tmp_path / "moved")
    longer = changed(generator_run, data={"tokens": str(moved)}, loop={"steps": 7})
    tok = MergeVQ.from_pretrained(caches.tokenizer)
    less = write_token_cache(
        tok, ImageFolder(image_folder).select(range(5)), tmp_path / "less", num_tokens=(40, 20, 10), workers=0
    )
    refused(DataError, "expected the 9 images", longer, out, resume=True, cache=less)
    others = write_token_cache(
        tok, ImageFolder(image_folder).select(range(4, 13)), tmp_path / "others", num_tokens=(40, 20, 10), workers=0
    )
    refused(DataError, "got others: point data.tokens", longer, out, resume=True, cache=others)
    refused(ConfigError, "optim.lr", changed(longer, optim={"lr": 1.0}), out, resume=True)
    with pytest.raises(CheckpointError, match="expected a tokenizer-run file, got a generator-run file"):
        train_tokenizer(presets.tiny(), out, resume=True)
    assert (out / "model.safetensors").read_bytes() == before
    train_generator(longer, out, resume=True)
    assert state_of(out)[0]["step"] == 7


def test_one_step_trains_on_what_the_cache_holds(generator_run, fabric, caches):
    """The first batch of the run is the cache's, and its loss is that of a model that knows nothing."""
    run, inputs = open_tokens(generator_run)
    batch = next(token_stream(run, inputs, 0, 1, 0))
    report = train_step(build_state(fabric, run), [batch], run)
    assert report.values["loss"] == pytest.approx(2 * math.log(8), rel=1e-5)
    assert report.lr == pytest.approx(1e-2 * 0.5)
