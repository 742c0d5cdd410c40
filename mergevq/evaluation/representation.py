"""How well features tell classes apart: probes of every kind at every K, beside baselines under the same protocol."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.errors import ConfigError
from mergevq.evaluation.feature_cache import FeatureCache
from mergevq.evaluation.generation_pass import evaluation_mode, warning_once
from mergevq.evaluation.processes import Processes, shared_processes
from mergevq.evaluation.protocol import PREPARATION, hardware, precision, versions
from mergevq.evaluation.representation_data import check_enough, probe_images
from mergevq.evaluation.representation_notes import representation_notes
from mergevq.evaluation.representation_pairs import pair_rows
from mergevq.evaluation.representation_plan import (
    BASELINES,
    KINDS,
    build_sources,
    choose_counts,
    choose_settings,
    data_facts,
    division,
    probe_facts,
    row_name,
    shared_images,
)
from mergevq.evaluation.representation_probe import choose_ks, choose_shots, probe_row, read_row
from mergevq.evaluation.representation_result import RepresentationReport
from mergevq.layers.teachers import load_teacher
from mergevq.metrics.probe import TOP
from mergevq.metrics.probe_config import ProbeConfig
from mergevq.tokenizer.model import MergeVQ


def evaluate_representation(
    tok: MergeVQ,
    train: str | Path | ImageFolder,
    test: str | Path | ImageFolder | None = None,
    *,
    num_tokens: int | Sequence[int | None] | None = (),
    kinds: Sequence[str] = KINDS,
    quantized: Sequence[bool] = (False,),
    baselines: Sequence[str] = BASELINES,
    teacher: str | nn.Module | None = None,
    pixel_side: int = 16,
    probes: ProbeConfig | None = None,
    size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    test_fraction: float = 0.2,
    cache: str | Path | None = None,
    force: bool = False,
    batch_size: int = 16,
    shard_size: int = 1024,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> RepresentationReport:
    """Returns how well k-NN, linear and few-shot probes tell classes apart by features, and how it was measured.

    There is a row for each kind of features at each K, and one for each baseline; all have the same images, the same
    probes and the same choices to make. Images are the middle square, not mirrored or otherwise augmented; features are
    computed in float32, stored, and read by every probe. Whatever is chosen (k, learning rate, weight decay) is chosen
    on a held-out part of the training images.

    Under `torch.distributed` (torchrun, Fabric) every process calls this with equal arguments and does its share: of
    the shards of features, then of the rows. All return the same report, which does not depend on how many they are.

    Args:
        tok: the tokenizer.
        train: images with classes: a folder with a folder for each class, a .zip, a pattern that names several .zip
            files, "embedded", or a data set. Of a source with parts, its part train.
        test: likewise; None takes the held-out part of `train`, or, where there is none, a share of its images.
        num_tokens: one K or several, 1 .. L; None stands for L, which merges nothing. Empty takes L and the tokenizer's
            own K.
        kinds: of features: "class", "mean", "class+mean".
        quantized: whether to take codes instead of semantic tokens: (False,), (True,) or both.
        baselines: "pixels", the images themselves; "random", the same configuration before training, every kind at the
            largest K.
        teacher: another network in the same table: its name (see `load_teacher`), or a module from images in [-1, 1]
            to features [B, D], which resizes and normalises by itself.
        pixel_side: pixels are averaged down to this side.
        probes: which probes, and how; None is the default.
        size: side in pixels of the images; None takes the size the tokenizer was trained with.
        train_limit: take so many training images, evenly spread; None takes all.
        test_limit: likewise of the test images.
        test_fraction: share of `train` that becomes the test set if there is no other; a hash of the names chooses it.
        cache: folder that keeps the features. An interrupted evaluation goes on with what is there, and another one
            with other probes reads it. Several machines need one that all of them see. None keeps nothing.
        force: where `cache` holds features of another model, other images or other kinds, begin anew.
        batch_size: images at a time.
        shard_size: images in a file of features; what an interruption loses at most.
        device: where to compute; the models are moved there. None leaves the tokenizer where it is.
        seed: of the random weights. Probes have their own.
        on_images: called with numbers of images: of each batch, and after the probes of a row of the test images.

    Raises:
        ConfigError: an option is out of range, or there is no such kind or teacher.
        ShapeError: a K or the size is impossible for this tokenizer, or features are not finite.
        DataError: images or classes are missing, or differ between training and test; or there are fewer training
            images than k or shots.
        OutputExistsError: `cache` holds other features.
        MissingDependencyError, CheckpointError: the teacher cannot be had.
    """
    probes = probes or ProbeConfig()
    if min(batch_size, shard_size, pixel_side) < 1:
        raise ConfigError(
            f"expected batch_size, shard_size and pixel_side of at least 1, got {batch_size}, {shard_size} and "
            f"{pixel_side}"
        )
    first, second = probe_images(
        train, test, test_fraction=test_fraction, train_limit=train_limit, test_limit=test_limit
    )
    check_enough(first.labels, first.classes, probes)
    side = tok.config.image_size if size is None else size
    counts = choose_counts(tok, num_tokens, side)
    patches = (side // tok.config.downsampling) ** 2
    settings = choose_settings(counts, patches, kinds, quantized, baselines, teacher is not None)
    other = None if teacher is None else load_teacher(teacher)
    place = torch.device(device) if device is not None else tok.encoder.class_token.device
    sources = build_sources(tok, settings, other, pixel_side=pixel_side, seed=seed, device=place)
    names = [row_name(setting, sources) for setting in settings]
    advance = on_images or (lambda _: None)
    with (
        shared_processes() as processes,
        evaluation_mode(tok, other),
        warning_once(),
        _folder(cache, processes) as folder,
    ):
        store = FeatureCache(
            folder,
            sources,
            sorted({name for setting in settings for name in setting.arrays()}),
            {"train": first, "test": second},
            size=side,
            batch_size=batch_size,
            shard_size=shard_size,
            device=place,
        )
        start = time.perf_counter()
        processes.first(lambda: store.claim(force))
        processes.each(lambda: store.fill(processes, advance))
        lost = processes.first(lambda: {part: len(store.unreadable(part)) for part in ("train", "test")})
        labels = processes.first(lambda: {part: store.labels(part).tolist() for part in ("train", "test")})
        middle = time.perf_counter()

        def probe() -> list[Any]:
            found = []
            for number in range(processes.rank, len(settings), processes.world_size):
                found.append(probe_row(settings[number], names[number], store, first.classes, probes, place))
                advance(len(second))
            return found

        shares = processes.each(probe)
        seconds = {"features": middle - start, "probes": time.perf_counter() - middle}
        world = processes.world_size
    made = [shares[number % world][number // world] for number in range(len(settings))]
    found = [read_row(each) for each in made]
    counted = torch.bincount(torch.tensor(labels["train"]), minlength=len(first.classes))
    shared = shared_images(first, second)
    protocol = {
        "train": data_facts(train, first, lost["train"]),
        "test": data_facts(train if test is None else test, second, lost["test"]),
        "train_and_test": division(first, second, shared),
        "shared_images": shared,
        "image_size": side,
        "preparation": PREPARATION,
        "rounding": "images are bytes; features are not rounded",
        "view": "one, as cropped; no augmentation",
        "num_patches": patches,
        "features": {
            "class token": "as the attention stack leaves it, before the alignment head",
            "mean of tokens": "semantic tokens before quantization, weighted by their size",
            "mean of codes": "codes -1/+1 after quantization, weighted by token size",
        },
        "encoders": {name: source.facts() for name, source in sources.items()},
        "precision": precision(place),
        **probe_facts(probes, choose_ks(probes, len(labels["train"])), choose_shots(probes, int(counted.min()))),
        "seed": seed,
        "batch_size": batch_size,
        "processes": world,
        "hardware": hardware(place),
        "versions": versions(),
    }
    report = RepresentationReport(
        rows=tuple(row for row, _ in found),
        classes=tuple(first.classes),
        reference=_reference(counted, labels["test"]),
        protocol=protocol,
        notes=(),
        seconds=seconds,
        pictures=tuple(pictures for _, pictures in found),
        pairs=pair_rows([row for row, _ in found], [each["hits"] for each in made]),
    )
    return report.with_notes(representation_notes(report))


def _reference(counted: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """What is right without looking at any feature."""
    frequent = counted.sort(descending=True, stable=True).indices[:TOP]
    right = torch.tensor(labels)[:, None] == frequent
    return {
        "majority_top1": float(right[:, 0].double().mean()),
        "majority_top5": float(right.any(1).double().mean()),
        "chance_top1": 1 / len(counted),
        "chance_top5": min(1.0, TOP / len(counted)),
    }


@contextmanager
def _folder(cache: str | Path | None, processes: Processes) -> Iterator[Path]:
    """Where features lie: the caller's folder, or one that is removed at the end."""
    if cache is not None:
        yield Path(cache)
        return
    folder = Path(processes.first(lambda: tempfile.mkdtemp(prefix="mergevq-features-")))
    try:
        yield folder
    finally:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
