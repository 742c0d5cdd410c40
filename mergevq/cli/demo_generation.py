"""The second half of `mergevq demo`: generating with the weights that come with the package, and training live."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergevq import presets
from mergevq.cli.options import Advance

SHIPPED = "emoji_64"
_GUIDANCE, _TEMPERATURE = 2.0, 0.9
_SHIPPED_IMAGES, _LIVE_IMAGES = 36, 18
_LIVE_COUNTS = (64, 144)  # K of the tokens that the live generator is trained on.

Progress = Callable[[str, int], AbstractContextManager[Advance]]


def generate_with(gen: Any, tok: Any, out: Path, progress: Progress) -> dict[str, str]:
    """Generates emoji of every class with trained models; returns what to tell of it.

    Writes generation.html, generation.json and generation.png: images, the nearest training images below them, and what
    the full cache and the merge cache cost for the same images.
    """
    from mergevq.evaluation.generation import evaluate_generation
    from mergevq.sampling import SamplingOptions

    real, known = _images("val"), _images("train")
    with progress("generate", len(real) + len(known) + 2 * _SHIPPED_IMAGES) as advance:
        report = evaluate_generation(
            gen,
            tok,
            real,
            num_images=_SHIPPED_IMAGES,
            guidance=_GUIDANCE,
            sampling=SamplingOptions(temperature=_TEMPERATURE),
            cache=("full", "merge"),
            network=None,
            neighbours=known,
            shown=_SHIPPED_IMAGES,
            batch_size=_SHIPPED_IMAGES // 2,  # The first batch of each is not timed.
            on_images=advance,
        )
    full, merge = report.rows
    facts = {
        "cache, an image": f"full {full.cache_bytes_per_image / 1024:,.0f} KiB, merge "
        f"{merge.cache_bytes_per_image / 1024:,.0f} KiB ({merge.cache_bytes / full.cache_bytes:.0%})",
        "time of all": f"full {_SHIPPED_IMAGES / full.generate_per_second:.1f} s, merge "
        f"{_SHIPPED_IMAGES / merge.generate_per_second:.1f} s",
    }
    _write(
        out / "generation",
        report,
        "mergevq demo: generation",
        (
            f"{_SHIPPED_IMAGES} emoji that MergeAR made token by token, told nothing but a class, with weights that "
            "come with the package. A token that repeats an earlier one leaves the cache of keys and values after two "
            "more tokens: the merge cache holds what the attention still sees, the images are those of the full cache.",
            "Beside each image is the training image with the closest pixels.",
        ),
        facts,
    )
    return facts


def train_and_generate(out: Path, tok: Any, minutes: float, progress: Progress) -> dict[str, str]:
    """Trains a MergeAR on the tokens of `tok` and generates with it; returns what to tell of it.

    Writes the token caches, the run (out/generator) and live.html, live.json and live.png.
    """
    from mergevq.data.cache_writer import write_token_cache
    from mergevq.evaluation.generation import evaluate_generation
    from mergevq.generator.raster import MergeAR
    from mergevq.sampling import SamplingOptions
    from mergevq.training.generator import train_generator

    caches = {}
    for part in ("train", "val"):
        images = _images(part)
        with progress(f"tokens of {part}", len(images)) as advance:
            caches[part] = write_token_cache(
                tok, images, out / "tokens" / part, num_tokens=_LIVE_COUNTS, force=True, on_images=advance
            )
    preset = presets.generator("tiny")
    run = replace(preset, loop=replace(preset.loop, minutes=minutes))
    path = train_generator(
        run, out / "generator", cache=caches["train"], val_cache=caches["val"], tokenizer=tok, force=True
    )
    real = _images("val")
    with progress("generate", len(real) + _LIVE_IMAGES) as advance:
        report = evaluate_generation(
            MergeAR.from_pretrained(path),
            tok,
            real,
            num_images=_LIVE_IMAGES,
            guidance=_GUIDANCE,
            sampling=SamplingOptions(temperature=_TEMPERATURE),
            network=None,
            neighbour_limit=0,
            shown=_LIVE_IMAGES,
            batch_size=_LIVE_IMAGES,
            on_images=advance,
        )
    trained = f"{minutes:g} minutes"
    _write(
        out / "live",
        report,
        "mergevq demo: a generator trained live",
        (
            f"A MergeAR trained for {trained} on the tokens of the tokenizer that was trained before it. So short a "
            "training shows that the whole way works, not what emoji look like.",
        ),
        {"training": trained},
    )
    return {"live generator": f"trained for {trained}"}


def _images(part: str) -> Any:
    from mergevq.data.embedded import EmbeddedImages

    return EmbeddedImages(part)


def _write(stem: Path, report: Any, title: str, about: tuple[str, ...], facts: dict[str, str]) -> None:
    from mergevq.evaluation.generation_report import neighbours_picture, samples_picture
    from mergevq.files import atomic_path, write_json

    write_json(stem.with_suffix(".json"), report.to_json())
    has_neighbours = any(sample.by_pixels is not None for sample in report.samples[0])
    picture = neighbours_picture(report, 0) if has_neighbours else samples_picture(report, 0)
    with atomic_path(stem.with_suffix(".png")) as temporary:
        picture.save(temporary)
    report.write_html(stem.with_suffix(".html"), title=title, about=about, facts=facts)
