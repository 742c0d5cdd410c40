"""Encoding and decoding at real sizes, and against the same network written plainly."""

from typing import Any

import torch

from benchmarks.measure import amx, interleaved, median, ratio
from benchmarks.plain_tokenizer import PlainTokenizer
from mergevq import presets
from mergevq.tokenizer.model import MergeVQ


def throughput(quick: bool = False, device: str = "cpu") -> tuple[str, list[dict[str, Any]], str]:
    """Returns the table of images a second by K."""
    rows = []
    gpu = device != "cpu"
    names = ("gr_256",) if quick else ("gr_256", "g_256", "r_256")
    for name in names:
        run = presets.tokenizer(name)
        model = MergeVQ(run.model).eval().to(device)
        for batch in (64,) if gpu else (1, 4):
            images = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
            # All patches, the preset's K, and the smallest that it is validated at.
            for kept in dict.fromkeys((run.model.num_patches, run.model.num_tokens, min(run.loop.val_num_tokens))):
                tokens = model.encode(images, kept)
                parts = {
                    "encode": lambda m=model, x=images, k=kept: m.encode(x, k),
                    "decode": lambda m=model, t=tokens: m.decode(t),
                }
                seconds = interleaved(parts, 5 if gpu else 2, warmup=1)
                rows.append(
                    {
                        "model": name,
                        "batch": batch,
                        "K": kept,
                        "encode images/s": batch / median(seconds["encode"]),
                        "decode images/s": batch / median(seconds["decode"]),
                        "encode+decode s an image": (median(seconds["encode"]) + median(seconds["decode"])) / batch,
                    }
                )
    return f"Encode and decode, 256 x 256, float32, {device}", rows, "Random weights; seconds through the public calls."


def against_plain(quick: bool = False) -> tuple[str, list[dict[str, Any]], str]:
    """Returns the table of our time over the plain network's, batch 1."""
    torch.manual_seed(0)
    config = presets.tokenizer("gr_256").model
    model = MergeVQ(config).eval()
    plain = PlainTokenizer(config, model.state_dict())
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    rows = []
    for kept in (144,) if quick else (256, 144, 64):
        parts = {
            "ours": lambda k=kept: model.reconstruct(images, k),
            "plain": lambda k=kept: plain.reconstruct(images, k),
            "bf16": lambda k=kept: _bf16(model, images, k),
        }
        with torch.no_grad():
            same = (model.reconstruct(images, kept) - plain.reconstruct(images, kept)).abs().max()
            seconds = interleaved(parts, 3 if quick else 9, warmup=2)
        rows.append(
            {
                "K": kept,
                "ours s": median(seconds["ours"]),
                "plain NCHW s": median(seconds["plain"]),
                "ours / plain": ratio(seconds, "ours", "plain"),
                "bf16 s": median(seconds["bf16"]),
                "bf16 / plain": ratio(seconds, "bf16", "plain"),
                "largest difference": float(same),
            }
        )
    note = "bf16 is autocast around both networks; this CPU has " + ("AMX." if amx() else "no AMX.")
    return "gr_256 encode and decode at batch 1 against the same network in plain NCHW", rows, note


def _bf16(model: MergeVQ, images: torch.Tensor, kept: int) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(images, kept).reconstruction
