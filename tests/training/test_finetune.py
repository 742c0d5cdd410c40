"""The whole encoder is fine-tuned at the rates of its layers; an interrupted run ends with the same bits."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from mergevq.files import load_tensors, read_json
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.model import MergeVQ
from mergevq.training import finetune as module
from mergevq.training.config import HardwareConfig, LoopConfig
from mergevq.training.finetune import finetune, train_step
from mergevq.training.finetune_config import (
    FinetuneDataConfig,
    FinetuneLossConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneRun,
)
from mergevq.training.finetune_inputs import FinetuneInputs, resolve
from mergevq.training.finetune_state import build_state, lr_scale
from mergevq.training.finetune_validation import validate
from mergevq.training.signals import TrainingStopped


def changed(run: FinetuneRun, **parts: dict) -> FinetuneRun:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


@pytest.fixture
def run() -> FinetuneRun:
    """Everything on; two micro-batches of two, saved every three of six steps."""
    return FinetuneRun(
        model=FinetuneModelConfig(features="class+mean", num_tokens=20, drop_path=0.3),
        loss=FinetuneLossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        data=FinetuneDataConfig(workers=0, rand_augment=1),
        optim=FinetuneOptimConfig(
            lr=1e-2, betas=(0.9, 0.999), weight_decay=0.05, warmup_steps=2, schedule="cosine", clip_norm=1.0,
            ema_decay=0.5, layer_decay=0.5,
        ),
        loop=LoopConfig(steps=6, batch_size=2, accumulate=2, val_every=4, val_images=3, save_every=3, log_every=1),
    )  # fmt: skip


@pytest.fixture
def inputs(tiny_tokenizer: MergeVQ, image_folder: Path) -> FinetuneInputs:
    """Eight images to train on and five held-out ones, of two classes."""
    images = ImageFolder(image_folder)
    held_out = [0, 3, 6, 9, 12]
    train = [i for i in range(len(images)) if i not in held_out]
    return FinetuneInputs(tiny_tokenizer, images.select(train), images.select(held_out))


def train(run: FinetuneRun, out: Path, inputs: FinetuneInputs, **options) -> Path:
    return finetune(run, out, tokenizer=inputs.tok, train_data=inputs.train, val_data=inputs.val, **options)


def batch_of(inputs: FinetuneInputs, numbers: list[int]) -> dict[str, torch.Tensor]:
    (batch,) = evaluation_batches(inputs.train.select(numbers), 32, batch_size=len(numbers))
    return batch


def quiet(run: FinetuneRun) -> FinetuneRun:
    """Without noise."""
    return changed(run, model={"drop_path": 0.0}, loss={"mixup": 0.0, "cutmix": 0.0})


# ------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("num_tokens", [0, 20])
@pytest.mark.parametrize("features", ["class", "mean", "class+mean"])
def test_gradients_reach_everything_but_the_layers_of_codes(fabric, run, inputs, features, num_tokens):
    run = resolve(changed(run, model={"features": features, "num_tokens": num_tokens, "drop_path": 0.0}), inputs)
    state = build_state(fabric, run, inputs.tok)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    assert all(torch.equal(t, before[f"encoder.{name}"]) for name, t in inputs.tok.encoder.state_dict().items())
    values = train_step(state, [batch_of(inputs, [0, 4]), batch_of(inputs, [1, 7])], run)
    frozen = {f"encoder.{part}.{kind}" for part in ("norm_out", "code_out") for kind in ("weight", "bias")}
    without = {name for name, p in state.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == frozen
    same = {name for name, tensor in state.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == frozen
    assert values.keys() == {"loss", "accuracy", "grad_norm", "lr"}
    assert (state.step, int(state.ema.n_averaged)) == (1, 1)


def test_every_layer_has_the_stated_rate(fabric, run, inputs):
    run = resolve(run, inputs)
    state = build_state(fabric, run, inputs.tok)
    # Two attention blocks, a decay of a half: head 1, blocks 1/2 and 1/4, stem and class token 1/8. Half of the
    # warm-up of two steps.
    rate = 0.5 * 1e-2
    expected = {}
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            shares = {"norm": 1, "head": 1, "encoder.blocks.1": 1 / 2, "encoder.blocks.0": 1 / 4}
            shares |= {"encoder.stem": 1 / 8, "encoder.class_token": 1 / 8}
            (share,) = [value for part, value in shares.items() if name.startswith(part)]
            expected[name] = share * rate
    train_step(state, [batch_of(inputs, [0, 4])], run)
    names = {id(p): name for name, p in state.model.named_parameters()}
    groups = state.optimizer.param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates == pytest.approx(expected)
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] > 0}
    assert decayed == {n for n, p in state.model.named_parameters() if p.ndim >= 2 and n in rates} - {
        "encoder.class_token"
    }


def test_rates_of_a_deep_encoder_by_hand():
    scale = {name: lr_scale(name, depth=12, decay=0.65) for name in (
        "encoder.stem.conv_in.weight", "encoder.class_token", "encoder.blocks.0.ls1", "encoder.blocks.11.mlp.fc1.bias",
        "norm.weight", "head.bias",
    )}  # fmt: skip
    assert list(scale.values()) == pytest.approx([0.65**13, 0.65**13, 0.65**12, 0.65, 1, 1])
    assert lr_scale("encoder.blocks.1.ls2", depth=12, decay=1.0) == 1


def test_two_halves_accumulated_are_one_batch(fabric, run, inputs):
    """Stochastic depth included: what is left out depends on an image's place in the step."""
    run = resolve(changed(run, loss={"mixup": 0.0, "cutmix": 0.0}, model={"drop_path": 0.9}), inputs)
    states = [build_state(fabric, run, inputs.tok) for _ in range(2)]
    halves = [batch_of(inputs, [0, 4]), batch_of(inputs, [1, 7])]
    whole = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    values = [train_step(state, batch, run) for state, batch in zip(states, ([whole], halves), strict=True)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    still = build_state(fabric, run, inputs.tok)
    other = train_step(still, [whole], changed(run, model={"drop_path": 0.0}))
    assert other["loss"] != pytest.approx(values[0]["loss"], rel=1e-3)
    # Gradients, because Adam makes whole steps of the rounding errors of those that are 0.
    for a, b in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_smoothed_cross_entropy(fabric, run, inputs):
    run = resolve(quiet(run), inputs)
    state = build_state(fabric, run, inputs.tok)
    batch = batch_of(inputs, [0, 4, 7])
    logits = state.model(batch["image"], 20)
    log_p = logits.detach().log_softmax(1)
    true = log_p.gather(1, batch["label"][:, None])[:, 0]
    expected = -(0.9 * true + 0.1 * log_p.mean(1)).mean()
    accuracy = (logits.argmax(1) == batch["label"]).double().mean()
    values = train_step(state, [batch], run)
    assert (values["loss"], values["accuracy"]) == pytest.approx((float(expected), float(accuracy)), rel=1e-5)


def test_a_number_that_is_not_finite_stops_before_the_weights_change(fabric, run, inputs):
    run = resolve(run, inputs)
    state = build_state(fabric, run, inputs.tok)
    with torch.no_grad():
        state.model.head.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match=r"optimizer step 0, got loss = nan") as raised:
        train_step(state, [batch_of(inputs, [0, 4])], run)
    assert "\n" not in str(raised.value)
    after = state.model.state_dict()
    assert all(torch.equal(t.nan_to_num(), before[name].nan_to_num()) for name, t in after.items())
    assert state.step == 0


# ----------------------------------------------------------------------------------------------------------- the result


def test_two_colours_are_told_apart(tiny_tokenizer, tmp_path):
    rng = torch.Generator().manual_seed(0)
    for i in range(24):
        colour, shade = (("red", "blue")[i % 2], 120 + int(torch.randint(100, (), generator=rng)))
        pixels = torch.randint(0, 100, (32, 32, 3), generator=rng, dtype=torch.uint8)
        pixels[..., 0 if colour == "red" else 2] = shade
        path = tmp_path / "images" / ("val" if i >= 16 else "train") / colour / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    run = FinetuneRun(
        model=FinetuneModelConfig(drop_path=0.1),
        loss=FinetuneLossConfig(mixup=0.2),
        data=FinetuneDataConfig(train=str(tmp_path / "images"), workers=0),
        optim=FinetuneOptimConfig(lr=1e-2, ema_decay=0.8, layer_decay=0.8, clip_norm=1.0),
        loop=LoopConfig(steps=30, batch_size=8, log_every=1),
    )
    finetune(run, tmp_path / "run", tokenizer=tiny_tokenizer)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0.5, "it was not trivial from the start"
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["top1"], result["top5"], result["finished"]) == (1.0, None, True)
    assert result["per_class"] == {"blue": {"images": 4, "top1": 1.0}, "red": {"images": 4, "top1": 1.0}}
    assert result["loss"] < 0.3
    protocol = result["protocol"]
    assert protocol["images"] == {"train": 16, "val": 8, "measured": 8}
    assert protocol["images_unreadable"] == {"measured": 0}
    whole = ImageFolder(tmp_path / "images")
    assert protocol["fingerprints"] == {part: whole.part(part).fingerprint() for part in ("train", "val")}
    assert (protocol["features"], protocol["num_tokens"], protocol["num_patches"]) == ("class", 64, 64)
    assert protocol["tokenizer"] == tiny_tokenizer.fingerprint() != result["fingerprint"]


def test_the_numbers_are_those_of_the_published_classifier(run, inputs, tmp_path, capfd):
    path = train(run, tmp_path / "run", inputs)
    classifier = Classifier.from_pretrained(tmp_path / "run")
    assert path == tmp_path / "run" / "model.safetensors"
    assert classifier.config.class_names == ("cats", "dogs")
    assert classifier.config.began_as == inputs.tok.fingerprint() != classifier.fingerprint()
    (batch,) = evaluation_batches(inputs.val, 32, batch_size=5)
    logits = classifier.classify(batch["image"])
    right = logits.argmax(1) == batch["label"]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    seen = [(r["kind"], r["step"], r.get("images")) for r in records if r["kind"] == "val"]
    assert seen == [("val", 4, 3), ("val", 6, 5)], "all held-out images at the end"
    assert records[-1]["top1"] == pytest.approx(right.double().mean().item())
    assert records[-1]["loss"] == pytest.approx(cross_entropy(logits, batch["label"]).item(), rel=1e-5)
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["step"], result["top1"], result["loss"]) == (6, records[-1]["top1"], records[-1]["loss"])
    for number, name in enumerate(("cats", "dogs")):
        share = right[batch["label"] == number].double().mean().item()
        assert result["per_class"][name]["top1"] == pytest.approx(share)
    assert result["fingerprint"] == classifier.fingerprint()
    assert result["config"]["model"]["num_tokens"] == 20
    assert "2 classes by class+mean features at K = 20" in capfd.readouterr().err


def test_the_result_tells_the_arithmetic_that_was_used_and_what_was_left_out(run, inputs, tmp_path, monkeypatch):
    broken = inputs.val.root / inputs.val.name(0)
    kept = broken.read_bytes()
    broken.write_bytes(b"no image")
    monkeypatch.setattr("mergevq.training.precision.has_fast_bf16", lambda: False)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        train(changed(run, loop={"precision": "bf16", "steps": 1}), tmp_path / "run", inputs)
    finally:
        torch.set_float32_matmul_precision(before)
        broken.write_bytes(kept)
    protocol = read_json(tmp_path / "run" / "result.json")["protocol"]
    assert protocol["images"]["measured"] == 4 and protocol["images_unreadable"] == {"measured": 1}
    for which in ("training", "measured"):
        told = protocol["precision"][which]
        assert told == "float32; matrix products with fewer bits (TF32 or bf16)", "its encoder rounds too"


def test_validation_draws_nothing_and_leaves_no_branch_out(fabric, run, inputs):
    run = resolve(changed(run, model={"drop_path": 0.9}), inputs)
    state = build_state(fabric, run, inputs.tok)
    train_step(state, [batch_of(inputs, [0, 4])], run)
    model = state.ema.module
    before = state.rng.get_state(), torch.get_rng_state()
    found = [validate(fabric, model, inputs.val, run, 5) for _ in range(2)]
    assert found[0] == found[1] and found[0].images == 5
    assert all(torch.equal(a, b) for a, b in zip(before, (state.rng.get_state(), torch.get_rng_state()), strict=True))
    (batch,) = evaluation_batches(inputs.val, 32, batch_size=5)
    expected = cross_entropy(model(batch["image"], 20), batch["label"]).item()
    assert found[0].loss == pytest.approx(expected, rel=1e-5)
    assert validate(fabric, model, inputs.val, run, 5, stop=lambda: True) is None


def test_top5_counts_the_five_largest_logits(fabric, run, inputs):
    """Held-out images of seven classes, and a classifier that always ranks them 6, 5, ... 0."""
    names = tuple("abcdefg")
    run = resolve(run, inputs)
    run = changed(run, model={"class_names": names}, loop={"batch_size": 3})
    classifier = build_state(fabric, run, inputs.tok).model
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.arange(7.0))
    val = inputs.val.select(range(5))
    val.classes, val.labels = names, [6, 2, 1, 6, 0]
    found = validate(fabric, classifier, val, run, 5)
    assert (found.top1, found.top5, found.images) == (pytest.approx(0.4), pytest.approx(0.6), 5)
    assert found.class_images == (1, 1, 1, 0, 0, 0, 2)
    assert found.class_top1 == (0.0, 0.0, 0.0, None, None, None, 1.0)


# ------------------------------------------------------------------------------------------------------------- resuming


def state_of(out: Path):
    record = read_json(out / "state" / "state.json")
    return {**record, "elapsed": 0}, load_tensors(out / "state" / record["tensors"])[0]


def assert_same(a: Path, b: Path) -> None:
    (record_a, tensors_a), (record_b, tensors_b) = state_of(a), state_of(b)
    assert record_a == record_b and tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    results = [{**read_json(out / "result.json"), "time": 0} for out in (a, b)]
    assert results[0] == results[1]


@pytest.fixture
def uninterrupted(inputs, run, tmp_path) -> Path:
    train(run, tmp_path / "whole", inputs)
    return tmp_path / "whole"


def watch(monkeypatch, step: int, action) -> None:
    """Does something in the n-th optimizer step."""
    left = [step]

    def watched(*arguments):
        left[0] -= 1
        if left[0] == 0:
            action()
        return train_step(*arguments)

    monkeypatch.setattr(module, "train_step", watched)


def test_a_run_killed_in_its_fifth_step_ends_with_the_same_bits(uninterrupted, inputs, run, tmp_path, monkeypatch):
    def die() -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        watch(patch, 5, die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(run, tmp_path / "run", inputs)
    assert state_of(tmp_path / "run")[0]["step"] == 3
    torch.rand(7)  # The random state of the process that resumes has nothing to do with it.
    train(run, tmp_path / "run", inputs, resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_a_signal_saves_and_the_run_goes_on(uninterrupted, inputs, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        watch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="after step 2"):
            train(run, tmp_path / "run", inputs)
    assert Classifier.from_pretrained(tmp_path / "run").config.num_tokens == 20
    train(run, tmp_path / "run", inputs, resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_resuming_with_another_configuration_tokenizer_or_other_images_is_refused(uninterrupted, inputs, run):
    with pytest.raises(ConfigError, match=r"optim.layer_decay \(0.5 before, 0.9 now\)"):
        train(changed(run, optim={"layer_decay": 0.9}), uninterrupted, inputs, resume=True)
    with pytest.raises(ConfigError, match=r"model.tokenizer"):
        other = MergeVQ(inputs.tok.config)
        train(run, uninterrupted, inputs._replace(tok=other), resume=True)
    with pytest.raises(DataError, match="8 images"):
        train(run, uninterrupted, inputs._replace(train=inputs.train.select(range(7))), resume=True)


def test_another_run_starts_from_the_classifier(uninterrupted, inputs, run, tmp_path):
    still = changed(run, optim={"lr": 0.0}, model={"num_tokens": 0})
    path = train(still, tmp_path / "again", inputs, init=uninterrupted)
    again, before = (Classifier.from_pretrained(folder) for folder in (path, uninterrupted))
    assert again.config == replace(before.config, num_tokens=64)
    same = [torch.equal(a, b) for a, b in zip(again.parameters(), before.parameters(), strict=True)]
    assert all(same)
    with pytest.raises(ConfigError, match=r"features \('class\+mean' there, 'mean' here\)"):
        train(changed(run, model={"features": "mean"}), tmp_path / "b", inputs, init=uninterrupted)


def test_two_processes_are_one_with_the_joined_batch(inputs, run, tmp_path):
    run = changed(run, loss={"mixup": 0.0, "cutmix": 0.0}, optim={"schedule": "constant"})
    one, two = changed(run, loop={"batch_size": 4}), changed(run, loop={"batch_size": 2})
    hardware = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")
    models = [
        Classifier.from_pretrained(train(run, tmp_path / name, inputs, hardware=hardware))
        for name, run, hardware in (("one", one, None), ("two", two, hardware))
    ]
    # What is said, because Adam makes whole steps of the rounding errors of gradients that are 0.
    (batch,) = evaluation_batches(inputs.val, 32, batch_size=5)
    said = [model.classify(batch["image"]).softmax(1) for model in models]
    torch.testing.assert_close(said[0], said[1], rtol=0, atol=5e-3)
    results = [read_json(tmp_path / name / "result.json") for name in ("one", "two")]
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["per_class"] == results[1]["per_class"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-2)
    assert [r["protocol"]["images_per_step"] for r in results] == [8, 8]
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


# ------------------------------------------------------------------------------------------------------------ bad input


def folder_of(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(root / name)
    return str(root)


def test_what_does_not_belong_together_is_refused_before_anything_is_written(tiny_tokenizer, run, inputs, tmp_path):
    tok, out = tiny_tokenizer, tmp_path / "out"
    tok.save_pretrained(tmp_path / "tok")
    shape = GeneratorConfig(groups=(3, 3), num_bits=6, grid=(8, 8), width=16, depth=1, heads=2, num_tokens=20)
    MergeAR(shape).save_pretrained(tmp_path / "generator")

    def refused(error, match, tokenizer=tok, out=out, train="", val="", run=run, **options):
        given = {} if train else {"train_data": inputs.train, "val_data": inputs.val}
        run = changed(run, data={"train": train, "val": val})
        with pytest.raises(error, match=match) as caught:
            finetune(run, out, tokenizer=tokenizer, **{**given, **options})
        assert "\n" not in str(caught.value) and not (out / "run.json").exists()

    flat = folder_of(tmp_path / "flat", "a.png", "b.png", "c.png")
    refused(DataError, "at least two classes, got images without labels", train=flat)
    one = folder_of(tmp_path / "one", "train/cats/a.png", "train/cats/b.png", "val/dogs/a.png")
    refused(DataError, "at least two classes, got cats alone", train=one)
    two = folder_of(tmp_path / "two", "cats/a.png", "cats/b.png", "dogs/a.png", "dogs/b.png")
    more = folder_of(tmp_path / "more", "cats/c.png", "dogs/c.png", "owls/c.png")
    refused(DataError, "every held-out image, got none for owls/c.png", train=two, val=more)
    lacks = folder_of(tmp_path / "lacks", *(f"{p}/{c}/a.png" for p in ("train", "val") for c in ("cats", "dogs")))
    folder_of(tmp_path / "lacks", "val/owls/a.png")
    refused(DataError, "every held-out class, got none of owls", train=lacks)
    refused(DataError, "classes=train_data.classes", val_data=ImageFolder(more))
    refused(ConfigError, "expected val_data with train_data", val_data=None)
    refused(ConfigError, r"model.num_tokens must lie in 1..64, got 65", run=changed(run, model={"num_tokens": 65}))
    refused(ConfigError, "multiple of the tokenizer's downsampling 4", run=changed(run, model={"image_size": 30}))
    refused(CheckpointError, "expected a tokenizer file, got a generator file", tokenizer=tmp_path / "generator")
    refused(CheckpointError, "none.safetensors", tokenizer=tmp_path / "none.safetensors")
    refused(ConfigError, "expected data.tokenizer, the model whose encoder is fine-tuned", tokenizer="")
    refused(ConfigError, "outside of", tokenizer=tmp_path / "tok", out=tmp_path / "tok", force=True)
    assert (tmp_path / "tok" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="expected a classifier file, got a tokenizer file"):
        train(run, tmp_path / "b", inputs, init=tmp_path / "tok")


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"model": {"num_tokens": -1}}, "model.num_tokens must be at least 0, got -1"),
        ({"model": {"drop_path": 1.0}}, "model.drop_path must lie in 0..1, below 1"),
        ({"model": {"features": "clas"}}, "model.features must be one of class, mean, class.mean, got 'clas'"),
        ({"loss": {"label_smoothing": 1.0}}, "loss.label_smoothing must lie in 0..1, below 1"),
        ({"loss": {"cutmix": -1.0}}, "loss.cutmix must be at least 0"),
        ({"loss": {"mix_share": 1.5}}, "loss.mix_share must lie in 0..1"),
        ({"optim": {"layer_decay": 0.0}}, "optim.layer_decay must lie in 0..1, above 0"),
        ({"data": {"rand_augment": -1}}, "data.rand_augment must be at least 0"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(run, parts, match, unchecked):
    with pytest.raises(ConfigError, match=match):
        changed(run, **parts)
