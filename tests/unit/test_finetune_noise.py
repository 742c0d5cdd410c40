"""What fine-tuning draws: the laws it says, from the generator it is given."""

import pytest
import torch

from mergevq.training.finetune_config import FinetuneLossConfig
from mergevq.training.finetune_noise import draw_branch_scales, drop_path_rates, mix


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rates_are_linear_in_depth():
    assert drop_path_rates(0.3, 4) == pytest.approx((0.0, 0.1, 0.2, 0.3))
    assert drop_path_rates(0.3, 1) == (0.0,)


def test_branches_are_left_out_at_their_rate_and_the_mean_is_kept():
    rates = (0.0, 0.25, 0.5)
    scales = draw_branch_scales(rates, 20_000, rng())
    assert scales.shape == (20_000, 3, 2)
    for block, rate in enumerate(rates):
        values = scales[:, block]
        kept = 1 / (1 - rate)
        assert sorted(values.unique().tolist()) == pytest.approx([*([0.0] if rate else []), kept])
        # Five standard deviations of the mean.
        tolerance = 5 * kept * (rate * (1 - rate) / 20_000) ** 0.5 + 1e-6
        torch.testing.assert_close(values.mean(0), torch.ones(2), rtol=0, atol=tolerance)
    # Attention and MLP are drawn apart.
    both = (scales[:, 2] == 0).all(1).double().mean().item()
    assert both == pytest.approx(0.25, abs=0.02)
    assert torch.equal(draw_branch_scales(rates, 20_000, rng()), scales)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images, each of one value that no other has, and their classes."""
    values = torch.tensor([-0.9, -0.4, 0.3, 0.8])
    return values[:, None, None, None].expand(4, 3, 16, 16).clone(), torch.tensor([2, 0, 1, 2])


def test_nothing_is_mixed_unless_asked(batch):
    images, labels = batch
    for loss in (FinetuneLossConfig(), FinetuneLossConfig(mixup=0.8, cutmix=1.0, mix_share=0.0)):
        found, targets = mix(images, labels, 3, loss, rng())
        assert torch.equal(found, images)
        assert targets.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_targets_are_the_shares_of_the_images(batch, mixup, cutmix, seed):
    images, labels = batch
    before = images.clone()
    found, targets = mix(images, labels, 3, FinetuneLossConfig(mixup=mixup, cutmix=cutmix), rng(seed))
    assert torch.equal(images, before)
    # Image i with its neighbour i - 1: the mean tells how much of each is in it.
    mean, own, other = found.mean((1, 2, 3)), before[:, 0, 0, 0], before[:, 0, 0, 0].roll(1)
    share = (mean - other) / (own - other)
    torch.testing.assert_close(share, share[:1].expand(4), rtol=0, atol=1e-5)
    assert 0 <= share[0] <= 1
    expected = torch.zeros(4, 3)
    for i in range(4):
        expected[i, labels[i]] += share[0]
        expected[i, labels[i - 1]] += 1 - share[0]
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-5)
    blended = (found - found[:, :, :1, :1]).abs().max() < 1e-6
    assert blended if mixup else set(found[1].unique().tolist()) <= set(before.unique().tolist())


def test_both_share_the_mixed_batches_and_the_global_state_is_left_alone(batch):
    images, labels = batch
    before = torch.get_rng_state()
    loss = FinetuneLossConfig(mixup=1.0, cutmix=1.0, mix_share=0.6)
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for seed in range(200):
        found, _ = mix(images, labels, 3, loss, rng(seed))
        if torch.equal(found, images):
            kinds["none"] += 1
        elif (found - found[:, :, :1, :1]).abs().max() < 1e-6:
            kinds["mixup"] += 1
        else:
            kinds["cutmix"] += 1
    # A box of cutmix may be empty or everything, which looks like the others.
    assert 60 <= kinds["none"] <= 110 and 40 <= kinds["mixup"] <= 80 and 40 <= kinds["cutmix"] <= 80
    assert torch.equal(torch.get_rng_state(), before)
    first, again = (mix(images, labels, 3, loss, rng(3)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
