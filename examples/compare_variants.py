"""Does merging help representation, does alignment cost reconstruction? Trains small tokenizers and compares them.

    python examples/compare_variants.py --train "train-*.zip" --val val.zip --out variants

G+R with alignment on and off, with merging and without (K = L all the time), then G and R, and G+R that merges and has
neither alignment nor recovery, all for the same number of images, with the preset's seed. Every training and
measurement is resumable: start the command again after an interruption; what is finished is read, not repeated. Writes
variants.json, variants.md and curves.png.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mergevq
from mergevq.data.sources import evaluation_images, training_images
from mergevq.files import atomic_path, write_json
from mergevq.layers.pretrained import weights_checksum
from mergevq.metrics.probe_config import LinearConfig, ProbeConfig
from mergevq.training.config import TokenizerRun

KINDS = ("class", "mean", "class+mean")


def variants(teacher_cache: str, width: str) -> dict[str, TokenizerRun]:
    """The runs by name; all else is the presets'."""
    g, both, r = (mergevq.presets.tokenizer(f"{name}_64{width}") for name in ("g", "gr", "r"))
    found = {
        "G+R": both,
        "G+R, no alignment": without_alignment(both),
        "G+R, no merging": without_merging(both),
        "G+R, neither": without_merging(without_alignment(both)),
        "G": g,
        "R": r,
        "G+R, merging only": without_recovery(without_alignment(both)),
    }
    return {
        name: replace(run, data=replace(run.data, teacher_cache=teacher_cache)) if run.model.alignment.enabled else run
        for name, run in found.items()
    }


def without_alignment(run: TokenizerRun) -> TokenizerRun:
    return replace(
        run,
        model=replace(run.model, alignment=replace(run.model.alignment, enabled=False)),
        loss=replace(run.loss, weights=replace(run.loss.weights, alignment=0.0)),
    )


def without_recovery(run: TokenizerRun) -> TokenizerRun:
    return replace(
        run,
        model=replace(run.model, recovery=replace(run.model.recovery, enabled=False)),
        loss=replace(run.loss, weights=replace(run.loss.weights, recovery=0.0)),
    )


def without_merging(run: TokenizerRun) -> TokenizerRun:
    """Nothing is merged, so there is nothing to recover."""
    run = without_recovery(run)
    return replace(run, loop=replace(run.loop, num_tokens=(run.model.num_patches,), num_tokens_probs=()))


def of_length(run: TokenizerRun, steps: int, batch_size: int) -> TokenizerRun:
    """A shorter or longer run: its warm-up and its average's memory keep their share of the whole."""
    ratio = steps / run.loop.steps
    return replace(
        run,
        loop=replace(run.loop, steps=steps, batch_size=batch_size, val_every=min(run.loop.val_every, steps)),
        optim=replace(
            run.optim,
            warmup_steps=round(run.optim.warmup_steps * ratio),
            ema_decay=run.optim.ema_decay ** (1 / ratio),
        ),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="labelled images to train on: a folder, a .zip, a pattern")
    parser.add_argument("--val", required=True, help="held-out images of the same classes")
    parser.add_argument("--width", default="_d32", help="of the presets' names; '' takes g_64 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each run (default: the presets')")
    parser.add_argument("--batch-size", type=int, default=None, help="(default: the presets')")
    parser.add_argument("--only", default="", help="names of the runs to make, semicolons between (default: all)")
    parser.add_argument("--limit", type=int, default=None, help="training images for probes, evenly spread")
    parser.add_argument("--images", type=int, default=None, help="held-out images to reconstruct, evenly spread")
    parser.add_argument("--epochs", type=int, default=90, help="of the linear probe (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("variants"), help="folder of runs and results")
    options = parser.parse_args(arguments)

    train, val = training_images(options.train), evaluation_images(options.val)
    teacher = options.out / "teacher"
    known = variants(str(teacher), options.width)
    names = [name.strip() for name in options.only.split(";") if name.strip()] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"expected names of {'; '.join(known)} in --only, got {'; '.join(unknown)}")
    runs = {name: run for name, run in known.items() if name in names}
    if any(run.model.alignment.enabled for run in runs.values()) and not (teacher / "manifest.json").exists():
        mergevq.write_teacher_cache("lite0", train, teacher, size=64, device=options.device)
    rows = []
    for name, run in runs.items():
        out = options.out / "".join(c if c.isalnum() else "_" for c in name)
        run = of_length(run, options.steps or run.loop.steps, options.batch_size or run.loop.batch_size)
        train_one(run, out, train, val)
        rows.append({"run": name, **measure(out, train, val, baselines(known)[name], options)})
        write_json(options.out / "variants.json", {"runs": rows})
        with atomic_path(options.out / "variants.md") as temporary:
            temporary.write_text(table(rows))
        draw_curves({row["run"]: row["log"] for row in rows}, options.out / "curves.png")
    print(table(rows))


def baselines(runs: dict[str, TokenizerRun]) -> dict[str, tuple[str, ...]]:
    """What each run is compared with: pixels and the teacher once, random weights once for each encoder."""
    encoders = [run.model.encoder for run in runs.values()]
    return {
        name: (*(() if i else ("pixels", "teacher")), *(("random",) if encoders.index(encoders[i]) == i else ()))
        for i, name in enumerate(runs)
    }


def train_one(run: TokenizerRun, out: Path, train: Any, val: Any) -> None:
    if not finished(out, run.loop.steps):
        resume = (out / "state" / "state.json").exists()
        mergevq.train_tokenizer(run, out, train_data=train, val_data=val, resume=resume)


def finished(out: Path, steps: int) -> bool:
    log = out / "log.jsonl"
    return log.exists() and any(
        record["kind"] == "val" and record["step"] == steps for record in map(json.loads, log.read_text().splitlines())
    )


def measure(out: Path, train: Any, val: Any, others: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Reconstruction and representation at three K: all patches, nine sixteenths, a quarter."""
    file = out / "measured.json"
    tok = mergevq.MergeVQ.from_pretrained(out, device=options.device)
    wanted = {
        "tokenizer": tok.fingerprint(),
        "decoder": weights_checksum(tok.decoder),
        "limit": options.limit,
        "images": options.images,
        "epochs": options.epochs,
        "baselines": list(others),
    }
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        if found["measured"] == wanted:
            return found
    patches = tok.config.num_patches
    counts = (patches, patches * 9 // 16, patches // 4)
    report = mergevq.evaluate_reconstruction(tok, val, counts, limit=options.images)
    features = mergevq.evaluate_representation(
        tok,
        train,
        val,
        num_tokens=counts,
        kinds=KINDS,
        baselines=[name for name in others if name != "teacher"],
        teacher="lite0" if "teacher" in others else None,
        probes=ProbeConfig(probes=("knn", "linear"), linear=LinearConfig(epochs=options.epochs)),
        train_limit=options.limit,
        cache=out / "features",
        force=True,  # Those of an earlier state of the run are of no use.
    )
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = {
        "measured": wanted,
        "config": json.loads((out / "run.json").read_text())["config"],
        "log": log,
        "minutes": max(record["elapsed"] for record in log if record["kind"] == "train") / 60,
        "reconstruction": report.to_json(),
        "representation": features.to_json(),
    }
    write_json(file, found)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown: a row for each run and K, then the baselines."""
    probed = [f"{kind} k-NN, linear %" for kind in KINDS]
    heads = ["run", "K", "PSNR dB", "FD", "KD", "distinct", *probed, "encode/s", "decode/s"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        probes = row["representation"]["rows"]
        for found in row["reconstruction"]["rows"]:
            k = found["num_tokens"]
            scores = [score(probe) for kind in KINDS for probe in probes if of(probe, kind, k)]
            numbers = [f"{found['psnr']['mean']:.2f}", *(short(found[name]) for name in ("frechet", "kernel"))]
            speeds = [f"{found[name]:.0f}" for name in ("encode_per_second", "decode_per_second")]
            numbers += [f"{found['distinct_tokens']:.1f}", *scores, *speeds]
            lines.append(f"| {row['run']} | {k} | {' | '.join(numbers)} |")
    for row in rows:
        others = [f"{probe['name']} {score(probe)}" for probe in row["representation"]["rows"] if not mine(probe)]
        lines += ["", f"{row['run']}, baselines: {'; '.join(others)}"] if others else []
    lines += ["", *(f"{row['run']}: trained in {row['minutes']:.0f} minutes" for row in rows), ""]
    return "\n".join(lines)


def mine(probe: dict[str, Any]) -> bool:
    return bool(probe["setting"]["source"] == "tokenizer")


def of(probe: dict[str, Any], kind: str, num_tokens: int) -> bool:
    return mine(probe) and probe["setting"]["kind"] == kind and probe["setting"]["num_tokens"] == num_tokens


def score(probe: dict[str, Any]) -> str:
    return ", ".join(f"{100 * probe[name]['score']['top1']:.1f}" for name in ("knn", "linear"))


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw_curves(logs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """PSNR of held-out images at each K, their perceptual distance at the largest, and the alignment loss, by step."""
    from matplotlib.figure import Figure

    counts = sorted({record["num_tokens"] for log in logs.values() for record in log if record["kind"] == "val"})
    charts = [("psnr", k, f"PSNR, dB, K = {k}") for k in reversed(counts)]
    charts += [("perceptual", counts[-1], f"perceptual distance, K = {counts[-1]}"), ("alignment", None, "alignment")]
    columns = min(3, len(charts))
    lines = -(-len(charts) // columns)
    figure = Figure(figsize=(4 * columns, 3 * lines), layout="constrained")
    for axes, (value, k, title) in zip(figure.subplots(lines, columns, squeeze=False).flat, charts, strict=False):
        for name, log in logs.items():
            found = [r for r in log if r["kind"] == "val" and value in r and (k is None or r["num_tokens"] == k)]
            if k is None:  # One line a run: at its largest K.
                found = [r for r in found if r["num_tokens"] == max(r["num_tokens"] for r in found)]
            if found:
                axes.plot([r["step"] for r in found], [r[value] for r in found], "o-", markersize=3, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


if __name__ == "__main__":
    main()
