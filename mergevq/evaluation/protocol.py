"""What every result says about how it came about: names, hardware, versions; and the clock."""

import platform
import time
from pathlib import Path
from typing import Any

import torch

from mergevq import __version__
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.folder import ImageFolder

PREPARATION = "short side resized (bicubic, antialiased), centre crop"
"""How every image becomes a square of bytes, which networks are given as numbers in [-1, 1]."""


def data_name(data: str | Path | ImageFolder, images: ImageFolder) -> str:
    """Returns what the data is called in results.

    Args:
        data: as the caller named it.
        images: what that became.
    """
    if isinstance(data, EmbeddedImages):
        return "embedded"
    return str(data) if isinstance(data, str | Path) else str(images.root)


def now(device: torch.device) -> float:
    """Returns the time in seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def hardware(device: torch.device) -> dict[str, Any]:
    """Returns the name of the device, and of a CPU the number of threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "threads": torch.get_num_threads()}


def precision(device: torch.device, *, tokenizer: bool = True) -> str:
    """Returns the arithmetic of networks that run in float32: which of it the device may round to fewer bits.

    It never rounds while an evaluation makes, decodes or recovers tokens or computes a tokenizer's features: what is
    said is true of teachers, networks of metrics and generators.

    Args:
        device: where they are.
        tokenizer: a tokenizer is among them, and is said to be apart. A classifier's encoder rounds as all others do.
    """
    rounded = []
    if torch.get_float32_matmul_precision() != "highest":
        rounded.append("matrix products")
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        rounded.append("convolutions")
    if not rounded:
        return "float32"
    apart = "outside of encode, decode and the tokenizer's features " if tokenizer else ""
    return f"float32; {apart}{' and '.join(rounded)} with fewer bits (TF32 or bf16)"


def versions() -> dict[str, str]:
    """Returns the versions that numbers may depend on."""
    return {"mergevq": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    """The processor's model where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())
