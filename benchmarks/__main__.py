"""Runs every benchmark and writes `benchmarks/results/<name>.md` and `.json`."""

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import lfq, merging, tokenizer, training_step
from benchmarks.measure import as_json, commit, hardware, markdown

Table = tuple[str, list[dict[str, Any]], str]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--name", default="gpu" if torch.cuda.is_available() else "cpu", help="of the result files")
    parser.add_argument("--only", nargs="*", default=None, help="lfq, unmerge, stack, plain, throughput, step")
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
    }
    if torch.cuda.is_available():
        benchmarks["throughput_gpu"] = lambda: tokenizer.throughput(args.quick, "cuda")
    machine, results, text = hardware(), {}, []
    for name, benchmark in benchmarks.items():
        if args.only is None or name in args.only:
            print(f"{name} ...", flush=True)
            title, rows, note = benchmark()
            results[name] = {"title": title, "note": note, "rows": rows}
            text.append(markdown(title, rows, note))
            print(text[-1], flush=True)
    header = (
        f"# Benchmarks ({args.name})\n\n`python -m benchmarks`, commit {commit()}, {datetime.date.today()}: "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
        f"{', ' + machine['gpu'] if machine['gpu'] else ''}, torch {machine['torch']}. Medians; ratios are medians "
        "over interleaved repetitions of one run, because absolute times of a shared machine mean little.\n\n"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.name}.md").write_text(header + "\n".join(text))
    (args.out / f"{args.name}.json").write_text(as_json({"hardware": machine, "commit": commit(), "tables": results}))


if __name__ == "__main__":
    main()
