"""What one optimizer step does: whose gradients, how often, on which K, and what happens to a NaN."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mergevq.errors import ConfigError, NonFiniteLossError
from mergevq.losses.adversarial import hinge_discriminator, vanilla_discriminator
from mergevq.training.config import LossWeights, TokenizerLoopConfig, TokenizerRun
from mergevq.training.precision import choose_dtype
from mergevq.training.state import TrainState, build_state
from mergevq.training.tokenizer import draw_num_tokens, train_step


@pytest.fixture
def state(fabric, tiny_run, perceptual, teacher) -> TrainState:
    return build_state(fabric, tiny_run, perceptual, teacher)


def changed(run: TokenizerRun, *, weights: dict | None = None, **parts: dict) -> TokenizerRun:
    """The run with some fields replaced."""
    if weights is not None:
        parts["loss"] = {**parts.get("loss", {}), "weights": replace(run.loss.weights, **weights)}
    return replace(run, **{name: replace(getattr(run, name), **fields) for name, fields in parts.items()})


def only(run: TokenizerRun, **weights: float) -> TokenizerRun:
    """The run with these loss weights and all others 0."""
    none = dict.fromkeys(LossWeights.__dataclass_fields__, 0.0)
    return changed(run, weights={**none, **weights})


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def join(batch: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: torch.cat([micro[name] for micro in batch]) for name in batch[0]}]


# ---------------------------------------------------------------------------------------------------------- gradients


def test_every_parameter_gets_a_gradient(state, batch, tiny_run):
    train_step(state, batch, tiny_run)
    modules = {"model": state.model, "discriminator": state.adversary.discriminator}
    without = [
        f"{part}.{name}"
        for part, module in modules.items()
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.any()
    ]
    assert without == []


def test_outside_networks_get_none_and_stay_in_eval_mode(state, batch, tiny_run, perceptual, teacher):
    state.autoencoder.train()
    train_step(state, batch, tiny_run)
    for network in (perceptual, teacher):
        assert all(p.grad is None for p in network.parameters())
        assert not any(module.training for module in network.modules())
    assert state.model.training


@pytest.mark.parametrize(("kind", "own"), [("hinge", hinge_discriminator), ("vanilla", vanilla_discriminator)])
def test_discriminator_gradients_come_from_its_own_loss_alone(fabric, tiny_run, perceptual, teacher, batch, kind, own):
    run = changed(tiny_run, optim={"clip_norm": 0.0}, loop={"num_tokens": (20,)})
    run = replace(run, loss=replace(run.loss, discriminator=kind))
    state, twin = (build_state(fabric, run, perceptual, teacher) for _ in range(2))
    train_step(state, batch, run)
    discriminator, lecam = twin.adversary.discriminator, twin.adversary.lecam
    for micro in batch:
        with torch.no_grad():
            drawn = twin.model(micro["image"], 20).reconstruction
        real, fake = discriminator(micro["image"]), discriminator(drawn)
        loss = own(real, fake) + run.loss.weights.lecam * lecam.penalty(real, fake)
        (loss / len(batch)).backward()
    for (name, p), q in zip(state.adversary.discriminator.named_parameters(), discriminator.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_two_half_batches_are_one_batch_for_losses_that_are_means(fabric, tiny_run, perceptual, teacher, batch):
    # The codebook entropy and the discriminator's BatchNorm are of the micro-batch.
    run = changed(tiny_run, weights={"entropy": 0.0, "adversarial": 0.0}, loop={"num_tokens": (20,)})
    halves, whole = (build_state(fabric, run, perceptual, teacher) for _ in range(2))
    for _ in range(2):
        a, b = train_step(halves, batch, run), train_step(whole, join(batch), run)
    for name in ("reconstruction", "perceptual", "commitment", "recovery", "alignment", "grad_norm"):
        assert a.values[name] == pytest.approx(b.values[name], rel=1e-4), name
    for (name, p), q in zip(halves.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5, rtol=1e-3), name


def test_recovery_moves_the_encoder_only_if_asked(fabric, tiny_run, batch):
    norms = {}
    for through in (True, False):
        run = changed(only(tiny_run, recovery=1.0), loss={"recovery_gradient": through})
        state = build_state(fabric, run)
        train_step(state, batch, run)
        norms[through] = sum(float(p.grad.norm()) for p in state.model.encoder.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.any() for p in state.model.recovery.parameters())
    assert norms[True] > 0
    assert norms[False] == 0


def test_labels_can_be_the_target(fabric, tiny_run, batch):
    run = changed(only(tiny_run, alignment=1.0), loss={"alignment": "labels"}, loop={"num_tokens": (20,)})
    labels = [torch.tensor([3, 9]), torch.tensor([0, 3])]
    labelled = [{**micro, "label": label} for micro, label in zip(batch, labels, strict=True)]
    state, twin = build_state(fabric, run), build_state(fabric, run)
    value = train_step(state, labelled, run).values["alignment"]
    outputs = [twin.model.forward_alignment(micro["view_student"], 20) for micro in batch]
    expected = nn.functional.cross_entropy(torch.cat(outputs), torch.cat(labels), label_smoothing=0.1)
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_one_step_do_not_reach_the_next(fabric, tiny_run, perceptual, teacher, batch):
    run = changed(
        tiny_run,
        weights={"lecam": 0.0},
        optim={"lr": 0.0, "disc_lr": 0.0, "clip_norm": 0.0},
        loop={"num_tokens": (20,)},
    )
    second, fresh = (build_state(fabric, run, perceptual, teacher) for _ in range(2))
    train_step(second, [{name: -t for name, t in batch[0].items()}] * 3, run)
    for state in (second, fresh):
        train_step(state, batch, run)
    for module, other in (
        (second.model, fresh.model),
        (second.adversary.discriminator, fresh.adversary.discriminator),
    ):
        for (name, p), q in zip(module.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name


def test_clipping_is_of_each_network(state, batch, tiny_run):
    run = changed(tiny_run, optim={"clip_norm": 1e-3})
    report = train_step(state, batch, run)
    for module, name in ((state.model, "grad_norm"), (state.adversary.discriminator, "disc_grad_norm")):
        assert report.values[name] > 1e-3
        clipped = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert float(clipped) == pytest.approx(1e-3, rel=1e-3)


# ------------------------------------------------------------------------------------------- once per optimizer step


def test_average_and_lecam_move_once_per_optimizer_step(state, batch, tiny_run):
    averaged, running = None, {"real": 0.0, "fake": 0.0}
    for step in range(1, 4):
        report = train_step(state, batch, tiny_run)
        assert int(state.ema.n_averaged) == state.step == step
        weights = copies(state.model)
        if averaged is None:
            averaged = weights
        else:
            averaged = {name: 0.5 * averaged[name] + 0.5 * weights[name] for name in weights}
        for name, tensor in state.ema.module.state_dict().items():
            assert torch.allclose(tensor, averaged[name], atol=1e-6), name
        for side in running:
            running[side] = 0.5 * running[side] + 0.5 * report.values[f"logits_{side}"]
            assert float(getattr(state.adversary.lecam, side)) == pytest.approx(running[side], abs=1e-6)


def test_processes_are_asked_for_their_means_once(state, batch, tiny_run, monkeypatch):
    asked = []
    all_reduce = state.fabric.all_reduce

    def counted(values: Tensor, **options: str) -> Tensor:
        asked.append((values.numel(), options))
        return all_reduce(values, **options)

    monkeypatch.setattr(state.fabric, "all_reduce", counted)
    report = train_step(state, batch, tiny_run)
    # Every loss, metric and gradient norm in one tensor, the logits that move LeCam's means among them.
    assert asked == [(len(report.values), {"reduce_op": "mean"})]
    assert {"logits_real", "logits_fake", "grad_norm", "disc_grad_norm"} < report.values.keys()


def test_learning_rates_follow_the_schedule(state, batch, tiny_run):
    seen = []
    for _ in range(6):
        before = copies(state.model)
        seen.append(train_step(state, batch, tiny_run).lr)
        assert {group["lr"] for group in state.optimizer.param_groups} == {seen[-1]}
        assert not same(before, copies(state.model))
    # Warm-up over two steps, then the cosine over six.
    assert seen[0] == pytest.approx(0.5e-3)
    assert seen[3] == pytest.approx(0.5e-3)
    assert seen[1] > seen[2] > seen[3] > seen[4] > seen[5] > 0


def test_time_moves_the_schedule_too(state, batch, tiny_run):
    run = changed(tiny_run, loop={"minutes": 1.0}, optim={"warmup_steps": 0})
    state.elapsed = 30.0
    assert train_step(state, batch, run).lr == pytest.approx(0.5e-3)


def test_discriminator_begins_at_its_step(fabric, tiny_run, perceptual, teacher, batch):
    run = changed(tiny_run, loss={"disc_start": 2})
    state = build_state(fabric, run, perceptual, teacher)
    before = copies(state.adversary.discriminator)
    for _ in range(2):
        assert not {"adversarial", "discriminator", "lecam"} & train_step(state, batch, run).values.keys()
    assert same(before, copies(state.adversary.discriminator))
    assert {"adversarial", "discriminator", "lecam"} < train_step(state, batch, run).values.keys()
    assert not same(before, copies(state.adversary.discriminator))


def test_a_module_exists_only_if_its_loss_is_on(fabric, tiny_run, batch):
    run = only(tiny_run, reconstruction=1.0)
    state = build_state(fabric, run)
    assert state.adversary is state.model.recovery is state.model.alignment is None
    images = [{"image": micro["image"]} for micro in batch]
    values = train_step(state, images, run).values
    assert values.keys() == {"reconstruction", "sample_entropy", "codebook_entropy", "grad_norm"}


def test_k_is_drawn_with_its_probabilities():
    loop = TokenizerLoopConfig(num_tokens=(10, 20, 30), num_tokens_probs=(0.5, 0.0, 1.5))
    rng = torch.Generator().manual_seed(0)
    drawn = [draw_num_tokens(rng, loop) for _ in range(2000)]
    assert drawn.count(20) == 0
    assert drawn.count(10) == pytest.approx(500, abs=80)
    again = torch.Generator().manual_seed(0)
    assert drawn[:50] == [draw_num_tokens(again, loop) for _ in range(50)]
    assert len(set(drawn[:10])) > 1


def test_k_is_one_for_all_micro_batches(state, batch, tiny_run, monkeypatch):
    seen = []
    forward = state.model.forward
    monkeypatch.setattr(state.model, "forward", lambda x, k, *a: (seen.append(k), forward(x, k, *a))[1])
    reports = [train_step(state, batch, tiny_run).num_tokens for _ in range(4)]
    assert seen == [k for k in reports for _ in batch]


# --------------------------------------------------------------------------------------------------------- not finite


class Breaks(nn.Module):
    """A perceptual loss that turns NaN, in its value or only in its gradient."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        if self.where == "value":
            return reconstruction.mean() * torch.nan
        return (reconstruction - reconstruction.detach()).square().sum().sqrt()


@pytest.mark.parametrize(("where", "named"), [("value", "perceptual = nan"), ("gradient", "grad_norm = nan")])
def test_nan_stops_before_anything_changes_and_is_named(fabric, tiny_run, teacher, batch, where, named):
    state = build_state(fabric, tiny_run, Breaks(where), teacher)
    modules = (state.model, state.ema, state.adversary.lecam)
    before = [copies(module) for module in modules]
    weights = [p.detach().clone() for p in state.adversary.discriminator.parameters()]
    with pytest.raises(NonFiniteLossError, match=rf"step 0 \(K = \d+\), got .*{named}") as raised:
        train_step(state, batch, tiny_run)
    assert "\n" not in str(raised.value)
    assert "reconstruction" not in str(raised.value)
    assert all(same(old, copies(module)) for old, module in zip(before, modules, strict=True))
    assert all(torch.equal(old, p) for old, p in zip(weights, state.adversary.discriminator.parameters(), strict=True))
    assert not state.optimizer.state and not state.adversary.optimizer.state and state.step == 0


# ----------------------------------------------------------------------------------------------------------- arithmetic


def test_bf16_leaves_weights_losses_and_images_in_float32(fabric, tiny_run, perceptual, teacher, batch, monkeypatch):
    monkeypatch.setattr("mergevq.training.precision.has_fast_bf16", lambda: True)
    run = changed(tiny_run, loop={"precision": "bf16"})
    state = build_state(fabric, run, perceptual, teacher)
    seen = {}
    state.model.decoder.register_forward_hook(lambda m, args, out: seen.update(codes=args[0].dtype))
    last = [module for module in state.model.decoder.modules() if isinstance(module, nn.Conv2d)][-1]
    last.register_forward_hook(lambda m, args, out: seen.update(drawn=out.dtype))
    perceptual.register_forward_hook(lambda m, args, out: seen.update(images=args[1]))
    values = train_step(state, batch, run).values
    assert seen["codes"] == torch.float32
    assert seen["drawn"] == torch.bfloat16
    assert torch.equal(seen["images"], batch[-1]["image"])
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    exact = train_step(build_state(fabric, tiny_run, perceptual, teacher), batch, tiny_run)
    for name in ("reconstruction", "perceptual", "alignment", "recovery", "discriminator"):
        assert values[name] != exact.values[name]
        assert values[name] == pytest.approx(exact.values[name], rel=0.1), name


def test_bf16_without_the_hardware_is_float32_with_one_notice(monkeypatch):
    monkeypatch.setattr("mergevq.training.precision.has_fast_bf16", lambda: False)
    dtype, notice = choose_dtype("bf16", torch.device("cpu"))
    assert dtype == torch.float32
    assert "float32" in notice and "\n" not in notice
    assert choose_dtype("float32", torch.device("cpu")) == (torch.float32, "")


def test_fp16_is_refused_with_the_reason(tiny_run, unchecked):
    for attempt in (
        lambda: choose_dtype("fp16", torch.device("cpu")),
        lambda: changed(tiny_run, loop={"precision": "fp16"}),
    ):
        with pytest.raises(ConfigError, match=r"bf16.*'fp16'.*scaler") as raised:
            attempt()
        assert "\n" not in str(raised.value)


def test_channels_last_changes_the_memory_order_and_not_the_result(fabric, tiny_run, perceptual, teacher, batch):
    run = changed(tiny_run, loop={"channels_last": True})
    plain, last = (build_state(fabric, r, perceptual, teacher) for r in (tiny_run, run))
    a, b = train_step(plain, batch, tiny_run), train_step(last, batch, run)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in last.model.parameters())
    assert a.values == pytest.approx(b.values, rel=1e-3, abs=1e-5)
