"""What merging costs inside the encoder, and unmerging as a gather against the source matrix."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, median, ratio
from mergevq import presets
from mergevq.merging import SourceMap, match_and_merge, match_tokens, merge_schedule, merge_tokens, unmerge
from mergevq.tokenizer.encoder import Encoder


def unmerging() -> tuple[str, list[dict[str, Any]], str]:
    """Returns the table of unmerging codes of 18 bits."""
    rows = []
    for batch, patches, kept in ((1, 256, 144), (16, 256, 144), (16, 1024, 256)):
        rng = torch.Generator().manual_seed(0)
        index = torch.randint(0, kept, (batch, patches), generator=rng)
        tokens = torch.randn(batch, kept, 18, generator=rng)
        matrix = SourceMap(index, torch.full((batch,), kept)).to_matrix()
        both = {"gather": lambda t=tokens, i=index: unmerge(t, i), "matrix": lambda t=tokens, m=matrix: m.mT @ t}
        seconds = interleaved(both, 50, warmup=5)
        rows.append(
            {
                "batch": batch,
                "L": patches,
                "K": kept,
                "gather ms": 1e3 * median(seconds["gather"]),
                "matrix product ms": 1e3 * median(seconds["matrix"]),
                "times faster": 1 / ratio(seconds, "gather", "matrix"),
                "map KiB": index.numel() * 8 / 1024,
                "matrix KiB": matrix.numel() * 4 / 1024,
                "equal": bool(torch.equal(unmerge(tokens, index), matrix.mT @ tokens)),
            }
        )
    return "Unmerging", rows, "The index map as int64 against the 0/1 matrix as float32."


def stack(quick: bool = False) -> tuple[str, list[dict[str, Any]], str]:
    """Returns the table of the encoder's attention stack with and without merging and source tracking."""
    rows = []
    for name, kept in (("gr_256", 144), ("gr_256", 64), ("g_256", 256)):
        config = presets.tokenizer(name).model
        encoder = Encoder(config).eval()
        patches, width = config.num_patches, config.encoder.width
        x = torch.randn(1, patches + 1, width)
        schedule = merge_schedule(patches, kept, config.encoder.depth)

        def run(x: Tensor = x, encoder: Encoder = encoder, schedule: tuple[int, ...] = schedule) -> Tensor:
            sizes, source = None, torch.arange(x.shape[1] - 1)[None]
            for block, merged in zip(encoder.blocks, schedule, strict=True):
                x, sizes, source = block.merge(x, sizes, source, merged)
            return x

        def without(x: Tensor = x, encoder: Encoder = encoder) -> Tensor:
            source = torch.arange(x.shape[1] - 1)[None]
            for block in encoder.blocks:
                x = block.merge(x, None, source, 0)[0]
            return x

        # The parts alone, on tokens of the right sizes: what following the source adds, and all of merging.
        steps, sizes_now = [], patches + 1
        for merged in schedule:
            if merged:
                tokens = torch.randn(1, sizes_now, width)
                target = match_tokens(torch.randn(1, sizes_now, width // config.encoder.heads), merged)
                metric = torch.randn(1, sizes_now, width // config.encoder.heads)
                steps.append((tokens, torch.ones(1, sizes_now), metric, target, merged))
                sizes_now -= merged

        def source_only(steps: list[Any] = steps, patches: int = patches) -> None:
            source = torch.arange(patches)[None]
            for *_, target, _ in steps:
                source = target[:, 1:].gather(1, source) - 1

        def merge_only(steps: list[Any] = steps, patches: int = patches) -> None:
            source = torch.arange(patches)[None]
            for tokens, sizes, metric, _, merged in steps:
                _, _, source = match_and_merge(tokens, sizes, source, metric, merged)

        def weighted(steps: list[Any] = steps) -> None:
            for tokens, sizes, _, target, merged in steps:
                merge_tokens(tokens, sizes, target, tokens.shape[1] - merged)

        with torch.no_grad():
            parts = {
                "stack": run,
                "no merging": without,
                "source": source_only,
                "merging": merge_only,
                "mean": weighted,
            }
            seconds = interleaved(parts, 3 if quick else 15, warmup=2)
        rows.append(
            {
                "encoder": name,
                "K": kept,
                "stack ms": 1e3 * median(seconds["stack"]),
                "without merging ms": 1e3 * median(seconds["no merging"]),
                "all of merging ms": 1e3 * median(seconds["merging"]),
                "of it the weighted mean ms": 1e3 * median(seconds["mean"]),
                "source tracking ms": 1e3 * median(seconds["source"]),
                "source tracking %": 100 * ratio(seconds, "source", "stack"),
            }
        )
    return "Merging in the encoder's attention stack, batch 1", rows, "12 blocks, float32, evaluation."
