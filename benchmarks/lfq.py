"""The entropy loss of lookup-free quantization: the factorised form against one column per code."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import extra_memory, interleaved, median, ratio
from mergevq.quantize import LFQ

BITS, TEMPERATURE = 18, 0.01


def brute_force(z: Tensor) -> Tensor:
    """The definition: softmax over all 2^N sign vectors of 2 z.c / tau, token entropy minus that of the mean."""
    codes = 2.0 * ((torch.arange(2**BITS)[:, None] >> torch.arange(BITS)) & 1).float() - 1
    log_p = torch.log_softmax(2 * z @ codes.T / TEMPERATURE, -1)
    p = log_p.exp()
    mean = p.mean(0)
    commitment = (z - z.detach().sign()).square().mean()
    return 0.1 * (-(p * log_p).sum(-1).mean() + (mean * (mean + 1e-20).log()).sum()) + 0.25 * commitment


def ours(z: Tensor) -> Tensor:
    out = LFQ(BITS, temperature=TEMPERATURE)(z[None])
    return 0.1 * (out.sample_entropy - out.codebook_entropy) + 0.25 * out.commitment


_CODE = """
from benchmarks.lfq import brute_force, ours, BITS
torch.manual_seed(0)
z = (torch.randn({tokens}, BITS) * 0.05).requires_grad_()
def warm():
    {function}((torch.randn(2, BITS) * 0.05).requires_grad_()).backward()
def step():
    {function}(z).backward()
"""


def run(quick: bool = False) -> tuple[str, list[dict[str, Any]], str]:
    """Returns title, rows and note of the table."""
    rows = []
    for tokens in (64, 256) if quick else (64, 256, 1024, 4096):
        torch.manual_seed(0)
        z = (torch.randn(tokens, BITS) * 0.05).requires_grad_()
        functions = {"ours": lambda z=z: ours(z).backward()}
        ours(z).backward()
        if tokens <= 1024:
            functions["brute"] = lambda z=z: brute_force(z).backward()
        # Brute force at 1024 tokens takes long enough to be measured twice only.
        seconds = interleaved(functions, {64: 5, 256: 4, 1024: 2, 4096: 20}[tokens], warmup=0 if tokens == 1024 else 1)
        row: dict[str, Any] = {"tokens": tokens, "ours ms": 1e3 * median(seconds["ours"])}
        row["ours extra MiB"] = extra_memory(_CODE.format(tokens=tokens, function="ours"))
        if tokens <= 1024:
            row["brute force ms"] = 1e3 * median(seconds["brute"])
            row["times faster"] = 1 / ratio(seconds, "ours", "brute")
            row["brute force extra MiB"] = extra_memory(_CODE.format(tokens=tokens, function="brute_force"))
            with torch.no_grad():
                row["difference of the loss"] = float((brute_force(z) - ours(z)).abs())
        rows.append(row)
    return "LFQ loss, forward and backward, N = 18", rows, "Brute force is the definition over all 2^18 codes."
