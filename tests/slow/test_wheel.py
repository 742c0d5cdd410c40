"""What users install: the wheel, built here and used from another folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=450,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_builds_and_its_copy_trains_measures_and_reports(tmp_path: Path) -> None:
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("mergevq-*.whl")
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run("-m", "pip", "install", "--no-deps", "--no-index", "--target", place, wheel, cwd=elsewhere)

    code = "import mergevq; print(mergevq.__file__)"
    assert Path(_run("-c", code, cwd=elsewhere, PYTHONPATH=str(place)).strip()) == place / "mergevq" / "__init__.py"
    assert "eval reconstruction" in _run("-m", "mergevq.cli.main", "--help", cwd=elsewhere, PYTHONPATH=str(place))
    code = "from mergevq import MergeVQ; print(MergeVQ.from_pretrained('emoji_64').config.num_bits)"
    assert _run("-c", code, cwd=elsewhere, PYTHONPATH=str(place)).strip() == "12"
    demo = ("demo", "--out", "demo", "--minutes", "0.02", "--generator-minutes", "0.02", "--images", "4")
    out = _run("-m", "mergevq.cli.main", *demo, cwd=elsewhere, PYTHONPATH=str(place))
    assert "PSNR in dB" in out
    assert (elsewhere / "demo" / "report.html").read_text().startswith("<!doctype html>")
    for name in ("model.safetensors", "report.json", "report.png", "held_out_64.mvq", "live.html", "live.png"):
        assert (elsewhere / "demo" / name).stat().st_size > 100
