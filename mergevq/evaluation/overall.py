"""Everything about a tokenizer at once: what it loses, what can be generated with it, what its features tell."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mergevq.configuration import check_seed, config_to_dict
from mergevq.data.folder import ImageFolder
from mergevq.evaluation.feature_sources import TeacherFeatures
from mergevq.evaluation.generation import check_models, evaluate_generation
from mergevq.evaluation.generation_pass import TokenGenerator
from mergevq.evaluation.generation_plan import all_settings
from mergevq.evaluation.kept_parts import FEATURES, KeptParts, Part
from mergevq.evaluation.overall_images import image_facts
from mergevq.evaluation.overall_plan import (
    MOST_GENERATED,
    choose_images,
    choose_parts,
    identity,
    usual_counts,
)
from mergevq.evaluation.overall_report import section
from mergevq.evaluation.overall_result import EvaluationReport
from mergevq.evaluation.page import check_packages
from mergevq.evaluation.processes import Processes, shared_processes
from mergevq.evaluation.protocol import PREPARATION, data_name, hardware, precision, versions
from mergevq.evaluation.reconstruction import evaluate_reconstruction
from mergevq.evaluation.representation import evaluate_representation
from mergevq.evaluation.representation_plan import BASELINES, KINDS, choose_counts, choose_settings
from mergevq.evaluation.sanity import MOST_IMAGES, evaluate_sanity
from mergevq.layers.pretrained import weights_checksum
from mergevq.layers.teachers import load_teacher
from mergevq.metrics.features import feature_network
from mergevq.metrics.probe_config import ProbeConfig
from mergevq.sampling import Number, SamplingOptions
from mergevq.tokenizer.model import MergeVQ

Advance = Callable[[int], None]
"""Is told how many more images are done."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Is given a part's name and number of images."""


def evaluate_all(
    tok: MergeVQ,
    generator: TokenGenerator | None,
    data: str | Path | ImageFolder,
    *,
    train: str | Path | ImageFolder | None = None,
    out: str | Path | None = None,
    parts: Sequence[str] = (),
    num_tokens: int | Sequence[int] = (),
    num_images: int | None = None,
    guidance: Number | Sequence[Number] = 1.0,
    sampling: SamplingOptions | None = None,
    network: str | nn.Module | None = "lite1",
    perceptual: str | nn.Module | None = "lite0",
    predict_source: bool = False,
    probes: ProbeConfig | None = None,
    teacher: str | nn.Module | None = None,
    teacher_weights: str | Path | None = None,
    size: int | None = None,
    limit: int | None = None,
    train_limit: int | None = None,
    batch_size: int = 16,
    examples: int = 8,
    shown: int = 16,
    device: torch.device | str | None = None,
    seed: int = 0,
    force: bool = False,
    name: str = "tokenizer",
    command: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Returns how good a tokenizer is by every measure that its data allow, and how that was measured.

    Four parts, each as the function of its name does it: reconstruction (`evaluate_reconstruction`), generation
    (`evaluate_generation`, with a generator), representation (`evaluate_representation`, with labelled images), and
    sanity (`evaluate_sanity`: what the metrics say of the originals, shuffled, blurred, noised). A part that is not
    possible is left out, and the result says why.

    Under `torch.distributed` every process calls this with equal arguments; generation and representation are shared.
    All return the same numbers, the first also the pages.

    Args:
        tok: the tokenizer.
        generator: a `MergeAR` or a `RandomAR` trained with it, or None.
        data: the images to measure on: a folder, a .zip, a pattern that names several .zip files, "embedded", or a
            data set. Of a source with parts, the held-out part.
        train: the images to train probes on, and in which those closest to generated ones are looked for. None takes
            the training part of `data`; where there is none, all of `data`, a fifth of which probes are tested on.
        out: folder that keeps finished parts and features. Called again with the same models, images and settings,
            what is there is not made again. None keeps nothing.
        parts: of "reconstruction", "generation", "representation" and "sanity"; empty makes all that are possible. One
            that is named has to be.
        num_tokens: every K; empty takes L, the tokenizer's own and a quarter of L. A generator has its own K.
        num_images: generated in each setting; None takes as many as reference images, at most 5,000.
        guidance: scales, of a generator with classes; 1 is off.
        sampling: as for `evaluate_generation`.
        network: of features, for all distances: "inception", "lite1", a module, or None.
        perceptual: "lite0", "lpips", a module, or None.
        predict_source: also decode with the source map that recovery predicts.
        probes: which probes, and how; None is the default.
        teacher: another network in the table of probes, by name or as a module.
        teacher_weights: a .safetensors file of the weights of a timm model named as teacher; None takes or downloads
            the hub's.
        size: side in pixels of the images that are encoded; None takes the size the tokenizer was trained with.
        limit: look at so many held-out images, evenly spread; None takes all.
        train_limit: likewise of training images.
        batch_size: images at a time.
        examples: images with their reconstructions in the page.
        shown: generated images in the page, of each setting.
        device: where to compute; the models are moved there. None leaves the tokenizer where it is.
        seed: of everything random but the probes, which have their own.
        force: make everything anew, whatever `out` holds.
        name: what to call the tokenizer in table, page and card.
        command: what makes this result again, for the card; None writes the call.
        progress: a function of a part's name and its number of images, giving a context with a function to be told how
            many more images are done.

    Raises:
        ConfigError: an option is out of range, or a part asked for by name has no generator.
        ShapeError: a K or the size is impossible for this tokenizer.
        DataError: images are missing or cannot be read; or representation is asked for by name and has no labels.
        CheckpointError: tokenizer and generator do not belong together; a network cannot be had; or a kept part is
            damaged or of another version.
        OutputExistsError: `out` holds parts of another model, other images or other settings, or other files.
        MissingDependencyError: a network needs a package that is not installed.
    """
    check_seed(seed)
    probes = probes or ProbeConfig()
    place = torch.device(device) if device is not None else tok.encoder.class_token.device
    images = choose_images(data, train, probes, limit=limit, train_limit=train_limit)
    wanted, missing = choose_parts(parts, generator is not None, images)
    side = tok.config.image_size if size is None else size
    counts = choose_counts(tok, num_tokens, side) if num_tokens else usual_counts(tok, side)
    features = None if network is None else feature_network(network).to(place)
    looked_at = min(len(images.held_out), limit or len(images.held_out))
    # Of all weights: the fingerprint is the identity of the tokens, whatever decodes them. Of the images their
    # fingerprint alone, however their folder is written and wherever it lies.
    common = {
        "tokenizer": weights_checksum(tok),
        "configuration": config_to_dict(tok.config),
        "set of images": images.held_out.fingerprint(),
        "limit": limit,
        "image size": side,
        "feature network": identity(features),
        "batch size": batch_size,
        "seed": seed,
        "kind of device": place.type,
        "versions": versions(),
    }
    pairs: dict[str, Any] = {
        "network": features,
        "perceptual": perceptual,
        "batch_size": batch_size,
        "device": place,
        "seed": seed,
    }
    jobs: dict[str, _Job] = {}
    if "reconstruction" in wanted:
        jobs["reconstruction"] = _Job(
            {"num_tokens": counts, "perceptual": identity(perceptual), "predicted": predict_source, "shown": examples},
            looked_at,
            lambda advance: evaluate_reconstruction(
                tok,
                images.held_out,
                counts,
                predict_source=predict_source,
                size=side,
                limit=limit,
                examples=examples,
                on_images=advance,
                **pairs,
            ),
        )
    if "generation" in wanted and generator is not None:
        check_models(generator, tok)
        made = min(looked_at, MOST_GENERATED) if num_images is None else num_images
        settings = all_settings(generator.config, guidance, None, "merge", None)
        known = min(len(images.training), train_limit or len(images.training))
        jobs["generation"] = _Job(
            {
                "generator": generator.fingerprint(),
                "settings": [asdict(setting) for setting in settings],
                "sampling": None if sampling is None else asdict(sampling),
                "number of images": made,
                "training images": images.training.fingerprint(),
                "train_limit": train_limit,
                "shown": shown,
            },
            made * len(settings) + looked_at + known,
            lambda advance: evaluate_generation(
                generator,
                tok,
                images.held_out,
                num_images=made,
                guidance=guidance,
                sampling=sampling,
                neighbours=images.training,
                limit=limit,
                neighbour_limit=train_limit,
                network=features,
                batch_size=batch_size,
                shown=shown,
                device=place,
                seed=seed,
                on_images=advance,
            ),
            shared=True,
        )
    folder = None if out is None else Path(out)
    if "representation" in wanted and images.probes is not None:
        first, second = images.probes
        other = None if teacher is None else load_teacher(teacher, weights=teacher_weights)
        patches = (side // tok.config.downsampling) ** 2
        rows = len(choose_settings(counts, patches, KINDS, (False,), BASELINES, other is not None))
        jobs["representation"] = _Job(
            {
                "num_tokens": counts,
                "training images": first.fingerprint(),
                "test images": second.fingerprint(),
                "probes": config_to_dict(probes),
                "teacher": None if other is None else TeacherFeatures(other).facts(),
            },
            len(first) + (1 + rows) * len(second),
            lambda advance: evaluate_representation(
                tok,
                first,
                second,
                num_tokens=counts,
                teacher=other,
                probes=probes,
                size=side,
                cache=None if folder is None else folder / FEATURES,
                force=force,
                batch_size=batch_size,
                device=place,
                seed=seed,
                on_images=advance,
            ),
            shared=True,
        )
    if "sanity" in wanted:
        few = min(limit or MOST_IMAGES, MOST_IMAGES)
        jobs["sanity"] = _Job(
            {"perceptual": identity(perceptual), "at most": few},
            min(looked_at, few),
            lambda advance: evaluate_sanity(images.held_out, side, limit=few, on_images=advance, **pairs),
        )
    if folder is not None:
        check_packages()
    kept = KeptParts(folder, {part: {**common, **job.depends} for part, job in jobs.items()}, force)
    with shared_processes() as processes:
        processes.first(kept.claim)
        found = {part: _make(part, job, kept, processes, progress or _silent) for part, job in jobs.items()}
        results = {part: made.result for part, made in found.items()}
        facts = processes.first(lambda: image_facts(images.held_out, images.training, limit, results))
        world = processes.world_size
    protocol = {
        "data": data_name(data, images.held_out),
        "fingerprint": common["set of images"],
        **facts,
        "images_limit": limit,
        "images_training": len(images.training),
        "image_size": side,
        "preparation": PREPARATION,
        "rounding": "reconstructions and generated images clamped to [-1, 1] and rounded to bytes",
        "reference_set": "the images looked at, the same for reconstructed and for generated ones",
        "num_tokens": list(counts),
        "network": identity(features),
        "perceptual": identity(perceptual),
        "tokenizer": {"name": name, "fingerprint": tok.fingerprint(), "sha256": common["tokenizer"]},
        "generator": None if generator is None or "generation" in missing else generator.fingerprint(),
        "precision": precision(place),
        "seed": seed,
        "probe_seed": probes.seed,
        "batch_size": batch_size,
        "processes": world,
        "hardware": hardware(place),
        "versions": versions(),
    }
    return EvaluationReport(found, missing, protocol, command or _call(data, generator, counts, limit, seed))


class _Job(NamedTuple):
    """How a part is made."""

    depends: dict[str, Any]
    """All that its result depends on and the results of other parts do not."""
    images: int
    """To look at, for the progress bar."""
    make: Callable[[Advance], Any]
    """Returns its report."""
    shared: bool = False
    """All processes work on it, instead of the first alone."""


def _make(name: str, job: _Job, kept: KeptParts, processes: Processes, progress: Progress) -> Part:
    """Returns a part, from the folder if it is there."""
    there = processes.first(lambda: kept.read(name))
    if there is not None:
        return Part(there["result"], lambda: there["section"])
    reports: list[Any] = []
    with progress(name, job.images) as advance:

        def work() -> Any:
            reports.append(job.make(advance))
            # What comes back from a file, so that nothing depends on whether it did.
            return json.loads(json.dumps(reports[0].to_json(), allow_nan=False))

        # Of what all made, the first has the samples.
        mine = work() if job.shared else None
        result = processes.first((lambda: mine) if job.shared else work)
    if processes.rank:
        return Part(result, str)
    if kept.folder is None:
        return Part(result, lambda: section(name, reports[0]))
    html = section(name, reports[0])
    kept.write(name, result, html)
    return Part(result, lambda: html)


@contextmanager
def _silent(name: str, total: int) -> Iterator[Advance]:
    yield lambda done: None


def _call(data: Any, generator: Any, counts: Sequence[int], limit: int | None, seed: int) -> str:
    """How this is done again in Python, up to what has no short name."""
    source = repr(str(data)) if isinstance(data, str | Path) else "data"
    options = f"num_tokens={tuple(counts)}, limit={limit}, seed={seed}"
    return f"mergevq.evaluate_all(tok, {'None' if generator is None else 'generator'}, {source}, {options})"
