"""Options that several verbs share: how they are written, and what their values become."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Protocol

import tyro

from mergevq.errors import ConfigError
from mergevq.tokenizer.config import TokenizerConfig


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

Model = Annotated[str, tyro.conf.arg(metavar="M")]
"""A model file, the folder of a training run, or a Hugging Face hub id."""


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

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA.
        raise ConfigError(f"expected a device that torch can use here (auto, cpu, cuda, ...), got {name!r}") from error
    return name


def check_batch_size(batch_size: int) -> None:
    """Checks the number of images that are worked on at a time.

    Raises:
        ConfigError: it is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"expected --batch-size to be at least 1, got {batch_size}")


def choose_size(config: TokenizerConfig, size: int | None, counts: Sequence[int]) -> int:
    """Returns the side that images are resized to, `size` or the training images', having checked every K for it.

    Raises:
        ConfigError: the downsampling does not divide the size, or a K lies outside 1 .. L.
    """
    step = config.downsampling
    side = config.image_size if size is None else size
    if side < step or side % step:
        raise ConfigError(f"expected --size to be a multiple of the model's downsampling {step}, got {side}")
    num_patches = (side // step) ** 2
    for k in counts:
        if not 1 <= k <= num_patches:
            raise ConfigError(
                f"expected --num-tokens in 1..{num_patches} ({num_patches} patches at {side} x {side} pixels), got {k}"
            )
    return side


class Advance(Protocol):
    """Moves a progress bar on."""

    def __call__(self, done: int) -> None: ...


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
