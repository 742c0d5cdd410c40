"""One training step of a tokenizer, by part."""

import time
from itertools import pairwise
from typing import Any

import torch

from benchmarks.measure import interleaved, median, synchronize
from mergevq import presets
from mergevq.losses.perceptual import build_perceptual
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import TokenizerRun
from mergevq.training.steps import reconstruction_terms, weighted_sum


def run(quick: bool = False) -> tuple[str, list[dict[str, Any]], str]:
    """Returns the table of seconds by part for the demo's preset and for the larger 64-pixel one."""
    rows = []
    for name, batch in (("tiny", 8),) if quick else (("tiny", 8), ("gr_64", 8)):
        rows.append(_one(presets.tokenizer(name), name, batch, 3 if quick else 10))
    return "One training step by part", rows, "Without discriminator and teacher; K is the preset's default."


def _one(preset: TokenizerRun, name: str, batch: int, repetitions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = MergeVQ(preset.model).train()
    perceptual = build_perceptual("lite0")
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.rand(batch, 3, preset.model.image_size, preset.model.image_size) * 2 - 1
    parts: dict[str, list[float]] = {}

    def step() -> None:
        marks = [("", time.perf_counter())]

        def mark(part: str) -> None:
            synchronize()
            marks.append((part, time.perf_counter()))

        optimizer.zero_grad()
        out = model(images, preset.model.num_tokens)
        mark("forward")
        losses, _ = reconstruction_terms(out, images, preset.loss, perceptual)
        mark("losses")
        weighted_sum(losses, preset.loss.weights).backward()
        mark("backward")
        optimizer.step()
        mark("optimizer")
        for (_, before), (part, now) in pairwise(marks):
            parts.setdefault(part, []).append(now - before)

    total = median(interleaved({"step": step}, repetitions, warmup=2)["step"])
    row: dict[str, Any] = {"preset": name, "batch": batch, "K": preset.model.num_tokens}
    row |= {f"{part} ms": 1e3 * median(seconds[2:]) for part, seconds in parts.items()}
    return row | {"step ms": 1e3 * total, "images/s": batch / total}
