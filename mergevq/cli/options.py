"""Options that several verbs share: how they are written, and what their values become."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import tyro

from mergevq.errors import ConfigError, DataError, WriteError
from mergevq.tokenizer.config import TokenizerConfig

# Patches on a side. Merging compares half of the patches with the other half, in float32: 4 * (256**2 / 2)**2 bytes.
_MOST_PATCHES = 256


def _read_counts(words: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in words[0].split(","))
    except ValueError as error:
        raise ValueError(f"expected whole numbers with commas between, such as 144,64, got {words[0]!r}") from error


def _is_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(k, int) for k in value)


def read_numbers(words: list[str]) -> tuple[int, ...]:
    """Returns whole numbers written with commas, with spaces, or both.

    Raises:
        ValueError: a word is none, in words for the parser's message.
    """
    return tuple(number for word in words for number in _read_counts([word.removesuffix(",")]))


def _write_counts(counts: tuple[int, ...]) -> list[str]:
    return [",".join(map(str, counts))]


Counts = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="K,...",
        instance_from_str=_read_counts,
        is_instance=_is_counts,
        str_from_instance=_write_counts,
    ),
    tyro.conf.arg(help_behavior_hint="(default: the model's)"),
]
"""Several K, written 256,144,64. Empty, the default, is the model's own K."""

Size = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: the model's)")]
"""Side of the images in pixels."""


def read_classes(words: str) -> list[str]:
    """Returns the numbers and names in a list with commas between, as words: only the generator knows whether 10 is a
    name. What is empty is left out.
    """
    return [word.strip() for word in words.split(",") if word.strip()]


def choose_device(name: str) -> str:
    """Returns the torch name of a device; auto is CUDA where there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if gpus else "cpu"
    if not gpus and re.fullmatch(r"cuda(:\d+)?", name):
        raise ConfigError(f"expected a device that is there, got {name}, no CUDA device here: use cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without that kind.
        there = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(f"expected a device that is there ({', '.join(there)}), got {name!r}") from error
    return name


def check_batch_size(batch_size: int) -> None:
    """Checks the number of images that are worked on at a time.

    Raises:
        ConfigError: it is below 1.
    """
    check_at_least_one("--batch-size", batch_size)


def check_at_least_one(option: str, *values: int | None) -> None:
    """Checks numbers before anything is loaded; None is a number that is not given.

    Raises:
        ConfigError: one is below 1.
    """
    for value in values:
        if value is not None and value < 1:
            raise ConfigError(f"expected {option} to be at least 1, got {value}")


def check_source(source: str | Path, what: str = "a folder of images or a .zip") -> None:
    """Checks that there are images by a name, before anything is loaded; opening them checks more.

    Raises:
        DataError: there is nothing.
    """
    path = Path(source)
    if str(source) != "embedded" and not path.exists() and not {*"*?["} & {*path.name}:
        raise DataError(f"expected {what} at {source}, got nothing there: check the path")


def choose_size(config: TokenizerConfig, size: int | None, counts: Sequence[int]) -> int:
    """Returns the side that images are resized to, `size` or the training images', having checked every K for it.

    Raises:
        ConfigError: the size is too small or too large, the downsampling does not divide it, or a K lies outside
            1 .. L.
    """
    step = config.downsampling
    side = config.image_size if size is None else size
    if side < step:
        raise ConfigError(f"expected --size of at least {step}, the model's downsampling, got {side}")
    if side % step:
        raise ConfigError(f"expected --size to be a multiple of the model's downsampling {step}, got {side}")
    if side > _MOST_PATCHES * step:
        raise ConfigError(
            f"expected --size of at most {_MOST_PATCHES * step} ({_MOST_PATCHES} x {_MOST_PATCHES} patches, at which "
            f"merging needs 4 GiB an image), got {side}"
        )
    num_patches = (side // step) ** 2
    for k in counts:
        if not 1 <= k <= num_patches:
            raise ConfigError(
                f"expected --num-tokens in 1..{num_patches} ({num_patches} patches at {side} x {side} pixels), got {k}"
            )
    return side


def counted(count: int, what: str) -> str:
    """Returns "1 image", "1,200 images"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, done: int) -> None: ...


@contextmanager
def goes_on(how: str) -> Iterator[None]:
    """Says how an interrupted command, or one that ran out of room, goes on: "the same command with --resume"."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"{how} goes on with what is missing") from stop
    except WriteError as error:
        raise WriteError(f"{error}; then {how} goes on with what is missing") from error


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Gives a function to tell how many more images are done; on a terminal a bar shows the rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(done: int) -> None:
            bar.advance(task, done)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:.1f} images/s" if speed else "")

        yield advance
