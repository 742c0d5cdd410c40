import pytest
import torch

from mergevq.errors import ConfigError
from mergevq.quantize import (
    LFQ,
    bits_to_index,
    codebook_entropy,
    codes_to_index,
    index_to_bits,
    index_to_codes,
    join_index,
    sign_codes,
    split_index,
)


@pytest.mark.parametrize("num_bits", range(1, 13))
def test_index_to_codes_and_back_for_every_index(num_bits):
    index = torch.arange(2**num_bits)
    codes = index_to_codes(index, num_bits)
    assert codes.abs().eq(1).all() and len(codes.unique(dim=0)) == 2**num_bits
    assert torch.equal(codes_to_index(codes), index)
    assert torch.equal(bits_to_index(index_to_bits(index, num_bits)), index)


def test_channel_0_is_bit_0():
    assert index_to_bits(torch.tensor([6]), 4).tolist() == [[0, 1, 1, 0]]
    assert codes_to_index(torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])).tolist() == [1, 4]
    assert split_index(torch.tensor([0b110_01]), (2, 3)).tolist() == [[0b01, 0b110]]


@pytest.mark.parametrize("groups", [(10,), (4, 6), (1, 2, 3, 4)])
def test_bit_groups_agree_with_the_whole(groups):
    index = torch.arange(2**10).reshape(2, -1)
    parts = split_index(index, groups)
    assert torch.equal(join_index(parts, groups), index)
    bits = torch.cat([index_to_bits(parts[..., g], size) for g, size in enumerate(groups)], -1)
    assert torch.equal(bits, index_to_bits(index, 10))


def test_codes_are_exact_and_straight_through():
    z = (torch.randn(2, 5, 18, generator=torch.Generator().manual_seed(0)) * 3.7).requires_grad_()
    out = LFQ(18)(z)
    assert out.codes.abs().eq(1).all()
    assert torch.equal(out.codes > 0, z > 0)
    assert torch.equal(index_to_codes(out.index, 18), out.codes)
    cotangent = torch.randn(2, 5, 18, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(out.codes, z, cotangent)
    assert torch.equal(grad, cotangent)


def test_zero_is_minus_one():
    assert sign_codes(torch.tensor([0.0, -0.0, 1e-30, -1e-30])).tolist() == [-1.0, -1.0, 1.0, -1.0]


def test_layer_norm_before_the_sign():
    z = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2 + 5
    quantizer = LFQ(8, norm="layer", temperature=1.0)
    normalized = quantizer.normalize(z)
    centred = z - z.mean(-1, keepdim=True)
    torch.testing.assert_close(normalized, centred / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())
    out, plain = quantizer(z), LFQ(8, temperature=1.0)(normalized)
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))
    # Without it all these bits would be set.
    assert 0.2 < out.codes.gt(0).float().mean() < 0.8
    assert not list(quantizer.parameters()) and not quantizer.state_dict()


def test_commitment_is_the_squared_distance_to_the_codes():
    z = torch.tensor([[[0.5, -2.0], [-1.0, 0.0]]]).requires_grad_()
    out = LFQ(2)(z)
    assert out.commitment.item() == pytest.approx((0.25 + 1 + 0 + 1) / 4)
    (grad,) = torch.autograd.grad(out.commitment, z)
    torch.testing.assert_close(grad, torch.tensor([[[-0.25, -0.5], [0.0, 0.5]]]))


def test_weight_zero_leaves_a_token_out_of_every_loss():
    z = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    quantizer = LFQ(6, temperature=1.0)
    weighted = quantizer(z, torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]))
    for a, b in zip(weighted[2:], quantizer(z[:, :3])[2:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_bits": 0}, "num_bits must be at least 1, got 0"),
        ({"norm": "batch"}, "norm must be one of none, layer, got 'batch'"),
        ({"scope": "all"}, "scope must be one of global, local, grouped, got 'all'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"scope": "grouped", "num_bits": 12}, r"add up to num_bits 12, got \(9, 9\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        LFQ(**options)


def test_groups_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"add up to the 8 bits of a token, got \(4, 5\)"):
        codebook_entropy(torch.zeros(3, 8), 1.0, scope="grouped", groups=(4, 5))


@pytest.mark.compile
@pytest.mark.parametrize("options", [{}, {"norm": "layer", "scope": "grouped", "groups": (5, 4)}])
def test_compiles_in_one_graph(options):
    quantizer = LFQ(9, temperature=1.0, **options)
    z = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    compiled = torch.compile(quantizer, fullgraph=True)

    def run(module):
        out = module(z)
        loss = out.codes.sum() + out.sample_entropy - out.codebook_entropy + out.commitment
        return (*out, *torch.autograd.grad(loss, z))

    for a, b in zip(run(compiled), run(quantizer), strict=True):
        torch.testing.assert_close(a, b)
