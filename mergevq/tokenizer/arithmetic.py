"""The arithmetic that tokens are defined in: float32 that no global setting rounds to fewer bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def arithmetic(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Computes in `dtype` inside, whatever surrounds it.

    Args:
        device: where the networks are.
        dtype: of autocast. None and float32 are float32, where neither convolutions nor matrix products round.
    """
    if dtype is not None and dtype != torch.float32:
        with torch.autocast(device.type, dtype=dtype):
            yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=False), unrounded(device):
        yield


@contextmanager
def unrounded(device: torch.device) -> Iterator[None]:
    """Keeps a device from rounding float32 to TF32 or bfloat16 inside; all other settings stay as they are.

    Without it a GPU rounds in convolutions, as torch lets it by default, and in matrix products if it was told to.
    """
    cudnn = torch.backends.cudnn
    try:
        convolutions = device.type == "cuda" and cudnn.allow_tf32
        products = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch 2.9 and later answer so once somebody has used their settings for each kind of operation.
        with _unrounded_operations():
            yield
        return
    # Nothing is written that says so already: writing one of these settings may move its neighbours.
    if convolutions:
        cudnn.allow_tf32 = False
    if products != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if convolutions:
            cudnn.allow_tf32 = True
        if products != "highest":
            torch.set_float32_matmul_precision(products)


@contextmanager
def _unrounded_operations() -> Iterator[None]:
    backends: Any = torch.backends  # Older versions of torch lack some of these.
    kinds = (backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, setting in zip(kinds, before, strict=True):
            kind.fp32_precision = setting
