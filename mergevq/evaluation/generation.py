"""How good generated images are, how varied, how close to the training images, and what they cost."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergevq.configuration import check_seed
from mergevq.data.folder import ImageFolder
from mergevq.data.sources import evaluation_images, training_images
from mergevq.errors import CheckpointError, ConfigError
from mergevq.evaluation.generation_measure import NEIGHBOURS, Measure
from mergevq.evaluation.generation_notes import generation_notes
from mergevq.evaluation.generation_pass import TokenGenerator, Worker, evaluation_mode, in_order, warning_once
from mergevq.evaluation.generation_plan import (
    MOST_SHOWN,
    Classes,
    Plan,
    all_settings,
    are_the_same,
    generate_options,
    image_labels,
    looked_at,
)
from mergevq.evaluation.generation_result import GenerationReport, GenerationRow, ReferenceRow, Sample, Setting
from mergevq.evaluation.processes import shared_processes
from mergevq.evaluation.protocol import PREPARATION, data_name, hardware, precision, versions
from mergevq.evaluation.training_neighbours import CLOSE, TrainingSet
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import check_pair
from mergevq.layers.pretrained import weights_checksum
from mergevq.metrics.features import FeatureNetwork, feature_network
from mergevq.metrics.neighbours import Nearest
from mergevq.sampling import Number, SamplingOptions, image_seeds
from mergevq.tokenizer.model import MergeVQ


def evaluate_generation(
    generator: TokenGenerator,
    tok: MergeVQ,
    reference: str | Path | ImageFolder,
    *,
    num_images: int,
    guidance: Number | Sequence[Number] = 1.0,
    num_tokens: int | Sequence[int] | None = None,
    cache: str | Sequence[str] = "merge",
    steps: int | Sequence[int] | None = None,
    classes: Classes = "balanced",
    sampling: SamplingOptions | None = None,
    network: str | nn.Module | None = "lite1",
    neighbours: str | Path | ImageFolder | None = None,
    limit: int | None = None,
    neighbour_limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    shown: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    on_images: Callable[[int], None] | None = None,
) -> GenerationReport:
    """Returns how generated images compare with real ones in each setting, and how it was measured.

    Every combination of the guidance scales, K, caches and steps given is a setting, and every setting generates the
    same `num_images` images: number i has the same class and seed in all of them. Images are clamped and rounded to
    bytes before anything is measured; networks other than the generator run in float32.

    Under `torch.distributed` (torchrun, Fabric) every process calls this with equal arguments and does its share.
    Batches, and so images, are the same for any number of processes. All return the same numbers, the first also the
    samples.

    Args:
        generator: a `MergeAR` or a `RandomAR`.
        tok: the tokenizer it was trained with. For a `RandomAR` it needs a recovery model.
        reference: the real images to compare with: a folder, a .zip, a pattern that names several .zip files,
            "embedded", or a data set. Of a source with parts, the held-out part.
        num_images: generated in each setting.
        guidance: one scale or several; 1 is off.
        num_tokens: K that the generator is told, one or several; None is its own.
        cache: of a `MergeAR`: "merge", "full", or both.
        steps: of a `RandomAR`: parallel steps, one number or several; None is K.
        classes: "balanced" takes the classes in turn, "reference" takes those of the reference images, both in an order
            drawn from the seed; or classes to take in turn, numbers or names; None generates without classes, as does a
            generator that has none.
        sampling: temperature, top-k, top-p and guidance schedule. Its own guidance scale is not read.
        network: features: "inception" (gFID, its weights are downloaded once), "lite1" (from a package; other numbers,
            under other names), any module from images in [-1, 1] to features [B, D], or None.
        neighbours: the images that the generator was trained on, in which close ones are looked for, a source like
            `reference`; None takes the training part of `reference` where it has one, or else `reference` itself.
        limit: look at so many reference images, evenly spread; None takes all.
        neighbour_limit: likewise of the training images; 0 looks for no close ones.
        seed: of all images, and of the two halves of the reference that are compared with each other.
        batch_size: images at a time.
        shown: of each setting, so many images are kept for pictures.
        device: where to compute; None leaves the tokenizer where it is. All models are moved there.
        dtype: arithmetic of the generator, for example torch.bfloat16; None is float32.
        compile: compile the generator's step.
        on_images: called after each batch with its number of images, real ones included.

    Raises:
        ConfigError: an option is out of range, or there is no such class or network.
        CheckpointError: tokenizer and generator do not belong together, or a source map would have to be predicted and
            the tokenizer has no recovery; a network's weights are not here and cannot be downloaded.
        DataError: the images are missing, or none can be read.
        MissingDependencyError: a network needs a package that is not installed.
    """
    config = generator.config
    check_models(generator, tok)
    check_seed(seed)
    sampling = sampling or SamplingOptions()
    settings = all_settings(config, guidance, num_tokens, cache, steps)
    for setting in settings:
        replace(sampling, guidance=setting.guidance).check(len(config.groups))
    if min(num_images, batch_size) < 1:
        raise ConfigError(f"expected num_images and batch_size of at least 1, got {num_images} and {batch_size}")
    if (limit is not None and limit < 1) or (neighbour_limit or 0) < 0:
        raise ConfigError(
            f"expected limit of at least 1 and neighbour_limit of at least 0, got {limit} and {neighbour_limit}"
        )
    if not 0 <= shown <= MOST_SHOWN:
        raise ConfigError(f"expected 0..{MOST_SHOWN} shown images, as all are held in memory, got {shown}")
    real = evaluation_images(reference)
    known = None if neighbour_limit == 0 else training_images(reference if neighbours is None else neighbours)
    labels = image_labels(classes, config, real, num_images, seed)
    if labels is None and {setting.guidance for setting in settings} - {0.0, 1.0}:
        raise ConfigError("expected guidance 1 without classes, got another scale: there is nothing to be guided by")
    plan = Plan(
        seeds=image_seeds(torch.Generator().manual_seed(seed), num_images),
        labels=labels,
        batch_size=batch_size,
        shown=min(shown, num_images),
        options=generate_options(sampling, dtype, compile),
    )
    place = torch.device(device) if device is not None else tok.encoder.class_token.device
    features = None if network is None else feature_network(network).to(place)
    side = tok.config.downsampling * config.grid[0]
    counts = sorted({setting.num_tokens for setting in settings}, reverse=True)
    prints = real.fingerprint(), None if known is None else known.fingerprint()
    same = known is not None and are_the_same(real, limit, known, neighbour_limit)
    rows: list[GenerationRow] = []
    kept: list[tuple[Tensor, Nearest | None]] = []
    with shared_processes() as processes, evaluation_mode(generator, tok), warning_once():
        if isinstance(generator, nn.Module):
            generator.to(place)
        worker = Worker(generator, tok.to(place), features, processes, on_images)
        seen = processes.collect(lambda: worker.look(real, side, counts, batch_size, limit))
        others = seen
        if known is not None and not same:
            others = processes.collect(partial(worker.look, known, side, (), batch_size, neighbour_limit))
        training = None if known is None else TrainingSet.of(known, side, others)
        measure = Measure(seen, counts, training, same, features)

        def look() -> dict[str, Any]:
            row = asdict(measure.reference_row(num_images, seed))
            threshold = None if training is None else training.threshold
            return {
                "row": row,
                "images": measure.images,
                "threshold": threshold,
                "training": len(others.get("number", ())),
            }

        def judge(setting: Setting, made: dict[str, Tensor]) -> dict[str, Any]:
            row, closest = measure.row(setting, made)
            kept.append((in_order(made, "pixels", by="shown")[0], closest))
            return asdict(row)

        found = processes.first(look)
        for setting in settings:
            made = processes.collect(partial(worker.generate, setting, plan))
            rows.append(GenerationRow.from_json(processes.first(partial(judge, setting, made))))

    protocol = {
        "images": num_images,
        "reference": {
            "data": data_name(reference, real),
            "images": found["images"],
            "images_unreadable": looked_at(real, limit) - found["images"],
            "images_available": len(real),
            "fingerprint": prints[0],
        },
        "neighbours": None
        if known is None
        else {
            "data": data_name(reference if neighbours is None else neighbours, known),
            "images": found["training"],
            "are_the_reference": same,
            "fingerprint": prints[1],
            "close_quantile": CLOSE,
            "close_distance": found["threshold"],
        },
        "image_size": side,
        "preparation": PREPARATION,
        "rounding": "generated images clamped to [-1, 1] and rounded to bytes",
        "network": None if features is None else _network_facts(features),
        "precision_recall_neighbours": NEIGHBOURS,
        "classes": _class_facts(classes, labels),
        "sampling": _sampling_facts(plan.options),
        "seed": seed,
        "tokenizer": tok.fingerprint(),
        "decoder": weights_checksum(tok.decoder),
        "recovery": weights_checksum(tok.recovery) if config.order == "random" and tok.recovery is not None else None,
        "generator": _generator_facts(generator),
        "precision": {"generator": _dtype_name(dtype) or precision(place), "other networks": precision(place)},
        "batch_size": batch_size,
        "processes": processes.world_size,
        "hardware": hardware(place),
        "versions": versions(),
    }
    report = GenerationReport(
        rows=tuple(rows),
        reference=ReferenceRow.from_json(found["row"]),
        protocol=protocol,
        notes=(),
        samples=_samples(kept, plan, config, training, batch_size, neighbour_limit),
    )
    return replace(report, notes=generation_notes(report))


def check_models(generator: TokenGenerator, tok: MergeVQ) -> None:
    """Checks that the tokenizer can draw what the generator makes.

    Raises:
        CheckpointError: they do not belong together, or source maps would have to be predicted and there is no recovery
            model.
    """
    config, patches = generator.config, tok.config.image_size // tok.config.downsampling
    check_pair(config, grid=(patches, patches), num_bits=tok.config.num_bits, tokenizer=tok.fingerprint())
    if config.order == "random" and tok.recovery is None:
        raise CheckpointError(
            "expected a tokenizer with a recovery model, as a generator in random order makes no source maps, this one "
            "has none: train one with `mergevq train recovery`"
        )


def _network_facts(network: FeatureNetwork) -> dict[str, Any]:
    return {"name": network.name, "sha256": network.checksum, "classifier_sha256": network.classifier_checksum}


def _class_facts(classes: Any, labels: Sequence[int] | None) -> str:
    if labels is None:
        return "none"
    if isinstance(classes, str):
        return {"balanced": "all in turn", "reference": "as frequent as in the reference"}[classes]
    return f"in turn: {', '.join(map(str, classes))}"


def _sampling_facts(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "dtype": _dtype_name(options["dtype"])}


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _generator_facts(generator: TokenGenerator) -> dict[str, Any]:
    config = generator.config
    facts = {
        "order": config.order,
        "fingerprint": generator.fingerprint(),
        "width": config.width,
        "depth": config.depth,
        "groups": list(config.groups),
        "num_classes": config.num_classes,
        "trained_num_tokens": list(config.trained_num_tokens),
    }
    return {**facts, "mask": asdict(config.mask)} if config.order == "raster" else facts


def _samples(
    kept: Sequence[tuple[Tensor, Nearest | None]],
    plan: Plan,
    config: GeneratorConfig,
    training: TrainingSet | None,
    batch_size: int,
    limit: int | None,
) -> tuple[tuple[Sample, ...], ...]:
    """The first images of each setting, with their neighbours."""
    if not plan.shown or not kept:
        return tuple(() for _ in kept)
    pixels = torch.cat([shown for shown, _ in kept])
    by_pixels = [None] * len(pixels) if training is None else training.nearest_in_pixels(pixels, batch_size, limit)
    rows = []
    for r, (shown, closest) in enumerate(kept):
        samples = []
        for i, image in enumerate(shown):
            label = None if plan.labels is None else plan.labels[i]
            near = by_pixels[r * plan.shown + i]
            samples.append(
                Sample(
                    number=i,
                    seed=plan.seeds[i],
                    label=label,
                    class_name=config.class_names[label] if config.class_names and label is not None else None,
                    image=image.float() / 127.5 - 1,
                    by_features=None if training is None else training.by_features(closest, i),
                    by_pixels=None if training is None or near is None else training.neighbour(*near),
                )
            )
        rows.append(tuple(samples))
    return tuple(rows)
