"""What an evaluation of generation generates: the settings, and in all of them the same classes and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch

from mergevq.data.folder import ImageFolder
from mergevq.errors import ConfigError
from mergevq.evaluation.generation_result import Setting
from mergevq.evaluation.processes import Processes
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import resolve_classes
from mergevq.sampling import Number, SamplingOptions

MOST_SHOWN = 256
"""Generated images kept for pictures at most, of each setting."""

Classes = Literal["balanced", "reference"] | Sequence[int | str] | None
"""Which classes images are generated of; see `evaluate_generation`."""


@dataclass(frozen=True)
class Plan:
    """All images that are generated in each setting."""

    seeds: Sequence[int]
    """One an image, the same in every setting."""
    labels: Sequence[int] | None
    """Class of each image; None without classes."""
    batch_size: int
    """Batches are the same for any number of processes, and so are the images."""
    shown: int
    """The first images are kept."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `generate`, equal in all settings."""

    def batches(self, processes: Processes) -> list[range]:
        """Returns the numbers of the images in each batch of this process."""
        count = len(self.seeds)
        whole = [range(i, min(i + self.batch_size, count)) for i in range(0, count, self.batch_size)]
        return whole[processes.rank :: processes.world_size]


def all_settings(
    config: GeneratorConfig,
    guidance: Number | Sequence[Number],
    num_tokens: int | Sequence[int] | None,
    cache: str | Sequence[str],
    steps: int | Sequence[int] | None,
) -> list[Setting]:
    """Returns every combination of the values, guidance changing fastest.

    Raises:
        ConfigError: a value is out of range or does not go with the generator's order, or there is none, or one twice.
    """
    scales = [float(scale) for scale in _several(guidance)]
    counts = _several(config.num_tokens if num_tokens is None else num_tokens)
    found = []
    if config.order == "raster":
        if steps is not None:
            raise ConfigError("expected steps for a generator in random order only, this one goes in raster order")
        for count, kind, scale in product(counts, _several(cache), scales):
            found.append(Setting(scale, count, cache=kind))
    else:
        for count, step, scale in product(counts, _several(steps), scales):
            found.append(Setting(scale, count, steps=count if step is None else step))
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"expected at least one setting and none twice, got {len(found)}")
    for setting in found:
        if not 1 <= setting.num_tokens <= config.num_patches:
            raise ConfigError(f"expected num_tokens in 1..{config.num_patches}, got {setting.num_tokens}")
        if setting.cache not in (None, "merge", "full"):
            raise ConfigError(f"expected cache merge or full, got {setting.cache!r}")
        if setting.steps is not None and not 1 <= setting.steps <= setting.num_tokens:
            raise ConfigError(f"expected steps in 1..{setting.num_tokens}, the number of tokens, got {setting.steps}")
    return found


def looked_at(images: ImageFolder, limit: int | None) -> int:
    """Returns how many images are looked at; None is all."""
    return len(images) if limit is None else min(len(images), limit)


def are_the_same(
    reference: ImageFolder, limit: int | None, neighbours: ImageFolder, neighbour_limit: int | None
) -> bool:
    """Says whether the reference images that are looked at are also those in which close ones are looked for."""
    if looked_at(reference, limit) != looked_at(neighbours, neighbour_limit):
        return False
    return reference.fingerprint() == neighbours.fingerprint()


def image_labels(
    classes: Classes, config: GeneratorConfig, real: ImageFolder, count: int, seed: int
) -> list[int] | None:
    """Returns the class of each image, None without classes.

    Args:
        classes: which.
        config: of the generator.
        real: the reference images.
        count: images.
        seed: of the order in which classes are taken.

    Raises:
        ConfigError: there is no such class, or the reference has other classes than the generator.
    """
    if classes is None or (config.num_classes == 0 and isinstance(classes, str)):
        return None
    if not isinstance(classes, str):
        numbers = resolve_classes(classes, config)
        if not numbers:
            raise ConfigError("expected at least one class, got none: None generates without classes")
        return [numbers[i % len(numbers)] for i in range(count)]
    if classes == "balanced":
        pool = list(range(config.num_classes))
    elif classes == "reference":
        names = config.class_names or real.classes
        if tuple(real.classes) != tuple(names) or len(names) != config.num_classes:
            raise ConfigError(
                f"expected a reference with the generator's {config.num_classes} classes to take them from it, got "
                f"{len(real.classes)} classes: use classes balanced"
            )
        pool = [label for label in real.labels if label >= 0]
    else:
        raise ConfigError(f"expected classes balanced, reference, or a list, got {classes!r}")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pool[order[i % len(pool)]] for i in range(count)]


def generate_options(sampling: SamplingOptions, dtype: torch.dtype | None, compile: bool) -> dict[str, Any]:
    """Returns the options of `generate` that are equal in all settings.

    Args:
        sampling: its guidance scale is not read.
        dtype: arithmetic of the generator.
        compile: compile its step.
    """
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "guidance_schedule": sampling.schedule,
        "guidance_power": sampling.power,
        "guidance_interval": sampling.interval,
        "dtype": dtype,
        "compile": compile,
    }


def _several(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
