"""Runs every benchmark and writes `benchmarks/results/<name>.md` and `.json`."""

import argparse
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import generator, lfq, merging, tokenizer, training_step
from benchmarks.measure import as_json, commit, hardware, markdown
from mergevq.files import atomic_write

Table = tuple[str, list[dict[str, Any]], str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--name", default="gpu" if torch.cuda.is_available() else "cpu", help="of the result files")
    parser.add_argument(
        "--only",
        nargs="*",
        default=None,
        help="lfq, unmerge, stack, plain, throughput, step, cache, sampling, release, attention",
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    benchmarks: dict[str, Callable[[], Table]] = {
        "lfq": lambda: lfq.run(args.quick),
        "unmerge": merging.unmerging,
        "stack": lambda: merging.stack(args.quick),
        "plain": lambda: tokenizer.against_plain(args.quick),
        "throughput": lambda: tokenizer.throughput(args.quick),
        "step": lambda: training_step.run(args.quick),
        "cache": lambda: generator.sizes(args.quick),
        "sampling": lambda: generator.speed(args.quick),
        "release": lambda: generator.against_release(args.quick),
        "attention": lambda: generator.attention_share(args.quick),
    }
    if torch.cuda.is_available():
        benchmarks["sampling_gpu"] = lambda: generator.speed(args.quick, "cuda")
        benchmarks["release_gpu"] = lambda: generator.against_release(args.quick, "cuda")
        benchmarks["attention_gpu"] = lambda: generator.attention_share(args.quick, "cuda")
        benchmarks["throughput_gpu"] = lambda: tokenizer.throughput(args.quick, "cuda")
    kept = args.out / f"{args.name}.json"
    # What is not measured anew stays, each table with the commit and machine it was measured on.
    tables = json.loads(kept.read_text())["tables"] if kept.exists() else {}
    for name, benchmark in benchmarks.items():
        if args.only is None or name in args.only:
            print(f"{name} ...", flush=True)
            title, rows, note = benchmark()
            when = f"{datetime.date.today()}, commit {commit()}"
            tables[name] = {"title": title, "note": note, "rows": rows, "measured": when, "hardware": hardware()}
            print(_text(tables[name]), flush=True)
            # Now, because the next table may fail after hours.
            _write(args.out, args.name, {name: tables[name] for name in benchmarks if name in tables})


def _write(out: Path, name: str, tables: dict[str, dict[str, Any]]) -> None:
    header = (
        f"# Benchmarks ({name})\n\n`python -m benchmarks`. Medians; ratios are medians over interleaved "
        "repetitions of one run, because absolute times of a shared machine mean little.\n\n"
    )
    atomic_write(out / f"{name}.md", (header + "\n".join(_text(table) for table in tables.values())).encode())
    atomic_write(out / f"{name}.json", as_json({"tables": tables}).encode())


def _text(table: dict[str, Any]) -> str:
    machine = table["hardware"]
    parts = (machine["cpu"], f"{machine['cores']} cores", machine["gpu"], f"torch {machine['torch']}")
    where = ", ".join(part for part in parts if part)
    return markdown(table["title"], table["rows"], f"{table['note']} Measured {table['measured']}: {where}.")


if __name__ == "__main__":
    main()
