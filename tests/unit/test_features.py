"""Features of every kind against their definitions: before and after quantization, merged and unmerged."""

import itertools

import pytest
import torch

from mergevq.errors import ConfigError, ShapeError
from mergevq.quantize import index_to_codes
from mergevq.tokenizer.model import MergeVQ

KINDS = ("class", "mean", "class+mean", "patches")


def unmerged(tok: MergeVQ, images: torch.Tensor, num_tokens: int | None, quantized: bool = False) -> torch.Tensor:
    """One vector for each patch in raster order [B, L, C], from `encode` and the encoder alone."""
    tokens = tok.encode(images, 64 if num_tokens is None else num_tokens)
    assert tokens.source is not None
    if quantized:
        return tokens.source.unmerge(index_to_codes(tokens.index, tokens.num_bits))
    with torch.no_grad():
        out = tok.encoder(images, tok._schedule((8, 8), tokens.index.shape[1]))
    return torch.stack([rows[where] for rows, where in zip(out.tokens, tokens.source.index, strict=True)])


@pytest.mark.parametrize("num_tokens", [None, 64, 20, 3, 1])
@pytest.mark.parametrize("quantized", [False, True])
def test_each_kind_is_its_definition(
    tiny_tokenizer: MergeVQ, images: torch.Tensor, num_tokens: int | None, quantized: bool
) -> None:
    def features(kind: str) -> torch.Tensor:
        return tiny_tokenizer.features(images, num_tokens, kind=kind, quantized=quantized and kind != "class")

    patches = unmerged(tiny_tokenizer, images, num_tokens, quantized)
    width = 6 if quantized else 16
    grid = features("patches")
    assert grid.shape == (3, width, 8, 8)
    assert torch.equal(grid.flatten(2).mT, patches)
    # The mean weighted by size is the mean over patches, each as the token that it went into.
    torch.testing.assert_close(features("mean"), patches.mean(1))
    assert torch.equal(features("class+mean"), torch.cat([features("class"), features("mean")], 1))
    assert torch.equal(features("class"), tiny_tokenizer.features(images, num_tokens))


def test_sizes_weigh_the_mean(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    with torch.no_grad():
        out = tiny_tokenizer.encoder(images, tiny_tokenizer._schedule((8, 8), 5))
    plain, weighted = out.tokens.mean(1), tiny_tokenizer.features(images, 5, kind="mean")
    assert not torch.allclose(plain, weighted, atol=1e-3)
    with torch.no_grad():
        whole = tiny_tokenizer.encoder(images, (0, 0))
    torch.testing.assert_close(tiny_tokenizer.features(images, kind="mean"), whole.tokens.mean(1))


def test_patches_are_equal_within_a_token_and_differ_between_tokens(
    tiny_tokenizer: MergeVQ, images: torch.Tensor
) -> None:
    source = tiny_tokenizer.encode(images, 10).source
    assert source is not None
    rows = tiny_tokenizer.features(images, 10, kind="patches").flatten(2).mT
    for row, where in zip(rows, source.index, strict=True):
        same = where[:, None] == where
        assert torch.equal((row[:, None] == row).all(-1), same)


def test_quantized_patches_are_what_the_decoder_reads(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    for num_tokens in (None, 20):
        codes = tiny_tokenizer.features(images, num_tokens, kind="patches", quantized=True)
        assert set(codes.unique().tolist()) == {-1.0, 1.0}
        tokens = tiny_tokenizer.encode(images, num_tokens or 64)
        assert torch.equal(tiny_tokenizer.decoder(codes).detach(), tiny_tokenizer.decode(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_features_leave_no_trace_of_batch_or_autograd_mode(
    tiny_tokenizer: MergeVQ, images: torch.Tensor, kind: str
) -> None:
    together = tiny_tokenizer.features(images, 20, kind=kind)
    assert together.requires_grad
    alone = torch.cat([tiny_tokenizer.features(image[None], 20, kind=kind) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(tiny_tokenizer.features(images, 20, kind=kind), together)


@pytest.mark.parametrize(
    ("kind", "quantized"), [pair for pair in itertools.product(KINDS, (False, True)) if pair != ("class", True)]
)
def test_gradients_reach_what_features_are_made_of(
    tiny_tokenizer: MergeVQ, images: torch.Tensor, kind: str, quantized: bool
) -> None:
    features = tiny_tokenizer.features(images, 20, kind=kind, quantized=quantized)
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    (features * weights).sum().backward()
    reached = {name.split(".")[0] for name, p in tiny_tokenizer.encoder.named_parameters() if p.grad is not None}
    assert reached == {"class_token", "stem", "blocks"} | ({"norm_out", "code_out"} if quantized else set())
    assert all(p.grad is None for p in tiny_tokenizer.decoder.parameters())
    assert tiny_tokenizer.encoder.stem.conv_in.weight.grad.abs().sum() > 0


def test_other_shapes_of_images(tiny_tokenizer: MergeVQ) -> None:
    wide = torch.rand(2, 3, 16, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert tiny_tokenizer.features(wide, 7, kind="patches").shape == (2, 16, 4, 10)


@pytest.mark.usefixtures("unchecked")
def test_kinds_that_do_not_exist_are_refused(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"of kind class, mean, class\+mean, patches, got 'cls'"):
        tiny_tokenizer.features(images, kind="cls")
    with pytest.raises(ConfigError, match="class token is never quantized"):
        tiny_tokenizer.features(images, quantized=True)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_noticed(tiny_tokenizer: MergeVQ, images: torch.Tensor, kind: str) -> None:
    with torch.no_grad():
        tiny_tokenizer.encoder.blocks[1].norm2.bias[0] = torch.nan
    with pytest.raises(ShapeError, match="features, got NaN"):
        tiny_tokenizer.features(images, 20, kind=kind)
    if kind != "class":
        with pytest.raises(ShapeError, match="features, got NaN"):
            tiny_tokenizer.features(images, 20, kind=kind, quantized=True)
