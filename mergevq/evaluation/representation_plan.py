"""What an evaluation of representation looks at: which features, of which models, and what they are called."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mergevq.data.folder import ImageFolder
from mergevq.errors import ConfigError, ShapeError
from mergevq.evaluation.feature_sources import (
    FeatureSetting,
    FeatureSource,
    PixelFeatures,
    TeacherFeatures,
    TokenizerFeatures,
    feature_settings,
    random_tokenizer,
)
from mergevq.evaluation.protocol import data_name
from mergevq.layers.teachers import Teacher
from mergevq.merging import check_num_tokens
from mergevq.metrics.probe_config import ProbeConfig
from mergevq.tokenizer.inputs import kept_tokens
from mergevq.tokenizer.model import MergeVQ

BASELINES = ("pixels", "random")
"""What the tokenizer is compared with by default."""

KINDS = ("class", "mean", "class+mean")
"""Kinds of features that are one vector an image."""


def choose_counts(tok: MergeVQ, num_tokens: int | Sequence[int | None] | None, size: int) -> tuple[int, ...]:
    """Returns every K to look at, largest first.

    Args:
        tok: the tokenizer.
        num_tokens: one or several; None stands for L. Empty is L and the tokenizer's own.
        size: side of the images in pixels.

    Raises:
        ShapeError: the size or a K is impossible for this tokenizer.
        ConfigError: it keeps another number of tokens than asked for, as a converted one may.
    """
    config = tok.config
    if size < config.downsampling or size % config.downsampling:
        raise ShapeError(
            f"expected a size that is a multiple of the tokenizer's downsampling {config.downsampling}, got {size}"
        )
    patches = (size // config.downsampling) ** 2
    asked = [num_tokens] if isinstance(num_tokens, int) or num_tokens is None else list(num_tokens)
    wanted = asked or [None, min(config.num_tokens, patches)]
    counts = sorted({patches if k is None else k for k in wanted}, reverse=True)
    check_num_tokens(counts, len(counts), patches)
    for k in counts:
        kept = kept_tokens(config, patches, k)
        if kept != k:
            raise ConfigError(f"expected a K that this tokenizer reaches, got {k}: it keeps {kept}, ask for that")
    return tuple(counts)


def choose_settings(
    counts: Sequence[int],
    num_patches: int,
    kinds: Sequence[str] = KINDS,
    quantized: Sequence[bool] = (False,),
    baselines: Sequence[str] = BASELINES,
    teacher: bool = False,
) -> list[FeatureSetting]:
    """Returns a setting for each row: every kind at every K, then the teacher, random weights and pixels.

    Args:
        counts: each K, largest first.
        num_patches: L.
        kinds: of features.
        quantized: whether to take codes; one answer or both.
        baselines: what to compare with. Random weights have every kind at the largest K, not quantized.
        teacher: whether there is one.

    Raises:
        ConfigError: there is no such baseline or kind, or nothing is left to look at.
    """
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ConfigError(f"expected baselines {' and '.join(BASELINES)}, got {unknown[0]!r}")
    settings = feature_settings("tokenizer", counts, num_patches, kinds, quantized)
    if teacher:
        settings.append(FeatureSetting("teacher"))
    if "random" in baselines:
        settings += feature_settings("random", counts[:1], num_patches, kinds, (False,))
    if "pixels" in baselines:
        settings.append(FeatureSetting("pixels"))
    return settings


def build_sources(
    tok: MergeVQ,
    settings: Sequence[FeatureSetting],
    teacher: Teacher | None,
    *,
    pixel_side: int,
    seed: int,
    device: torch.device,
) -> dict[str, FeatureSource]:
    """Returns what gives the features of all rows, on the device.

    Args:
        tok: the tokenizer.
        settings: of the rows.
        teacher: where a row asks for one.
        pixel_side: pixels are averaged down to this side.
        seed: of random weights.
        device: where to compute.
    """
    sources: dict[str, FeatureSource] = {}
    for name in dict.fromkeys(setting.source for setting in settings):
        own = [setting for setting in settings if setting.source == name]
        if name == "tokenizer":
            sources[name] = TokenizerFeatures(tok.to(device), own)
        elif name == "random":
            sources[name] = TokenizerFeatures(random_tokenizer(tok.config, seed).to(device), own, seed)
        elif name == "pixels":
            sources[name] = PixelFeatures(pixel_side)
        else:
            assert teacher is not None
            sources[name] = TeacherFeatures(teacher.to(device))
    return sources


def row_name(setting: FeatureSetting, sources: Mapping[str, FeatureSource]) -> str:
    """Returns what to call a row."""
    facts = sources[setting.source].facts() if setting.kind is None else {}
    if setting.source == "pixels":
        return f"pixels, {facts['side']} x {facts['side']}"
    return f"teacher {facts['name']}" if setting.source == "teacher" else setting.name()


def data_facts(data: Any, images: ImageFolder, unreadable: int) -> dict[str, Any]:
    """Returns what a result says of a part of the data.

    Args:
        data: as the caller named it.
        images: what that became.
        unreadable: of them.
    """
    counts = torch.bincount(torch.tensor(images.labels), minlength=len(images.classes))
    return {
        "data": data_name(data, images),
        "images": len(images) - unreadable,
        "images_unreadable": unreadable,
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
        "fingerprint": images.fingerprint(),
    }


def shared_images(train: ImageFolder, test: ImageFolder) -> int:
    """Returns how many test images are training images too; all of them also where one set is a copy of the other."""
    return len(test) if train.fingerprint() == test.fingerprint() else test.shared_with(train)


def division(train: ImageFolder, test: ImageFolder, shared: int) -> str:
    """Returns how training and test images are apart: "overlapping", "divided within one folder", or "separate".

    Args:
        train: the training images.
        test: the test images.
        shared: how many of these are training images too.
    """
    if shared:
        return "overlapping"
    return "divided within one folder" if train.root == test.root and not train.parts else "separate"


def probe_facts(config: ProbeConfig, ks: Sequence[int], shots: Sequence[int]) -> dict[str, Any]:
    """Returns what a result says of the probes.

    Args:
        config: how they are made.
        ks: of k-NN.
        shots: of few-shot classification.
    """
    linear = config.linear
    found: dict[str, Any] = {}
    if "knn" in config.probes:
        found["knn"] = {
            "similarity": "cosine",
            "votes": "exp(similarity / temperature)",
            "temperature": config.temperature,
            "k": list(ks),
        }
    if "linear" in config.probes:
        grid = linear.grid()
        rates = [rate for rate, _ in grid if rate is not None]
        how = {"epochs": linear.epochs, "batch_size": linear.batch_size, "schedule": "cosine to 0"}
        found["linear"] = {
            "normalised_by": "mean and variance of the training features, no parameters",
            "optimizer": linear.optimizer,
            **(how if linear.optimizer == "adamw" else {"iterations": linear.iterations}),
            "learning_rates": list(dict.fromkeys(rates)),
            "weight_decays": list(dict.fromkeys(decay for _, decay in grid)),
            "trained_again": "on all training images with the chosen settings",
        }
    if "few-shot" in config.probes:
        found["few_shot"] = {
            "classifier": "nearest class mean by cosine, the mean of the labelled images subtracted",
            "shots": list(shots),
            "draws": config.draws,
        }
    found["held_out"] = config.held_out
    found["probe_seed"] = config.seed
    return found
