"""The processes of a run and the device of each: starting them, and letting them agree."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mergevq.errors import ConfigError, MissingDependencyError, NonFiniteLossError
from mergevq.training.config import HardwareConfig


def build_fabric(hardware: HardwareConfig) -> Any:
    """Returns a lightning.Fabric, not yet launched. Its precision is float32: see `precision.autocast`.

    Raises:
        MissingDependencyError: lightning is not installed.
        ConfigError: the devices are not there.
    """
    try:
        from lightning.fabric import Fabric
    except ImportError as error:
        raise MissingDependencyError(
            "expected lightning for training, it is not installed: pip install 'mergevq[train]'"
        ) from error
    gpus = torch.cuda.device_count()
    kind = ("cuda" if gpus else "cpu") if hardware.accelerator == "auto" else hardware.accelerator
    if kind == "cuda" and hardware.devices > gpus:
        raise ConfigError(f"expected {hardware.devices} GPUs, found {gpus}: ask for fewer devices or accelerator cpu")
    strategy = hardware.strategy
    if strategy == "auto" and hardware.devices > 1:
        strategy = "ddp"
    return Fabric(accelerator=kind, devices=hardware.devices, strategy=strategy)


def agree(fabric: Any, elapsed: float, signum: int) -> tuple[float, int]:
    """Returns the largest of all processes' `elapsed` and `signum`, so that all take the same decisions."""
    if fabric.world_size == 1:
        return elapsed, signum
    both = torch.tensor([elapsed, float(signum)], dtype=torch.float64, device=fabric.device)
    elapsed, largest = fabric.all_reduce(both, reduce_op="max").tolist()
    return elapsed, int(largest)


def agreed_values(fabric: Any, means: Mapping[str, Tensor], where: str) -> dict[str, float]:
    """Returns the means over processes, waiting for the device once; a NaN of one process is then every process's.

    Args:
        fabric: the lightning.Fabric of the run.
        means: scalars of this process.
        where: in the training, for the message: "optimizer step 7".

    Raises:
        NonFiniteLossError: a mean is NaN or infinite; all processes raise it.
    """
    stacked = torch.stack([value.double().to(fabric.device) for value in means.values()])
    agreed = fabric.all_reduce(stacked, reduce_op="mean").tolist()
    values = dict(zip(means, agreed, strict=True))
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise NonFiniteLossError(
            f"expected finite losses at {where}, got {', '.join(broken)}: "
            "the weights were not changed; try a lower optim.lr, a smaller optim.clip_norm or loop.precision float32"
        )
    return values


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Allows only deterministic kernels inside the block, if wanted; an operation without one raises there."""
    if not wanted:
        yield
        return
    # Read when the first matrix product creates its workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
