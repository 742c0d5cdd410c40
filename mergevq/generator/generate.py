"""What both generators do before and around sampling: what is asked for, checked; batches; what it cost."""

import difflib
import logging
import math
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch

from mergevq.configuration import check_is, check_seed
from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError, ShapeError
from mergevq.files import read_header
from mergevq.generator.config import GeneratorConfig
from mergevq.model_files import find_model_file, shipped_names
from mergevq.sampling import image_seeds
from mergevq.tokens import MergedTokens

if TYPE_CHECKING:
    from mergevq.generator.random_order import RandomAR
    from mergevq.generator.raster import MergeAR

_MAX_BATCH = 64
_CPU_CACHE_BYTES = 2**30
_MOST_GRAPHS = 2**16  # As good as no limit, but a number.


@dataclass(frozen=True)
class Request:
    """What every image is asked to be, one entry an image."""

    classes: tuple[int, ...]
    """`num_classes` is no class."""
    num_tokens: tuple[int, ...]
    """K."""
    seeds: tuple[int, ...]
    """Of all noise of the image, which therefore does not depend on the batch."""

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, start: int, stop: int) -> "Request":
        """Returns some of the images."""
        return Request(self.classes[start:stop], self.num_tokens[start:stop], self.seeds[start:stop])


@dataclass(frozen=True)
class GenerationStats:
    """What generating cost."""

    images: int
    seconds: float
    """Wall-clock time of sampling, the first compilation included."""
    forwards: int
    """Passes through the blocks over positions, of all batches together."""
    cache_bytes: int = 0
    """Keys and values of the batch that has most, at its end, bookkeeping included: a cache only grows."""
    cache_slots: int = 0
    """Most keys that a token attended to, masked ones included."""

    def plus(self, other: "GenerationStats") -> "GenerationStats":
        """Returns the cost of both, one after the other."""
        return GenerationStats(
            self.images + other.images,
            self.seconds + other.seconds,
            self.forwards + other.forwards,
            max(self.cache_bytes, other.cache_bytes),
            max(self.cache_slots, other.cache_slots),
        )


# ---------------------------------------------------------------------------------------------------------- the request


def resolve_request(
    config: GeneratorConfig,
    classes: Sequence[int | str] | None,
    num_images: int | None,
    num_tokens: int | Sequence[int] | None,
    rng: torch.Generator | None,
    seeds: Sequence[int] | None,
) -> Request:
    """Returns what each image is asked to be.

    Args:
        config: of the generator.
        classes: numbers or names, one image each; None is no class.
        num_images: how many without classes, 1 by default.
        num_tokens: K of all images or of each; None is `config.num_tokens`. Logs a warning outside
            `config.trained_num_tokens`.
        rng: gives each image a seed; None takes torch's own.
        seeds: the seeds themselves.

    Raises:
        ConfigError: a class is unknown, a K is outside 1..L, a seed has more than 64 bits, one of these is no whole
            number, or the numbers of classes, images, K and seeds differ.
    """
    if rng is not None:
        check_is(rng, torch.Generator, "torch.Generator().manual_seed(0), or give seeds, one an image")
    if classes is None:
        count = 1 if num_images is None else num_images
        numbers = [config.num_classes] * count
    else:
        numbers = resolve_classes(classes, config)
        count = len(numbers)
        if num_images not in (None, count):
            raise ConfigError(f"expected one image a class, got {count} classes and num_images {num_images}")
    if count < 1:
        raise ConfigError("expected at least one image to generate, got none")
    kept = resolve_num_tokens(num_tokens, count, config)
    if seeds is None:
        return Request(tuple(numbers), tuple(kept), tuple(image_seeds(rng, count)))
    if rng is not None:
        raise ConfigError("expected rng or seeds, got both: rng would only make seeds")
    if _is_one(seeds):
        raise ConfigError(f"expected a list of seeds, one an image, got {seeds!r}: put it in brackets")
    given = tuple(check_seed(seed) for seed in seeds)
    if len(given) != count:
        raise ConfigError(f"expected {count} seeds, one an image, got {len(given)}")
    return Request(tuple(numbers), tuple(kept), given)


def resolve_classes(classes: Sequence[int | str], config: GeneratorConfig) -> list[int]:
    """Returns the numbers of classes given by number or name; a word is a number only if no class has that name.

    Raises:
        ConfigError: one is unknown; the message has the nearest names.
    """
    if isinstance(classes, str | int):
        raise ConfigError(f"expected a list of classes, one an image, got {classes!r}: put it in brackets")
    if config.num_classes == 0 and len(classes):
        raise ConfigError("expected no classes for this unconditional generator: leave them out")
    # Of equal names the first counts.
    words = {word.casefold(): number for number, word in reversed([*enumerate(config.class_names)])}
    return [_class_number(name, words, config) for name in classes]


def _class_number(name: int | str, words: dict[str, int], config: GeneratorConfig) -> int:
    if isinstance(name, str) and name.casefold() in words:
        return words[name.casefold()]
    if not isinstance(name, str) or re.fullmatch("-?[0-9]{1,9}", name):
        try:
            # Also of numpy and torch; 1.7 is no class.
            number = int(name) if isinstance(name, str) else operator.index(name)
        except TypeError:
            raise ConfigError(f"expected classes that are whole numbers or names, got {name!r}") from None
        if not 0 <= number < config.num_classes:
            raise ConfigError(f"expected classes 0..{config.num_classes - 1}, got {number}")
        return number
    if not config.class_names:
        raise ConfigError(
            f"expected a class number 0..{config.num_classes - 1}, got {name!r}: this generator knows no names"
        )
    near = difflib.get_close_matches(name.casefold(), words, n=3, cutoff=0.5)
    some = [config.class_names[words[word]] for word in near] or config.class_names[:5]
    raise ConfigError(f"expected a class such as {', '.join(some)}, got {name!r}, which this generator never saw")


def resolve_num_tokens(num_tokens: int | Sequence[int] | None, count: int, config: GeneratorConfig) -> list[int]:
    """Returns K of each image; logs a warning where the generator was trained on others.

    Raises:
        ConfigError: a K is outside 1..L, or there are not `count` of them.
    """
    if num_tokens is None:
        num_tokens = config.num_tokens
    given: Any = [num_tokens] * count if _is_one(num_tokens) else num_tokens
    try:
        kept = [operator.index(k) for k in given]
    except TypeError:
        raise ConfigError(f"expected num_tokens of whole numbers, got {num_tokens!r}") from None
    if len(kept) != count:
        raise ConfigError(f"expected one num_tokens, or {count}, one an image, got {len(kept)}")
    if not 1 <= min(kept) <= max(kept) <= config.num_patches:
        strange = min(kept) if min(kept) < 1 else max(kept)
        raise ConfigError(f"expected num_tokens in 1..{config.num_patches}, got {strange}")
    low, high = config.trained_num_tokens
    untrained = sorted({k for k in kept if not low <= k <= high})
    if untrained:
        logging.getLogger("mergevq").warning(
            "num_tokens %s: this generator was trained on %d..%d, expect worse images",
            ", ".join(map(str, untrained[:3])),
            low,
            min(high, config.num_patches),
        )
    return kept


def _is_one(numbers: Any) -> bool:
    """Whether something is one number, also one of numpy or torch, and not several."""
    return not isinstance(numbers, Iterable) or getattr(numbers, "ndim", 1) == 0


def check_pair(config: GeneratorConfig, *, grid: tuple[int, int] | None, num_bits: int, tokenizer: str | None) -> None:
    """Checks that a tokenizer, or a cache of its tokens, belongs to a generator.

    Args:
        config: of the generator.
        grid: rows and columns of the tokenizer's patches; None if images of several sizes are encoded.
        num_bits: bits of its indices.
        tokenizer: its fingerprint; None if nobody knows.

    Raises:
        CheckpointError: it has another grid or other bits, or the generator was trained on another one's tokens.
    """
    if num_bits != config.num_bits or (grid is not None and tuple(grid) != config.grid):
        place = "" if grid is None else f"grid {grid[0]}x{grid[1]} and "
        raise CheckpointError(
            f"expected a tokenizer of grid {config.grid[0]}x{config.grid[1]} and {config.num_bits} bits for this "
            f"generator, got {place}{num_bits} bits: use the one it was trained with"
        )
    if None not in (tokenizer, config.tokenizer) and tokenizer != config.tokenizer:
        raise CheckpointError(
            f"expected tokenizer {str(config.tokenizer)[:12]} for this generator, got {str(tokenizer)[:12]}: "
            "use the one it was trained with"
        )


# ------------------------------------------------------------------------------------------------------------- batches


def compiled(step: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns a sampling step compiled as one graph.

    Args:
        step: the function.
        device: where it will run.

    Raises:
        MissingDependencyError: code for a CPU goes through a C++ compiler, and there is none.
    """
    if device.type == "cpu":
        names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "cl"]
        if not any(shutil.which(name) for name in names):
            raise MissingDependencyError(
                f"expected a C++ compiler ({', '.join(names)}) to compile the step for a CPU, found none: install one, "
                "or leave compile off"
            )
    return torch.compile(step, fullgraph=True)


@contextmanager
def many_graphs(wanted: bool) -> Iterator[None]:
    """Lets a compiled step have as many graphs as it is asked for; stands around the calls, which compile.

    torch counts the graphs of a function over all of a process: each model, cache, branch count, dtype and set of
    filters takes some, and where one graph is demanded the ninth is an error.

    Args:
        wanted: whether anything is compiled; False does nothing.
    """
    if not wanted:
        yield
        return
    import torch._dynamo  # Takes a second, and only compiling needs it.

    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    with config.patch({limit: _MOST_GRAPHS, f"accumulated_{limit}": _MOST_GRAPHS}):
        yield


def default_batch_size(config: GeneratorConfig, branches: int, device: torch.device, item_bytes: int = 4) -> int:
    """Returns how many images are sampled together: at most 64, and so many that uncompressed keys and values fill no
    more than 1 GiB, or a quarter of a GPU's memory.

    Args:
        config: of the generator.
        branches: 2 with guidance.
        device: where.
        item_bytes: of a number in the cache.
    """
    slots = config.prefix_length + config.num_patches * (2 if config.order == "random" else 1)
    image = 2 * branches * config.depth * config.num_kv_heads * config.head_width * slots * item_bytes
    room = _CPU_CACHE_BYTES
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // 4
    return max(1, min(_MAX_BATCH, room // image))


def in_batches(
    request: Request,
    batch_size: int,
    sample: Callable[[Request], tuple[MergedTokens, GenerationStats]],
    on_images: Callable[[int], None] | None,
) -> tuple[MergedTokens, GenerationStats]:
    """Returns what `sample` makes of the request, cut into batches of even size.

    Args:
        request: all images.
        batch_size: the most at a time.
        sample: makes one batch.
        on_images: is told after each batch how many images it had.
    """
    if batch_size < 1:
        raise ConfigError(f"expected batch_size of at least 1, got {batch_size}")
    # Even batches: a short last one would be compiled again and costs nearly as much as a full one.
    batch_size = math.ceil(len(request) / math.ceil(len(request) / batch_size))
    parts: list[MergedTokens] = []
    total = GenerationStats(0, 0.0, 0)
    for start in range(0, len(request), batch_size):
        tokens, stats = sample(request.part(start, start + batch_size))
        parts.append(tokens)
        total = total.plus(stats)
        if on_images is not None:
            on_images(stats.images)
    return MergedTokens.join(parts), total


def non_finite(what: str = "the logits") -> ShapeError:
    """Returns the error for numbers that are not finite."""
    return ShapeError(f"expected finite numbers in {what}, got NaN or infinity: the model's weights are damaged")


# ------------------------------------------------------------------------------------------------------------- loading


def load_generator(name: str | Path, *, device: torch.device | str = "cpu") -> Union["MergeAR", "RandomAR"]:
    """Returns the generator of either order in a file, a folder or a hub repository, in evaluation mode.

    Args:
        name: see `MergeAR.from_pretrained`. Of generators that come with the package under one name this is the one
            in raster order; the other has "_random" behind its name.
        device: where to put it.

    Raises:
        CheckpointError: there is no such generator, or it cannot be loaded.
    """
    from mergevq.generator.model import read_config  # Both import this module.
    from mergevq.generator.random_order import RandomAR
    from mergevq.generator.raster import MergeAR

    stem = str(name).removesuffix("_random")
    if stem != str(name) and stem in shipped_names() and not Path(name).exists():
        return RandomAR.from_pretrained(find_model_file(stem, role="random_ar"), device=device)
    path = find_model_file(name, role="merge_ar")
    order = read_config(read_header(path), path).order
    return (MergeAR if order == "raster" else RandomAR).from_pretrained(path, device=device)
