"""Does merging help representation, does alignment cost reconstruction? Trains small tokenizers and compares them.

    python examples/compare_variants.py --train "train-*.zip" --val val.zip --out variants

G+R with alignment on and off, with merging and without (K = L all the time), then G and R, and G+R without alignment
whose recovery is off, or learns from the codes without moving them; all for the same number of images, with the
preset's seed. Every training and measurement is resumable: start the command again after an interruption; what is
finished is read, not repeated. Writes variants.json, variants.md and curves.png.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import mergevq
from mergevq.configuration import config_to_dict
from mergevq.data.loader import evaluation_batches
from mergevq.data.sources import evaluation_images, training_images
from mergevq.evaluation.protocol import now, versions
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
        "G+R, recovery apart, no alignment": with_recovery_apart(without_alignment(both)),
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


def with_recovery_apart(run: TokenizerRun) -> TokenizerRun:
    """Recovery learns from the codes and has no say in them."""
    return replace(run, loss=replace(run.loss, recovery_gradient=False))


def without_merging(run: TokenizerRun) -> TokenizerRun:
    """Nothing is merged, so there is nothing to recover."""
    run = without_recovery(run)
    return replace(run, loop=replace(run.loop, num_tokens=(run.model.num_patches,), num_tokens_probs=()))


def of_length(run: TokenizerRun, steps: int, batch_size: int) -> TokenizerRun:
    """A shorter or longer run: warm-up, the average's memory and the discriminator's start keep their share of it."""
    ratio = steps / run.loop.steps
    if run.loss.weights.adversarial > 0:
        run = replace(run, loss=replace(run.loss, disc_start=round(run.loss.disc_start * ratio)))
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
        out = folder(options.out, name)
        run = of_length(run, options.steps or run.loop.steps, options.batch_size or run.loop.batch_size)
        train_one(run, out, train, val)
        rows.append({"run": name, **measure(out, train, val, baselines(known)[name], options)})
    # Last and one after the other, so that nothing else that this command does runs beside it.
    for row, speed in zip(rows, speeds([folder(options.out, name) for name in runs], val, options.device), strict=True):
        row["speed"] = speed
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


def folder(out: Path, name: str) -> Path:
    """Where a run lies."""
    return out / "".join(c if c.isalnum() else "_" for c in name)


def train_one(run: TokenizerRun, out: Path, train: Any, val: Any) -> None:
    """Trains what is not trained yet; a run of other settings in its folder is refused."""
    if (out / "run.json").exists():
        found = json.loads((out / "run.json").read_text())
        images = {"train": len(train), "val": len(val)}
        if (found["config"], found["images"]) != (json.loads(json.dumps(config_to_dict(run))), images):
            raise SystemExit(f"{out} holds a run of other settings or images: choose another --out, or remove it")
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
        "train": train.fingerprint(),
        "val": val.fingerprint(),
        "device": torch.device(options.device).type,
        "versions": versions(),
    }
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        if found.get("measured") == wanted:
            return found
    counts = three_counts(tok)
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


@torch.no_grad()
def speeds(folders: Sequence[Path], val: Any, device: str, batch_size: int = 16, times: int = 7) -> list[Any]:
    """Images encoded and decoded a second by every run at each K: medians, all runs in turn."""
    toks = [mergevq.MergeVQ.from_pretrained(out, device=device) for out in folders]
    batch = next(iter(evaluation_batches(val, toks[0].config.image_size, batch_size=batch_size, workers=0)))
    images = batch["image"].to(device)
    counts = [three_counts(tok) for tok in toks]
    seconds: list[dict[int, list[tuple[float, float]]]] = [{k: [] for k in each} for each in counts]
    for turn in range(times + 1):
        for tok, found in zip(toks, seconds, strict=True):
            for k, taken in found.items():
                start = now(images.device)
                tokens = tok.encode(images, k)
                middle = now(images.device)
                tok.decode(tokens)
                if turn:  # The first one warms up.
                    taken.append((middle - start, now(images.device) - middle))
    return [
        {
            str(k): dict(
                zip(("encode", "decode"), (len(images) / median(x) for x in zip(*taken, strict=True)), strict=True)
            )
            for k, taken in found.items()
        }
        for found in seconds
    ]


def three_counts(tok: mergevq.MergeVQ) -> tuple[int, int, int]:
    """All patches, nine sixteenths of them, a quarter."""
    patches = tok.config.num_patches
    return patches, patches * 9 // 16, patches // 4


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison in Markdown: how it was made, a row for each run and K, then the baselines."""
    probed = [f"{kind} k-NN, linear %" for kind in KINDS]
    heads = ["run", "K", "PSNR dB", "FD", "KD", "distinct", *probed, "encode/s", "decode/s"]
    lines = [how(rows[0]), "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        probes = row["representation"]["rows"]
        for found in row["reconstruction"]["rows"]:
            k = found["num_tokens"]
            scores = [score(probe) for kind in KINDS for probe in probes if of(probe, kind, k)]
            numbers = [f"{found['psnr']['mean']:.2f}", *(short(found[name]) for name in ("frechet", "kernel"))]
            numbers.append(f"{found['distinct_tokens']:.1f}")
            speed = [f"{row['speed'][str(k)][name]:.0f}" for name in ("encode", "decode")]
            lines.append(f"| {' | '.join([row['run'], str(k), *numbers, *scores, *speed])} |")
    for row in rows:
        others = [f"{probe['name']} {score(probe)}" for probe in row["representation"]["rows"] if not mine(probe)]
        lines += ["", f"{row['run']}, baselines: {'; '.join(others)}"] if others else []
    lines += ["", *(f"{row['run']}: trained in {row['minutes']:.0f} minutes" for row in rows), ""]
    return "\n".join(lines)


def how(row: dict[str, Any]) -> str:
    """One paragraph on how the numbers came about."""
    loop, first, second = row["config"]["loop"], row["reconstruction"]["protocol"], row["representation"]["protocol"]
    machine = ", ".join(f"{name} {value}" for name, value in first["hardware"].items())
    half = 100 * max(
        (high - low) / 2
        for probe in row["representation"]["rows"]
        for low, high in (probe[name]["score"]["top1_interval"] for name in ("knn", "linear"))
    )
    return (
        f"{loop['steps']:,} steps of {loop['batch_size']} images each, seed {loop['seed']}, {loop['precision']}. "
        f"PSNR, FD and KD ({first['network']['name']}) of {first['images']:,} held-out images; k-NN and linear probe: "
        f"{second['train']['images']:,} training images, {second['test']['images']:,} test images, top-1, "
        f"± {half:.1f} at most (95 %, by the test images). Measured in {first['precision']}; {machine}."
    )


def mine(probe: dict[str, Any]) -> bool:
    return bool(probe["setting"]["source"] == "tokenizer")


def of(probe: dict[str, Any], kind: str, num_tokens: int) -> bool:
    return mine(probe) and probe["setting"]["kind"] == kind and probe["setting"]["num_tokens"] == num_tokens


def score(probe: dict[str, Any]) -> str:
    return ", ".join(f"{100 * probe[name]['score']['top1']:.1f}" for name in ("knn", "linear"))


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw_curves(logs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """By step: PSNR and perceptual distance of held-out images at each K, and the alignment loss in training."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, int | None, str]]
    panels = [("psnr", i, f"PSNR in dB, {name}") for i, name in enumerate(("K = L", "K = 9/16 L", "K = L/4"))]
    panels += [("perceptual", 0, "perceptual distance, K = L"), ("perceptual", 2, "perceptual distance, K = L/4")]
    panels += [("alignment", None, "alignment loss, training images")]
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (value, place, title) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        for number, (name, log) in enumerate(logs.items()):
            points = curve(log, value, place)
            if points:
                axes.plot(*zip(*points, strict=True), ".-", color=f"C{number}", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def curve(log: Sequence[dict[str, Any]], value: str, place: int | None) -> list[tuple[int, float]]:
    """Step and value of the training records, or of the validations at the K of this place, largest first."""
    if place is None:
        return [(record["step"], record[value]) for record in log if record["kind"] == "train" and value in record]
    found = [record for record in log if record["kind"] == "val"]
    k = sorted({record["num_tokens"] for record in found}, reverse=True)[place]
    return [(record["step"], record[value]) for record in found if record["num_tokens"] == k]


if __name__ == "__main__":
    main()
