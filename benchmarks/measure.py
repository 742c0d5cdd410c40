"""How things are measured: interleaved repetitions, medians, and peak memory of a fresh process."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def interleaved(functions: dict[str, Callable[[], Any]], repetitions: int, warmup: int = 1) -> dict[str, list[float]]:
    """Returns the seconds of each function, run in turns so that a busy moment hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repetitions):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(seconds: list[float]) -> float:
    return statistics.median(seconds)


def ratio(seconds: dict[str, list[float]], ours: str, reference: str) -> float:
    """Returns the median over the repetitions of ours divided by the reference of the same turn."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[reference], strict=True))


def extra_memory(code: str) -> float | None:
    """Returns by how many MiB `step()` raises the peak memory of a fresh process; `code` defines it and its inputs.

    A first call on a small input (`warm()`) loads libraries and starts threads, so that they do not count. The peak is
    the kernel's VmHWM, reset after the warm-up: the better known ru_maxrss of a child starts at its parent's. None
    where there is no such file.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    script = f"""
import re, torch
from pathlib import Path
{code}
def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
warm()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step()
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.split()[-1])


def hardware() -> dict[str, Any]:
    """Returns what the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "amx": amx(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def amx() -> bool:
    """Returns whether the CPU multiplies bf16 matrices in hardware."""
    return "amx_bf16" in _cpuinfo()


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def commit() -> str:
    """Returns the commit that was measured, with a + if files were changed since."""
    run = lambda *a: subprocess.run(["git", *a], capture_output=True, text=True).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")


def markdown(title: str, rows: list[dict[str, Any]], note: str = "") -> str:
    """Returns a table; the keys of the first row are its columns."""
    columns = list(rows[0])
    lines = [f"## {title}", ""]
    if note:
        lines += [note, ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1) + "\n"
