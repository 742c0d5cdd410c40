"""The factorised entropies against the definition: a softmax over the whole codebook, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mergevq.quantize import LFQ, codebook_entropy, index_to_codes, sample_entropy

CASES = [(n_bits, tau) for n_bits in (1, 2, 3, 5, 8, 11, 12) for tau in (0.01, 1.0)]


def assignment(z: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """softmax(2 z.c / tau) over all codes c, and its logarithm."""
    codes = index_to_codes(torch.arange(2 ** z.shape[-1]), z.shape[-1]).to(z.dtype)
    logits = 2 * z @ codes.T / tau
    return logits.softmax(-1), logits.log_softmax(-1)


def brute_sample(z: Tensor, tau: float) -> Tensor:
    p, log_p = assignment(z, tau)
    return -(p * log_p).sum(-1).mean()


def brute_codebook(z: Tensor, tau: float, weights: Tensor | None = None, eps: float = 0.0) -> Tensor:
    p, _ = assignment(z, tau)
    w = torch.ones(len(z), dtype=z.dtype) if weights is None else weights
    mean = (p * w[:, None]).sum(0) / w.sum()
    if eps == 0:
        mean = mean[mean > 0]
    return -(mean * (mean + eps).log()).sum()


def tokens(count: int, num_bits: int, tau: float, seed: int = 0) -> Tensor:
    """Tokens of which some bits are decided and others are not, at this temperature."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_bits, generator=rng, dtype=torch.float64) * (0.3 * tau)


def value_and_gradient(loss: Tensor, z: Tensor) -> tuple[float, Tensor]:
    (grad,) = torch.autograd.grad(loss, z)
    return loss.item(), grad


@pytest.mark.parametrize("num_bits, tau", CASES)
def test_sample_entropy_is_the_softmaxs(num_bits, tau):
    z = tokens(9, num_bits, tau).requires_grad_()
    value, grad = value_and_gradient(sample_entropy(z, tau), z)
    expected, expected_grad = value_and_gradient(brute_sample(z, tau), z)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10 / tau)


@pytest.mark.parametrize("num_bits, tau", CASES)
def test_codebook_entropy_is_the_softmaxs(num_bits, tau):
    z = tokens(9, num_bits, tau).requires_grad_()
    value, grad = value_and_gradient(codebook_entropy(z, tau), z)
    expected, expected_grad = value_and_gradient(brute_codebook(z, tau), z)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10 / tau)


def test_codebook_entropy_with_weights_and_eps():
    z = tokens(7, 6, 1.0).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0, 4.0, 1.0, 3.0], dtype=torch.float64).requires_grad_()
    for eps in (0.0, 1e-5, 1e-2):
        ours = codebook_entropy(z, 1.0, weights, eps=eps)
        brute = brute_codebook(z, 1.0, weights, eps)
        assert ours.item() == pytest.approx(brute.item(), rel=1e-12)
        for a, b in zip(torch.autograd.grad(ours, (z, weights)), torch.autograd.grad(brute, (z, weights)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_integer_weights_are_repeated_tokens():
    z = tokens(4, 5, 1.0)
    weights = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=torch.float64)
    repeated = z.repeat_interleave(weights.long(), 0)
    assert codebook_entropy(z, 1.0, weights).item() == pytest.approx(codebook_entropy(repeated, 1.0).item(), rel=1e-12)
    assert sample_entropy(z, 1.0, weights).item() == pytest.approx(sample_entropy(repeated, 1.0).item(), rel=1e-12)


def test_all_weights_equal_is_no_weights():
    z = tokens(6, 7, 1.0).reshape(2, 3, 7).float()
    quantizer = LFQ(7, temperature=1.0)
    for a, b in zip(quantizer(z)[2:], quantizer(z, torch.full((2, 3), 2.5))[2:], strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_is_the_sum_over_groups_and_an_upper_bound():
    rng = torch.Generator().manual_seed(3)
    half = torch.randn(40, 4, generator=rng, dtype=torch.float64)
    for z in (torch.cat([half, half], 1), torch.randn(40, 8, generator=rng, dtype=torch.float64)):
        grouped = codebook_entropy(z, 1.0, scope="grouped", groups=(3, 5))
        parts = brute_codebook(z[:, :3], 1.0) + brute_codebook(z[:, 3:], 1.0)
        assert grouped.item() == pytest.approx(parts.item(), rel=1e-12)
        assert grouped.item() > codebook_entropy(z, 1.0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_gradients_are_finite_where_probabilities_vanish(dtype, scale):
    z = (torch.randn(16, 18, generator=torch.Generator().manual_seed(0)) * scale).to(dtype).requires_grad_()
    assert (torch.sigmoid(-4 * z.detach().abs() / 0.01) == 0).any() or (dtype == torch.float64 and scale == 1.0)
    loss = sample_entropy(z, 0.01) - codebook_entropy(z, 0.01)
    loss.backward()
    assert z.grad is not None and z.grad.isfinite().all()
    # Sixteen different codes, all decided.
    assert loss.item() == pytest.approx(-math.log(16), abs=0.05)


def test_float32_agrees_with_float64():
    z = tokens(200, 18, 0.01).float().requires_grad_()
    z64 = z.detach().double().requires_grad_()
    for entropy in (sample_entropy, codebook_entropy):
        value, grad = value_and_gradient(entropy(z, 0.01), z)
        expected, expected_grad = value_and_gradient(entropy(z64, 0.01), z64)
        assert value == pytest.approx(expected, rel=1e-5)
        assert (grad - expected_grad).norm() < 5e-5 * expected_grad.norm()


def test_autocast_changes_nothing():
    z = tokens(64, 10, 0.01).float().reshape(4, 16, 10)
    quantizer = LFQ(10)
    plain = quantizer(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = quantizer(z)
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert quantizer(z.bfloat16()).sample_entropy.dtype == torch.float32
    assert quantizer(z.double()).codebook_entropy.dtype == torch.float64


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return out


@pytest.mark.parametrize("count", [64, 1024])
def test_nothing_is_as_large_as_tokens_times_codebook(count):
    z = torch.randn(1, count, 18, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with LargestTensor() as largest:
        out = LFQ(18)(z)
        (out.sample_entropy - out.codebook_entropy).backward()
    assert largest.numel == max(2**18, count * 2**9)
