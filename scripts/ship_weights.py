"""Puts trained models into the package, in half precision and with a checksum:
`mergevq/weights/<name>/<role>.safetensors`.

    python scripts/ship_weights.py emoji_64 --tokenizer RUN --merge-ar RUN --random-ar RUN

Each is optional; what is not named stays as it is. Rounded weights make another tokenizer, so ship the tokenizer first,
and cache tokens for the generators with the shipped one.
"""

import argparse
import json
from pathlib import Path

import torch

import mergevq
from mergevq.files import read_header
from mergevq.model_files import find_model_file

LIMIT = 12_000_000  # Bytes of a file.
ROLES = {"tokenizer": mergevq.MergeVQ, "merge_ar": mergevq.MergeAR, "random_ar": mergevq.RandomAR}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the models that belong together")
    for role in ROLES:
        parser.add_argument(f"--{role.replace('_', '-')}", metavar="RUN", help="the folder of a run, or a model file")
    options = parser.parse_args()
    folder = Path(mergevq.__file__).parent / "weights" / options.name
    for role, kind in ROLES.items():
        given = getattr(options, role)
        if given is None:
            continue
        source = find_model_file(given)
        step = int(json.loads(read_header(source).get("step", "0")))
        path = kind.from_pretrained(source).save_pretrained(
            folder / f"{role}.safetensors", step=step, force=True, dtype=torch.float16
        )
        size = path.stat().st_size
        if size > LIMIT:
            path.unlink()
            raise SystemExit(f"{path}: expected at most {LIMIT:,} bytes, got {size:,}: train a smaller model")
        loaded = kind.from_pretrained(path)
        print(f"{path.relative_to(folder.parents[2])}: {size:,} bytes, {step:,} steps, {loaded.fingerprint()}")


if __name__ == "__main__":
    main()
