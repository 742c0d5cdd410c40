"""Builds the embedded data set, mergevq/data/emoji_64/{noto,fluent}.zip, from two npm packages.

    python scripts/build_embedded.py            downloads the packages with `npm pack` into a temporary folder
    python scripts/build_embedded.py PACKAGES   takes them unpacked from PACKAGES/noto and PACKAGES/fluent

The same packages and the same Pillow give the same bytes. What is left out, and why, is in `choose`.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, features
from PIL import __version__ as pillow_version

PACKAGES = {"noto": "emoji-datasource-google@16.0.0", "fluent": "@lobehub/fluent-emoji-3d@1.1.0"}
OUTPUT = Path(__file__).parents[1] / "mergevq" / "data" / "emoji_64"
SIDE = 64
LARGEST = 4_950_000  # Bytes of an archive.
VAL_FRACTION = 0.1

Emoji = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="?", type=Path, help="folder with the unpacked packages")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the archives go")
    arguments = parser.parse_args()
    print(f"Pillow {pillow_version}, libwebp {features.version('webp')}")
    with tempfile.TemporaryDirectory() as temporary:
        packages = arguments.packages or download(Path(temporary))
        emoji = choose(json.loads((packages / "noto" / "package" / "emoji.json").read_text(encoding="utf-8")))
        for vendor in PACKAGES:
            build(vendor, packages / vendor / "package", emoji, arguments.output)


def download(folder: Path) -> Path:
    for vendor, package in PACKAGES.items():
        target = folder / vendor
        target.mkdir()
        subprocess.run(["npm", "pack", "--silent", package], cwd=target, check=True)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            archive.extractall(target, filter="data")
    return folder


def choose(emoji: list[Emoji]) -> list[Emoji]:
    """Leaves out what is drawn nearly the same twice: it teaches nothing, and could sit on both sides of the split.

    That is skin tones (never listed apart), men and women of what exists as a person, mirrored drawings ("facing
    right"), families (rows of the same silhouettes), and all clock faces but every third.
    """
    known = {e["unified"] for e in emoji}
    chosen, clocks = [], 0
    for e in sorted(emoji, key=lambda e: str(e["unified"])):
        code = str(e["unified"])
        clock = re.fullmatch(r"1F5[56].", code) is not None and e["subcategory"] == "time"
        clocks += clock
        if (
            e["category"] == "Component"
            or re.search(r"200D-264[02]", code)
            or "200D-27A1" in code
            or (
                e["subcategory"] == "family"
                and re.fullmatch(r"(1F46[6-9]|1F9D[12])(-200D-(1F46[6-9]|1F9D[12]))+", code)
            )
            or (code[:5] in ("1F468", "1F469") and "1F9D1" + code[5:] in known and len(code) > 5)
            or (clock and clocks % 3)
        ):
            continue
        chosen.append(e)
    return chosen


def build(vendor: str, package: Path, emoji: list[Emoji], output: Path) -> None:
    files: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for e in emoji:
        path = find(vendor, package, e)
        if path is None:
            continue
        pixels = draw(path)
        if pixels.tobytes() in seen:  # Some flags are the same.
            continue
        seen.add(pixels.tobytes())
        code = str(e["unified"]).lower().replace("-fe0f", "")
        part = "val" if fraction(family(code)) < VAL_FRACTION else "train"
        label = str(e["category"]).lower().replace(" & ", "_")
        buffer = io.BytesIO()
        pixels.save(buffer, "WEBP", lossless=True, quality=100, method=6)
        files[f"{part}/{label}/{code}.webp"] = buffer.getvalue()
    files, dropped = thin(files)
    target = output / f"{vendor}.zip"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(pack(files))
    counts = Counter(name.rsplit("/", 1)[0] for name in files)
    print(f"{target.name}: {len(files)} images, {target.stat().st_size} bytes, {dropped} dropped to fit")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")


def find(vendor: str, package: Path, e: Emoji) -> Path | None:
    code = str(e["unified"]).lower()
    if vendor == "noto":
        path = package / "img" / "google" / "64" / str(e["image"])
        return path if e["has_img_google"] and path.exists() else None
    if e["subcategory"] in ("country-flag", "subdivision-flag"):
        return None  # In this package they are Noto's drawings, which the other archive has.
    names = (code, code.replace("-fe0f", ""), str(e["non_qualified"] or code).lower())
    return next((p for p in (package / "assets" / f"{name}.webp" for name in names) if p.exists()), None)


def draw(path: Path) -> Image.Image:
    """On white before resizing, so that no colour of transparent pixels reaches the edges."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    pixels = white.convert("RGB")
    return pixels if pixels.size == (SIDE, SIDE) else pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def family(code: str) -> str:
    """The code point's sequence with man and woman read as person, so that all three are on one side of the split."""
    return re.sub(r"1f46[89]", "1f9d1", code)


def fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def thin(files: dict[str, bytes]) -> tuple[dict[str, bytes], int]:
    """Drops images by a hash of their names until the archive is small enough."""
    files, before = dict(files), len(files)
    candidates = sorted(files, key=lambda name: fraction("keep " + name.rsplit("/", 1)[-1]))
    while len(pack(files)) > LARGEST:
        del files[candidates.pop()]
    return files, before - len(files)


def pack(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), files[name])
    return buffer.getvalue()


if __name__ == "__main__":
    main()
