"""Which arithmetic a device can do well."""

from pathlib import Path

import torch

from mergevq.errors import ConfigError


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 numbers in hardware: with AMX, or with AVX-512 BF16, which trains these
    networks 1.2 to 1.5 times as fast as float32 (LOG.md). Others emulate it.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def choose_dtype(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Returns the arithmetic of the networks on `device`, and a notice if it is not what was asked for (else "").

    bf16 is used on GPUs and CPUs that have it, and is float32 elsewhere. Weights are float32 in both cases.

    Raises:
        ConfigError: `precision` is not "float32" or "bf16". Half precision (fp16) needs a gradient scaler, and one
            scaler cannot serve two optimizers whose gradients overflow at different times.
    """
    if precision == "float32":
        return torch.float32, ""
    if precision != "bf16":
        raise ConfigError(
            f"expected precision float32 or bf16, got {precision!r}: use bf16 "
            "(fp16 needs a gradient scaler, which is missing here)"
        )
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, ""
        return torch.float32, "this GPU has no bf16 arithmetic: training in float32"
    if device.type == "cpu" and has_fast_bf16():
        return torch.bfloat16, ""
    return torch.float32, f"this {device.type.upper()} has no fast bf16 arithmetic: training in float32"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns a context in which networks compute in `dtype`; with float32 it also switches a surrounding one off.

    Not Fabric's bf16-mixed: that rounds the inputs too, and images in bf16 are a poor target for a reconstruction.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
