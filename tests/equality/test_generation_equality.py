"""Sampling through a cache against a plain loop that runs the whole forward again for every token and bit group."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mergevq.generator.cache import FullCache, MergeCache
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.raster import MergeAR, feed_token, fill_prefix
from mergevq.quantize import join_index
from mergevq.sampling import SamplingOptions, draw, filter_logits, image_uniforms
from mergevq.tokens import MergedTokens

CONFIG = GeneratorConfig(
    grid=(3, 4), num_bits=4, groups=(1, 3), num_classes=4, num_tokens=7, width=16, depth=2, group_depth=1, heads=2,
    ffn_multiple=8,
)  # fmt: skip


def randomised(config: GeneratorConfig, scale: float = 0.2) -> MergeAR:
    """A model in evaluation mode whose every weight, heads too, is drawn at random."""
    torch.manual_seed(0)
    model = MergeAR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@torch.no_grad()
def plain_loop(model: MergeAR, class_number: int, num_tokens: int, seed: int, options: SamplingOptions) -> Tensor:
    """Samples one image, [1, L], with nothing remembered from one draw to the next."""
    config = model.config
    length, groups = config.num_patches, config.groups
    uniforms = image_uniforms(seed, length, len(groups))
    index = torch.zeros(1, length, dtype=torch.int64)
    classes, kept = torch.tensor([class_number, config.num_classes]), torch.tensor([num_tokens, num_tokens])
    for t in range(length):
        parts = torch.zeros(1, len(groups), dtype=torch.int64)
        for g, how in enumerate(options.per_group(len(groups))):
            index[:, t] = join_index(parts, groups)
            conditional, unconditional = model(index.repeat(2, 1), classes, kept)[g][:, t].split(1)
            scale = options.scales(len(groups), t / (length - 1))[g]
            logits = unconditional + scale * (conditional - unconditional)
            parts[:, g] = draw(filter_logits(logits, how.temperature, how.top_k, how.top_p), uniforms[t, g : g + 1])
        index[:, t] = join_index(parts, groups)
    return index


VARIANTS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "one recent": {"mask": MaskConfig(recent=1)},
    "last, proportional": {"mask": MaskConfig(recent=3, keep="last", proportional=True)},
    "first, proportional": {"mask": MaskConfig(recent=2, proportional=True)},
    "all recent": {"mask": MaskConfig(recent=40)},
    "plain causal": {"mask": MaskConfig(recent=None)},
    "one group, shared keys": {"groups": (4,), "kv_heads": 1},
    "three groups, released positions": {"groups": (1, 1, 2), "prefix_position": "zero", "instruction": False},
    "no blocks over groups": {"group_depth": 0},
}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 2.5, "temperature": 0.9},
    "filtered, group by group": {"guidance": (1.0, 3.0), "temperature": (1.2, 0.8), "top_k": (0, 3), "top_p": (0.9, 1)},
    "scheduled": {"guidance": 4.0, "schedule": "power_cosine", "power": 2.0, "top_p": 0.8},
}


@pytest.mark.parametrize(
    ("variant", "sampling"),
    [*((name, "guided") for name in VARIANTS), *(("last, proportional", name) for name in SAMPLINGS)],
)
def test_both_caches_give_the_tokens_of_the_plain_loop(variant: str, sampling: str) -> None:
    model = randomised(replace(CONFIG, **VARIANTS[variant]))
    options = SamplingOptions(**SAMPLINGS[sampling])
    classes, kept, seeds = [3, 0], [7, 12], [11, 12]
    expected = torch.cat([plain_loop(model, c, k, s, options) for c, k, s in zip(classes, kept, seeds, strict=True)])
    assert 3 < len(expected.unique()) < expected.numel() / 2  # Duplicates, and not only duplicates.
    for cache in ("full", "merge"):
        tokens = model.generate(
            classes, num_tokens=kept, seeds=seeds, cache=cache, chunk=2, guidance=options.guidance,
            guidance_schedule=options.schedule, guidance_power=options.power, temperature=options.temperature,
            top_k=options.top_k, top_p=options.top_p,
        )  # fmt: skip
        assert torch.equal(tokens.full_index(), expected)
        assert tokens.equal(MergedTokens.from_full_index(expected, CONFIG.grid, CONFIG.num_bits))


@torch.no_grad()
@pytest.mark.parametrize("kind", [FullCache, MergeCache])
def test_in_float32_the_logits_agree_to_five_digits(kind: type[FullCache] | type[MergeCache]) -> None:
    mask = MaskConfig(recent=2, keep="last", proportional=True)
    model = randomised(replace(CONFIG, width=64, depth=6, heads=4, mask=mask), scale=0.02)
    index = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(0))
    classes, kept = torch.tensor([0, 1, 2]), torch.tensor([3, 9, 12])
    cache = kind(model.config, 3, 1, chunk=4, device=torch.device("cpu"))
    hidden = [fill_prefix(model.transformer, cache.state, classes, kept)]
    for t in range(1, 12):
        if (t - 1) % 4 == 0:
            cache.make_room(t)
        hidden.append(feed_token(model.transformer, cache.state, kind.advance, torch.tensor([t]), index[:, t - 1]))
    logits = model.transformer.group_logits(torch.stack(hidden, 1), index)
    for got, want in zip(logits, model(index, classes, kept), strict=True):
        assert want.std() > 0.1 and (got - want).abs().max() < 1e-5
