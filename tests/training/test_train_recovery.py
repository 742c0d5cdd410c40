"""Recovery is trained on cached tokens, and nothing else of the tokenizer moves."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from mergevq.data.cache_writer import write_token_cache
from mergevq.data.folder import ImageFolder
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError, TokenFileError
from mergevq.files import load_tensors, read_json
from mergevq.losses.recovery import recovery_loss
from mergevq.quantize import index_to_codes
from mergevq.tokenizer.config import RecoveryConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.recovery import SourceRecovery
from mergevq.training import recovery
from mergevq.training.config import HardwareConfig, OptimConfig
from mergevq.training.recovery import RecoveryStep, build_state, train_recovery, train_step
from mergevq.training.recovery_config import RecoveryDataConfig, RecoveryLoopConfig, RecoveryRun
from mergevq.training.recovery_inputs import RecoveryInputs, open_inputs, resolve
from mergevq.training.recovery_validation import validate
from mergevq.training.signals import TrainingStopped


def changed(run: RecoveryRun, **parts: dict) -> RecoveryRun:
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


@pytest.fixture
def tok(tiny_tokenizer: MergeVQ) -> MergeVQ:
    return tiny_tokenizer


@pytest.fixture
def bare(tok: MergeVQ) -> MergeVQ:
    """The same tokenizer, encoder and all, without a recovery."""
    model = MergeVQ(replace(tok.config, recovery=RecoveryConfig(enabled=False)))
    model.load_state_dict({k: v for k, v in tok.state_dict().items() if not k.startswith("recovery.")})
    return model.eval()


@pytest.fixture
def cache(tok: MergeVQ, image_folder: Path, tmp_path: Path) -> TokenCache:
    """Eight images at three K, of which the last merges nothing, in two views."""
    images = ImageFolder(image_folder).select(range(8))
    return write_token_cache(
        tok, images, tmp_path / "train", num_tokens=(10, 20, 64), views=("crop", "flip"), workers=0
    )


@pytest.fixture
def val_cache(tok: MergeVQ, image_folder: Path, tmp_path: Path) -> TokenCache:
    images = ImageFolder(image_folder).select(range(8, 13))
    return write_token_cache(tok, images, tmp_path / "val", num_tokens=(10, 20, 64), workers=0)


@pytest.fixture
def run() -> RecoveryRun:
    """Two micro-batches of two, saved every three of six steps."""
    return RecoveryRun(
        recovery=RecoveryConfig(width=32, heads=2, cross_depth=1, self_depth=1),
        optim=OptimConfig(
            lr=1e-2,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            clip_norm=1.0,
            ema_decay=0.5,
            warmup_steps=2,
            schedule="cosine",
        ),
        loop=RecoveryLoopConfig(steps=6, batch_size=2, accumulate=2, val_every=1000, save_every=3, log_every=1),
    )


@pytest.fixture
def inputs(tok: MergeVQ, cache: TokenCache, val_cache: TokenCache) -> RecoveryInputs:
    return RecoveryInputs(tok, cache, val_cache)


def train(run: RecoveryRun, out: Path, inputs: RecoveryInputs, **options) -> Path:
    return train_recovery(run, out, tokenizer=inputs.tok, cache=inputs.train, val_cache=inputs.val, **options)


def state_of(out: Path):
    record = read_json(out / "state" / "state.json")
    return {**record, "elapsed": 0}, load_tensors(out / "state" / record["tensors"])[0]


# ----------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("has_one", [True, False])
def test_the_rest_of_the_tokenizer_stays_as_it_is(has_one, tok, bare, cache, val_cache, run, tmp_path):
    given = tok if has_one else bare
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    config = given.config
    trained = MergeVQ.from_pretrained(train(run, tmp_path / "run", RecoveryInputs(given, cache, val_cache)))
    assert given.config is config and given.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())

    assert trained.fingerprint() == given.fingerprint()
    shape = tok.config.recovery if has_one else run.recovery
    assert trained.config == replace(given.config, recovery=shape)
    after = trained.state_dict()
    assert {name for name in after if not name.startswith("recovery.")} == {
        name for name in before if not name.startswith("recovery.")
    }
    same = {name: torch.equal(after[name], before[name]) for name in after if name in before}
    assert all(equal for name, equal in same.items() if not name.startswith("recovery."))
    assert not any(equal for name, equal in same.items() if name.startswith("recovery.")), "all of it was trained"

    tokens = cache.tokens([0, 3], 20)
    assert torch.equal(trained.decode(tokens), given.decode(tokens))
    trained.decode(tokens.without_source())


def test_a_run_leaves_a_log_pictures_and_its_configuration(inputs, run, tmp_path, capfd):
    run = changed(run, loop={"steps": 3, "val_every": 2, "log_every": 2})
    train(run, tmp_path / "run", inputs)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [(r["kind"], r["step"], r.get("num_tokens")) for r in records] == [
        ("train", 2, None),
        ("val", 2, 10),
        ("val", 2, 20),
        ("train", 3, None),
        ("val", 3, 10),
        ("val", 3, 20),
    ]
    assert {"recovery", "recovery_accuracy", "grad_norm", "lr", "images_per_second", "elapsed"} < records[0].keys()
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    # What was decided by the tokens and the tokenizer: K below L, and the shape that is there.
    assert config["loop"]["num_tokens"] == config["loop"]["val_num_tokens"] == [10, 20]
    assert config["recovery"]["width"] == 16
    pictures = sorted((tmp_path / "run" / "images").iterdir())
    assert [path.name for path in pictures] == ["step_0000002.png", "step_0000003.png"]
    with Image.open(pictures[0]) as picture:
        # Four images; at two K with both sources, and both maps of one K.
        assert picture.width / picture.height == pytest.approx(6 / 4, rel=0.1)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100
    assert "the recovery that the tokenizer has, trained further" in capfd.readouterr().err


def test_fine_tuning_begins_where_the_tokenizer_is_and_a_new_one_does_not(inputs, tok, run, tmp_path):
    still = changed(run, optim={"lr": 0.0})
    kept = MergeVQ.from_pretrained(train(still, tmp_path / "kept", inputs))
    assert all(torch.equal(kept.state_dict()[name], tensor) for name, tensor in tok.state_dict().items())
    new = MergeVQ.from_pretrained(train(replace(still, fine_tune=False), tmp_path / "new", inputs))
    assert new.config.recovery == run.recovery != tok.config.recovery
    # As it stands, it can be fine-tuned, or be what another run starts from.
    again = replace(still, fine_tune=False, data=RecoveryDataConfig(str(tmp_path / "new")))
    path = train_recovery(again, tmp_path / "again", cache=inputs.train, val_cache=inputs.val, init=tmp_path / "new")
    assert load_tensors(path)[0].keys() == load_tensors(tmp_path / "new" / "model.safetensors")[0].keys()
    again_weights = MergeVQ.from_pretrained(path).state_dict()
    assert all(torch.equal(tensor, again_weights[name]) for name, tensor in new.state_dict().items())


def test_a_memorisable_cache_is_memorised(bare, image_folder, run, tmp_path):
    images = ImageFolder(image_folder).select(range(4))
    cache = write_token_cache(bare, images, tmp_path / "four", num_tokens=10, workers=0)
    run = changed(
        run,
        loop={"steps": 100, "batch_size": 4, "accumulate": 1},
        optim={"ema_decay": 0.9, "schedule": "constant"},
    )
    train(run, tmp_path / "run", RecoveryInputs(bare, cache, cache))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    first, last = records[0], records[-1]
    assert (first["kind"], last["kind"]) == ("train", "val")
    assert last["recovery"] < 0.6 * first["recovery"]
    # Naming for each patch the token whose rank is right most often: the best without looking at the codes.
    tokens = cache.tokens(range(4), 10)
    right = tokens.index.T[..., None] == tokens.full_index()  # rank, image, patch
    majority = right.double().mean(1).max(0).values.mean().item()
    assert first["recovery_accuracy"] < majority < last["recovery_accuracy"] - 0.1


def test_a_new_recovery_tells_near_patches_from_far_ones(tok):
    queries = SourceRecovery(tok.config).queries.detach()[0]
    across, down = (
        torch.cosine_similarity(queries[:, 4, 4], queries[:, 4 + d, 4 + r], dim=0) for d, r in ((0, 1), (1, 0))
    )
    far = torch.cosine_similarity(queries[:, 4, 4], queries[:, 0, 7], dim=0)
    assert 0.99 > across > far + 0.1 and 0.99 > down > far + 0.1


# ------------------------------------------------------------------------------------------------------------- the step


def test_every_parameter_gets_a_gradient_and_the_weights_move_once(fabric, run, inputs, cache):
    run = resolve(replace(run, fine_tune=False), inputs)
    state = build_state(fabric, run, inputs)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    train_step(state, [cache.batch([0, 1], [10, 20]), cache.batch([2, 3], 20)], run)
    missing = [name for name, p in state.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    assert [name for name, tensor in state.model.state_dict().items() if torch.equal(tensor, before[name])] == []
    assert (state.step, int(state.ema.n_averaged)) == (1, 1)


def test_padding_and_company_change_nothing(tok, cache):
    """A batch of several K is the mean of its images, whatever the padding holds."""
    step = RecoveryStep(tok.recovery, cache.num_bits, cache.grid)
    rows, counts = [0, 4, 2, 7], [10, 20, 20, 10]
    apart = []
    for row, count in zip(rows, counts, strict=True):
        out = step(cache.batch([row], count))
        apart.append(torch.stack([out.loss, out.accuracy]))
    alone = torch.autograd.grad(torch.stack(apart).mean(0)[0], list(tok.recovery.parameters()))

    def together(batch: TokenBatch) -> None:
        out = step(batch)
        torch.testing.assert_close(torch.stack([out.loss, out.accuracy]), torch.stack(apart).mean(0))
        gradients = torch.autograd.grad(out.loss, list(tok.recovery.parameters()))
        torch.testing.assert_close(gradients, alone, rtol=1e-4, atol=1e-6)

    together(cache.batch(rows, counts))
    together(cache.batch(rows, counts, width=30))
    other = cache.batch(rows, counts)
    other["index"][0, 10:] = 5
    together(other)


def test_the_loss_is_the_cross_entropy_of_the_source(tok, cache):
    batch = cache.batch([0, 1, 2], 10)
    logits = tok.recovery(index_to_codes(batch["index"], cache.num_bits), batch["num_tokens"], cache.grid)
    # Without equal indices it is the plain one.
    distinct = torch.arange(10).expand(3, -1)
    expected = cross_entropy(logits.mT, batch["source"])
    torch.testing.assert_close(recovery_loss(logits, batch["source"], distinct).loss, expected)
    assert RecoveryStep(tok.recovery, cache.num_bits, cache.grid)(batch).loss <= expected


def test_two_halves_accumulated_are_one_batch(fabric, run, inputs, cache):
    run = resolve(run, inputs)
    states = [build_state(fabric, run, inputs) for _ in range(2)]
    whole = cache.batch([0, 1, 2, 3], [10, 20, 10, 20])
    halves = [cache.batch([0, 1], [10, 20]), cache.batch([2, 3], [10, 20])]
    values = [train_step(state, batch, run) for state, batch in zip(states, ([whole], halves), strict=True)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    # Gradients, because Adam makes whole steps of the rounding errors of those that are 0.
    for a, b in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_a_number_that_is_not_finite_stops_before_the_weights_change(fabric, run, inputs, cache):
    run = resolve(run, inputs)
    state = build_state(fabric, run, inputs)
    with torch.no_grad():
        state.model.to_key.weight[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    with pytest.raises(NonFiniteLossError, match="optimizer step 0"):
        train_step(state, [cache.batch([0, 1], 10)], run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.model.state_dict().items())
    assert state.step == 0


# ----------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(("batch_size", "images"), [(2, 1000), (5, 1000), (2, 3)])
def test_validation_is_what_recover_does(fabric, tok, val_cache, run, batch_size, images):
    loop = replace(run.loop, val_num_tokens=(20, 10), batch_size=batch_size, val_images=images)
    found = validate(fabric, tok.recovery, val_cache, loop)
    rows = [0, 1, 2, 3, 4] if images > 5 else [0, 1, 3]
    assert [record["num_tokens"] for record in found] == [20, 10]
    for record in found:
        tokens = val_cache.tokens(rows, record["num_tokens"])
        guess = tok.recover(tokens.without_source())
        expected = (guess.full_index() == tokens.full_index()).double().mean().item()
        assert record["recovery_accuracy"] == pytest.approx(expected)
        assert record["recovery"] > 0
    assert validate(fabric, tok.recovery, val_cache, loop, stop=lambda: True) is None


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def uninterrupted(inputs, run, tmp_path) -> Path:
    train(run, tmp_path / "whole", inputs)
    return tmp_path / "whole"


def assert_same(a: Path, b: Path) -> None:
    (record_a, tensors_a), (record_b, tensors_b) = state_of(a), state_of(b)
    assert record_a == record_b and tensors_a.keys() == tensors_b.keys()
    assert [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])] == []
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def watch(monkeypatch, step: int, action) -> None:
    """Does something in the n-th optimizer step."""
    left = [step]

    def watched(*arguments):
        left[0] -= 1
        if left[0] == 0:
            action()
        return train_step(*arguments)

    monkeypatch.setattr(recovery, "train_step", watched)


def test_a_run_killed_in_its_fifth_step_ends_with_the_same_bits(uninterrupted, inputs, run, tmp_path, monkeypatch):
    def die() -> None:
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        watch(patch, 5, die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(run, tmp_path / "run", inputs)
    assert state_of(tmp_path / "run")[0]["step"] == 3
    train(run, tmp_path / "run", inputs, resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_a_signal_saves_and_a_fine_tuned_run_goes_on(uninterrupted, inputs, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        watch(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(TrainingStopped, match="after step 2"):
            train(run, tmp_path / "run", inputs)
    assert MergeVQ.from_pretrained(tmp_path / "run").fingerprint() == inputs.tok.fingerprint()
    # The shape in the run's own options is not that of the recovery it trains, then as now.
    train(run, tmp_path / "run", inputs, resume=True)
    assert_same(uninterrupted, tmp_path / "run")


def test_resuming_with_another_configuration_or_other_images_is_refused(uninterrupted, inputs, run):
    with pytest.raises(ConfigError, match=r"optim.lr \(0.01 before, 0.1 now\)"):
        train(changed(run, optim={"lr": 0.1}), uninterrupted, inputs, resume=True)
    with pytest.raises(ConfigError, match=r"loop.num_tokens \(\[10, 20\] before, \[10\] now\)"):
        train(changed(run, loop={"num_tokens": (10,)}), uninterrupted, inputs, resume=True)
    with pytest.raises(DataError, match="8 images"):
        train(run, uninterrupted, inputs._replace(train=inputs.val), resume=True)


def test_two_processes_are_one_with_the_joined_batch(inputs, run, tmp_path):
    one = changed(run, loop={"batch_size": 4}, optim={"schedule": "constant"})
    two = changed(one, loop={"batch_size": 2})
    hardware = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")
    models = [
        MergeVQ.from_pretrained(train(run, tmp_path / name, inputs, hardware=hardware))
        for name, run, hardware in (("one", one, None), ("two", two, hardware))
    ]
    # What is predicted, because Adam makes whole steps of the rounding errors of gradients that are 0.
    batch = inputs.val.batch(range(5), 20)
    codes = index_to_codes(batch["index"], 6)
    predicted = [model.recovery(codes, batch["num_tokens"], (8, 8)).softmax(-1) for model in models]
    torch.testing.assert_close(predicted[0], predicted[1], rtol=0, atol=1e-3)
    before = inputs.tok.recovery(codes, batch["num_tokens"], (8, 8)).softmax(-1)
    assert (predicted[0] - before).abs().max() > 0.05
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["recovery"] == pytest.approx(b["recovery"], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_belong_together_is_refused_before_anything_is_written(
    tok, bare, inputs, cache, val_cache, image_folder, run, tmp_path
):
    images = ImageFolder(image_folder).select(range(3))
    full = write_token_cache(tok, images, tmp_path / "full", num_tokens=64, workers=0)
    with torch.no_grad():
        other = MergeVQ(tok.config)
    tok.save_pretrained(tmp_path / "tok")
    bare.save_pretrained(tmp_path / "bare")
    out = tmp_path / "out"

    def refused(error, match, run=run, **options):
        options = {"tokenizer": tok, "cache": cache, "val_cache": val_cache, **options}
        with pytest.raises(error, match=match) as caught:
            train_recovery(run, options.pop("out", out), **options)
        assert "\n" not in str(caught.value) and not out.exists()

    refused(TokenFileError, "expected tokens of tokenizer", tokenizer=other)
    refused(TokenFileError, "nowhere: expected a folder that `mergevq cache-tokens` wrote", cache=tmp_path / "nowhere")
    refused(ConfigError, r"full: expected tokens at a K below 64, got 64 only", cache=full)
    refused(ConfigError, r"full: expected tokens at a K below 64", val_cache=full)
    refused(ConfigError, r"loop.num_tokens must lie in 1..63, got 64", changed(run, loop={"num_tokens": (10, 64)}))
    refused(ConfigError, r"among 10, 20, 64, got 30", changed(run, loop={"val_num_tokens": (30,)}))
    refused(ConfigError, "expected data.tokenizer", run, tokenizer="")
    refused(ConfigError, "expected data.val_tokens", run, val_cache="")
    refused(CheckpointError, "none.safetensors", run, tokenizer=tmp_path / "none.safetensors")
    refused(ConfigError, r"multiple of 4 \* heads", changed(run, recovery={"width": 20, "heads": 2}), tokenizer=bare)
    refused(ConfigError, "outside of", run, tokenizer=tmp_path / "tok", out=tmp_path / "tok", force=True)
    assert (tmp_path / "tok" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="bare, it has none"):
        train(run, tmp_path / "b", inputs, init=tmp_path / "bare")
    with pytest.raises(ConfigError, match="of this run's shape"):
        train(replace(run, fine_tune=False), tmp_path / "c", inputs, init=tmp_path / "tok")


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ({"recovery": {"enabled": False}}, "recovery.enabled"),
        ({"loop": {"num_tokens": (0,)}}, "loop.num_tokens must be at least 1, got 0"),
        ({"loop": {"num_tokens_probs": (1.0,)}}, "expected loop.num_tokens with"),
        ({"loop": {"num_tokens": (10,), "num_tokens_probs": (0.5, 0.5)}}, "needs 1 entries"),
        ({"optim": {"ema_decay": 2.0}}, "optim.ema_decay must lie in 0..1"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(run, parts, match):
    with pytest.raises(ConfigError, match=match):
        changed(run, **parts)


def test_caches_and_tokenizer_are_found_by_the_names_in_the_run(tok, inputs, run, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    data = RecoveryDataConfig(str(tmp_path / "tok"), str(inputs.train.folder), str(inputs.val.folder))
    found = open_inputs(replace(run, data=data), tmp_path / "out")
    assert found.tok.fingerprint() == tok.fingerprint()
    assert (found.train.fingerprint, found.val.fingerprint) == (inputs.train.fingerprint, inputs.val.fingerprint)
