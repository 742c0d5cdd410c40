"""`mergevq demo`: the whole package in a few minutes, on the images that come with it."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mergevq import presets
from mergevq.errors import ConfigError

_SHOWN = (256, 144, 64)  # K of the pictures and of the token files.
_MEASURED = (256, 196, 144, 100, 64)


def demo(
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = Path("demo"),
    minutes: float = 4.5,
    generator_minutes: float = 2.0,
    images: int = 128,
    force: bool = False,
) -> None:
    """Train a small tokenizer on the embedded images, round-trip held-out ones, generate new ones, write reports.

    DIR gets report.html, report.png and report.json of the tokenizer, representation.html and .json of its features,
    the token files, and the training run with model.safetensors; generation.html, .png and .json of what the generator
    that comes with the package makes; and live.html, .png and .json of a generator that is trained on the new
    tokenizer's tokens (its run is in DIR/generator).

    Args:
        out: Folder for everything.
        minutes: Training time of the tokenizer.
        generator_minutes: Training time of the generator.
        images: Held-out images to measure on.
        force: Start anew in a folder that holds something; an earlier demo's files are replaced.
    """
    from rich.console import Console

    from mergevq.cli.demo_generation import SHIPPED, generate_with, train_and_generate
    from mergevq.cli.demo_representation import probe_features
    from mergevq.cli.options import progress
    from mergevq.data.embedded import EmbeddedImages
    from mergevq.evaluation.page import check_packages
    from mergevq.evaluation.reconstruction import evaluate_reconstruction
    from mergevq.evaluation.report import report_picture
    from mergevq.files import atomic_path, write_json
    from mergevq.generator.raster import MergeAR
    from mergevq.metrics.features import feature_network
    from mergevq.model_files import shipped_roles
    from mergevq.tokenizer.model import MergeVQ
    from mergevq.training.tokenizer import train_tokenizer

    if min(minutes, generator_minutes) <= 0 or images < 1:
        raise ConfigError(
            f"expected --minutes and --generator-minutes above 0 and --images of at least 1, got {minutes:g}, "
            f"{generator_minutes:g} and {images}"
        )
    check_packages()
    feature_network("lite1")  # Needed after the training: if its package is missing, that is told before.
    started = time.perf_counter()
    preset = presets.tiny()
    run = replace(preset, loop=replace(preset.loop, minutes=minutes))
    tok = MergeVQ.from_pretrained(train_tokenizer(run, out, force=force))
    trained = time.perf_counter() - started

    held_out = EmbeddedImages("val")
    counts = tuple(k for k in _MEASURED if k <= tok.config.num_patches)
    with progress("evaluate", min(images, len(held_out))) as advance:
        report = evaluate_reconstruction(
            tok, held_out, counts, perceptual="lite0", limit=images, examples=0, on_images=advance
        )
    examples, files = _round_trip(tok, held_out, out)
    report = replace(report, examples=examples)
    Console().print(report.table())
    write_json(out / "report.json", report.to_json())
    with atomic_path(out / "report.png") as temporary:
        report_picture(report).save(temporary)
    features = probe_features(tok, out, progress)
    report.write_html(
        out / "report.html",
        title="mergevq demo",
        about=(
            "A small MergeVQ tokenizer was trained on emoji of 64 x 64 pixels. It cuts an image into 256 patches, "
            "merges similar ones into K tokens, notes where each patch went, and turns every token into 12 bits.",
            "The pictures below were held out of training. Their tokens were written to files, read back, and decoded.",
        ),
        facts={"training": _training_facts(out, trained), **files},
        sections=[features],
    )
    pages = ["report", "live"]
    made: dict[str, str] = {}
    if "merge_ar" in shipped_roles(SHIPPED):
        made |= generate_with(MergeAR.from_pretrained(SHIPPED), MergeVQ.from_pretrained(SHIPPED), out, progress)
        pages.insert(1, "generation")
    made |= train_and_generate(out, tok, generator_minutes, progress)
    for name, fact in made.items():
        print(f"{name}: {fact}")
    for name in pages:
        print(f"{name:<16}{out / f'{name}.html'}, {out / f'{name}.png'}")
    print(f"representation  {out / 'representation.html'}")
    print(f"models          {out / 'model.safetensors'}, {out / 'generator' / 'model.safetensors'}")
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


def _round_trip(tok: Any, held_out: Any, out: Path) -> tuple[tuple[Any, ...], dict[str, str]]:
    """Encodes one image of each class to a file at each K and decodes the files; returns examples, and file sizes."""
    import torch

    from mergevq.data.images import center_square, to_tensor
    from mergevq.evaluation.result import Example
    from mergevq.tokens import load_tokens, save_tokens

    side = tok.config.image_size
    chosen = _one_of_each_class(held_out.labels)
    originals = torch.stack([to_tensor(center_square(held_out.read(i).image, side)) for i in chosen])
    examples = tuple(Example(image, {}, {}) for image in originals)
    sizes = {}
    for k in _SHOWN:
        path = out / f"held_out_{k}.mvq"
        save_tokens(path, tok.encode(originals, k), force=True)
        tokens = load_tokens(path, expect_tokenizer=tok.fingerprint())
        assert tokens.source is not None
        for i, (example, drawn) in enumerate(zip(examples, tok.decode(tokens), strict=True)):
            example.source_index[k] = tokens.source.index[i]
            example.reconstruction[k] = drawn.clamp(-1, 1)
        sizes[path.name] = f"{len(tokens)} images of {k} tokens in {path.stat().st_size:,} bytes"
    return examples, sizes


def _one_of_each_class(labels: Sequence[int]) -> list[int]:
    """Returns the number of one image of each class, by turns from the first and the second half of the class.

    The halves are those of the two artists: the embedded images are sorted by them.
    """
    classes = [[i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels))]
    return [members[len(members) * (1 + 2 * (i % 2)) // 4] for i, members in enumerate(classes)]


def _training_facts(out: Path, seconds: float) -> str:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "train"][-1]
    return f"{last['step']:,} steps in {seconds / 60:.1f} minutes, {last['images_per_second']:.0f} images/s at the end"
