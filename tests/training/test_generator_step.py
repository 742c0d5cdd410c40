"""One optimizer step of a generator: what is minimised, what moves, and what the noise depends on."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import NonFiniteLossError
from mergevq.generator.config import MaskConfig
from mergevq.quantize import split_index
from mergevq.training.generator import train_step
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import GeneratorStep, build_generator, draw_noise, predict, real_tokens
from mergevq.training.generator_state import GeneratorState, build_state


def quiet(run: GeneratorRun, **fields: object) -> GeneratorRun:
    """The run without any noise but the random orders."""
    return replace(run, model=replace(run.model, token_dropout=0.0, dropout=0.0, class_dropout=0.0, **fields))


@pytest.fixture
def tokens(caches) -> TokenBatch:
    """Four images at different K, one without a class."""
    batch = TokenCache(caches.train).batch([0, 3, 5, 8], [20, 40, 10, 20], ["crop", "flip", "crop", "flip"])
    batch["label"][1] = -1
    return batch


def part(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Some of the samples, padded no further than they need."""
    cut = {name: tensor[start:stop] for name, tensor in batch.items()}
    return {**cut, "index": cut["index"][:, : int(cut["num_tokens"].max())]}


def weights_of(state: GeneratorState) -> dict[str, Tensor]:
    return {
        **{f"model.{name}": t.clone() for name, t in state.model.state_dict().items()},
        **{f"ema.{name}": t.clone() for name, t in state.ema.state_dict().items()},
    }


def stirred(model: nn.Module) -> nn.Module:
    """The model with every parameter moved: new heads are 0, and every guess would be even."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def smoothed_loss(logits: Sequence[Tensor], index: Tensor, run: GeneratorRun) -> Tensor:
    """Torch's cross-entropy summed over the groups, one number a token."""
    parts = split_index(index, run.model.groups).unbind(-1)
    smoothing = run.loss.label_smoothing
    losses = [
        cross_entropy(values.flatten(0, -2), target.flatten(), reduction="none", label_smoothing=smoothing)
        for values, target in zip(logits, parts, strict=True)
    ]
    return torch.stack(losses).sum(0).view(index.shape)


def test_the_loss_of_raster_order_is_the_mean_cross_entropy_of_every_patch(generator_run, tokens):
    run = quiet(generator_run)
    model = stirred(build_generator(run.model)).train()
    full = tokens["index"].gather(1, tokens["source"])
    classes = torch.tensor([0, 1, run.model.num_classes, 0])
    expected = smoothed_loss(model(full, classes, tokens["num_tokens"]), full, run).mean()
    terms = GeneratorStep(model, 0.1)(tokens, classes, None, torch.tensor(float(full.numel())))
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    even = smoothed_loss(
        [torch.zeros(*full.shape, 8)] * 2, full, replace(run, loss=replace(run.loss, label_smoothing=0.0))
    )
    assert terms["loss"].item() != pytest.approx(even.mean().item(), abs=1e-3)
    assert set(terms) == {"loss", "group_0", "group_1"}


def test_the_loss_of_random_order_counts_each_kept_token_once_and_no_padding(generator_run, tokens):
    run = quiet(generator_run, order="random")
    model = stirred(build_generator(run.model)).train()
    classes, order = draw_noise(tokens, run.model, 5, 0)
    total = 0.0
    for i, count in enumerate(tokens["num_tokens"].tolist()):
        one = part(tokens, i, i + 1)
        logits = model(one["index"], classes[i : i + 1], one["num_tokens"], order[i : i + 1, :count])
        total += smoothed_loss(logits, one["index"], run).sum().item()
    number = tokens["num_tokens"].sum().float()
    terms = GeneratorStep(model, 0.1)(tokens, classes, order, number)
    assert terms["loss"].item() == pytest.approx(total / number.item(), rel=1e-4)


def test_groups_tell_the_cross_entropy_without_smoothing(either_run, tokens):
    run = quiet(either_run)
    model = stirred(build_generator(run.model)).train()
    classes, order = draw_noise(tokens, run.model, 5, 0)
    rough, sharp = (
        GeneratorStep(model, smoothing)(tokens, classes, order, torch.tensor(50.0)) for smoothing in (0.1, 0.0)
    )
    assert rough["group_0"] + rough["group_1"] == pytest.approx(sharp["loss"].item(), rel=1e-5)
    assert rough["loss"].item() != pytest.approx(sharp["loss"].item(), rel=1e-4)


def test_duplicates_by_source_are_for_training_only(generator_run, tokens):
    config = replace(quiet(generator_run).model, mask=MaskConfig(recent=1, duplicate="source"))
    model = stirred(build_generator(config)).train()
    full, classes = tokens["index"].gather(1, tokens["source"]), torch.zeros(4, dtype=torch.int64)
    by_source = model(full, classes, tokens["num_tokens"], tokens["source"])
    by_index = model(full, classes, tokens["num_tokens"])
    assert not torch.equal(by_source[0], by_index[0])
    assert torch.equal(predict(model, tokens, classes, None)[0][0], by_source[0])
    assert torch.equal(predict(model.eval(), tokens, classes, None)[0][0], by_index[0])


def test_two_half_batches_accumulated_are_one_batch(either_run, tokens, fabric):
    """Also with unequal numbers of kept tokens, with dropped classes, and with random orders."""
    run = quiet(either_run)
    run = replace(run, model=replace(run.model, class_dropout=0.5))
    after = []
    for batch in ([tokens], [part(tokens, 0, 2), part(tokens, 2, 4)]):
        state = build_state(fabric, run)
        for _ in range(2):
            report = train_step(state, batch, run)
        after.append((report.values, weights_of(state)))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-4)
    for name, tensor in after[0][1].items():
        assert torch.allclose(tensor, after[1][1][name], atol=1e-5), name


def test_every_parameter_has_a_gradient(either_run, tokens, fabric):
    state = build_state(fabric, either_run)
    train_step(state, [tokens], either_run)  # The heads begin at 0, and let no gradient through.
    train_step(state, [tokens], either_run)
    still = [name for name, p in state.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_the_average_moves_once_a_step_and_follows_its_formula(generator_run, tokens, fabric):
    run = replace(generator_run, optim=replace(generator_run.optim, ema_decay=0.75))
    state = build_state(fabric, run)
    average = None
    for _ in range(3):
        train_step(state, [part(tokens, 0, 2), part(tokens, 2, 4)], run)
        now = state.model.transformer.class_embedding.weight.detach().clone()
        average = now if average is None else 0.75 * average + 0.25 * now
    assert int(state.ema.n_averaged) == 3
    assert torch.allclose(state.ema.module.transformer.class_embedding.weight, average, atol=1e-6)


def test_only_matrices_of_linear_layers_decay(either_run, fabric):
    state = build_state(fabric, either_run)
    decaying = {id(p) for group in state.optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    linear = {id(module.weight) for module in state.model.modules() if isinstance(module, nn.Linear)}
    assert decaying == linear
    everything = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert everything == {id(p) for p in state.model.parameters()}
    spared = [name for name, p in state.model.named_parameters() if id(p) not in decaying]
    assert {name.split(".")[-2] for name in spared if "norm" not in name} >= {
        "0",
        "1",
        "class_embedding",
        "instruction",
    }


def test_dropped_classes_are_about_the_share_and_unknown_ones_always(generator_run, caches):
    batch = TokenCache(caches.train).batch([0] * 1000, 10)
    config = replace(generator_run.model, class_dropout=0.1)
    classes, order = draw_noise(batch, config, 0, 0)
    assert order is None
    dropped = (classes == config.num_classes).float().mean().item()
    assert 0.07 < dropped < 0.13
    assert (classes[classes < config.num_classes] == batch["label"][0]).all()
    batch["label"] = batch["label"] - 10_000  # As images without a class have a negative label.
    assert (draw_noise(batch, config, 0, 0)[0] == config.num_classes).all()


def test_noise_depends_on_the_seed_and_the_place_in_the_step_alone(generator_run, tokens):
    config = replace(generator_run.model, order="random", class_dropout=0.5)
    classes, order = draw_noise(tokens, config, 7, 0)
    state = torch.get_rng_state()
    halves = [draw_noise(part(tokens, 2 * i, 2 * i + 2), config, 7, i) for i in range(2)]
    assert torch.equal(torch.cat([half[0] for half in halves]), classes)
    for i, half in enumerate(halves):
        for j in range(2):
            count = int(tokens["num_tokens"][2 * i + j])
            assert torch.equal(half[1][j, :count], order[2 * i + j, :count])
    assert not torch.equal(draw_noise(tokens, config, 8, 0)[1], order)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_order_is_a_permutation_with_the_padding_last(generator_run, tokens):
    config = replace(generator_run.model, order="random")
    orders = [draw_noise(tokens, config, seed, 0)[1] for seed in range(200)]
    for order in orders[:20]:
        for row, count in zip(order, tokens["num_tokens"].tolist(), strict=True):
            assert sorted(row[:count].tolist()) == list(range(count))
            assert row[count:].tolist() == list(range(count, len(row)))
    begun = torch.stack([order[2, 0] for order in orders])
    assert set(begun.tolist()) == set(range(10)), "every rank comes first at times"
    assert real_tokens(tokens).sum(1).tolist() == [20, 40, 10, 20]


def test_a_step_gives_the_global_random_state_back_and_repeats_itself(generator_run, tokens, fabric):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    reports = []
    for _ in range(2):
        state = build_state(fabric, generator_run)
        reports.append([train_step(state, [tokens], generator_run) for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert reports[0] == reports[1]
    assert reports[0][0].values["loss"] != reports[0][1].values["loss"]


def test_dropout_differs_from_step_to_step(generator_run, tokens, fabric):
    run = replace(generator_run, optim=replace(generator_run.optim, lr=0.0))
    state = build_state(fabric, run)
    stirred(state.model)
    losses = [train_step(state, [tokens], run).values["loss"] for _ in range(3)]
    assert len(set(losses)) == 3


def test_a_number_that_is_not_finite_changes_nothing(generator_run, tokens, fabric):
    state = build_state(fabric, generator_run)
    with torch.no_grad():
        state.model.transformer.norm.weight[0] = torch.nan
    before = weights_of(state)
    with pytest.raises(NonFiniteLossError, match=r"optimizer step 0, got loss = nan") as raised:
        train_step(state, [tokens], generator_run)
    assert "\n" not in str(raised.value)
    after = weights_of(state)
    assert all(torch.equal(t.nan_to_num(9), after[name].nan_to_num(9)) for name, t in before.items())
    assert state.step == 0


@pytest.mark.gpu
def test_a_bf16_step_on_a_gpu_is_near_the_float32_step(generator_run, tokens):
    values = []
    for precision in ("float32", "bf16"):
        run = replace(quiet(generator_run), loop=replace(generator_run.loop, precision=precision))
        fabric = Fabric(accelerator="cuda", devices=1)
        state = build_state(fabric, run)
        stirred(state.model)
        batch = {name: fabric.to_device(tensor) for name, tensor in tokens.items()}
        values.append(train_step(state, [batch], run).values)
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=2e-2)
