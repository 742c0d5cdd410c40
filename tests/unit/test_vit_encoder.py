"""The plain ViT encoder of R."""

from dataclasses import replace

import pytest
import torch

from mergevq.tokenizer.config import EncoderConfig, TokenizerConfig
from mergevq.tokenizer.model import MergeVQ


@pytest.mark.parametrize("position", ["none", "sincos"])
def test_only_position_embeddings_tell_patches_apart(tiny_config: TokenizerConfig, position: str) -> None:
    encoder = EncoderConfig(kind="vit", patch_size=4, vit_width=16, depth=2, heads=2, position=position)
    torch.manual_seed(0)
    model = MergeVQ(replace(tiny_config, encoder=encoder)).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    swapped = images.clone()
    swapped[..., :4, :4], swapped[..., 8:12, 4:8] = images[..., 8:12, 4:8], images[..., :4, :4]
    with torch.no_grad():
        a = model.encoder(images, (0, 0)).tokens[0]
        b = model.encoder(swapped, (0, 0)).tokens[0]
    order = torch.arange(16)
    order[0], order[9] = 9, 0
    assert torch.allclose(a[order], b, atol=1e-5) == (position == "none")


def test_a_single_patch_works(tiny_config: TokenizerConfig) -> None:
    encoder = EncoderConfig(kind="vit", patch_size=4, vit_width=16, depth=2, heads=2, position="sincos")
    model = MergeVQ(replace(tiny_config, encoder=encoder)).eval()
    tokens = model.encode(torch.zeros(1, 3, 4, 4))
    assert tokens.index.shape == (1, 1)
    assert torch.isfinite(model.decode(tokens)).all()
