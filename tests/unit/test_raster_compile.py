"""The steps of both generators as one graph: traced whole, seldom again, and with the same tokens."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from mergevq.generator.cache import FullCache, MergeCache
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.generate import many_graphs
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR, fill_prefix

pytestmark = pytest.mark.compile

CONFIG = GeneratorConfig(
    grid=(4, 6), num_bits=4, groups=(2, 2), num_classes=3, num_tokens=6, width=16, depth=2, group_depth=1, heads=2,
    ffn_multiple=8,
)  # fmt: skip


def randomised(config: GeneratorConfig, seed: int = 0) -> MergeAR | RandomAR:
    torch.manual_seed(seed)
    model = (MergeAR if config.order == "raster" else RandomAR)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Lets torch.compile collect the graphs that it traces, and run them as they are."""
    found: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=collect))
    return found


@pytest.mark.parametrize(
    ("cache", "mask"),
    [
        ("merge", MaskConfig()),
        ("merge", MaskConfig(keep="last", proportional=True)),
        ("full", MaskConfig(proportional=True)),
        ("full", MaskConfig(recent=None)),
    ],
)
def test_a_step_is_one_graph_and_growing_does_not_multiply_them(
    graphs: list[torch.fx.GraphModule], cache: Any, mask: MaskConfig
) -> None:
    model = randomised(replace(CONFIG, mask=mask))
    options = {"seeds": [1, 2], "cache": cache, "chunk": 2, "guidance": 2.0, "guidance_schedule": "linear"}
    options |= {"top_k": (0, 3), "top_p": 0.95}
    expected = model.generate([0, 2], **options)
    assert not graphs
    assert model.generate([0, 2], compile=True, **options).equal(expected)
    # One for the first capacity, one for any other.
    assert len(graphs) == 2
    model.generate([1, 1], compile=True, **options | {"seeds": [3, 4]})
    assert len(graphs) == 2


@pytest.mark.parametrize("kind", [MergeCache, FullCache])
def test_filling_the_prefix_compiles_as_one_graph(
    graphs: list[torch.fx.GraphModule], kind: type[MergeCache] | type[FullCache]
) -> None:
    model = randomised(replace(CONFIG, depth=1))
    fill = torch.compile(fill_prefix, fullgraph=True)
    for images in (2, 3):
        states = [kind(model.config, images, 1, chunk=2, device=torch.device("cpu")).state for _ in range(2)]
        request = torch.arange(images), torch.full((images,), 6)
        with torch.no_grad():
            expected = fill_prefix(model.transformer, states[0], *request)
            torch.testing.assert_close(fill(model.transformer, states[1], *request), expected)
        torch.testing.assert_close(states[1].memory, states[0].memory)
        assert all(keys.any() for keys in states[1].memory.keys[:1])
    assert 1 <= len(graphs) <= 2


@pytest.mark.parametrize("order", ["raster", "random"])
def test_one_process_may_sample_in_many_ways(graphs: list[torch.fx.GraphModule], order: Any) -> None:
    """torch compiles a function eight times and then refuses, and all models of a process share the function."""
    tiny = replace(CONFIG, order=order, grid=(2, 3), groups=(4,), depth=1, group_depth=0)
    models = [randomised(tiny, seed) for seed in (0, 1)]
    ways: list[dict[str, Any]] = [{"cache": cache, "chunk": 3} for cache in ("merge", "full")]
    if order == "random":
        ways = [{"num_tokens": k, "top_k": top_k, "steps": 2} for k, top_k in ((3, 0), (6, 2))]
    for model in models:
        for way in ways:
            for guidance in (1.0, 2.0):
                for images in (4, 3, 1):
                    options = {**way, "guidance": guidance, "seeds": range(images)}
                    expected = model.generate([0] * images, **options)
                    assert model.generate([0] * images, compile=True, **options).equal(expected)
    assert len(graphs) > 8
    assert torch._dynamo.config.recompile_limit == 8


def test_torch_2_6_has_another_name_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        cache_size_limit = accumulated_cache_size_limit = 8

        def patch(self, changes: dict[str, int]) -> Any:
            assert all(hasattr(self, name) and value > 1000 for name, value in changes.items())
            return nullcontext()

    monkeypatch.setattr("torch._dynamo.config", Config())
    with many_graphs(True):
        pass


@pytest.mark.slow
def test_inductor_gives_the_same_tokens() -> None:
    torch.compiler.reset()
    model = randomised(replace(CONFIG, depth=1))
    options: dict[str, Any] = {"seeds": [1, 2], "guidance": 2.0}
    assert model.generate([0, 2], compile=True, **options).equal(model.generate([0, 2], **options))
