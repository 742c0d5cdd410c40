"""Batches in an order that depends on (seed, batch number, process) alone: a resumed run sees what it would have seen.

Batch g of W processes with B images each is the same W * B images, in the same order, as batch g of one process with
W * B images; process r gets the r-th slice.
"""

import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mergevq.data.augment import Views, sample_rng, training_crops
from mergevq.data.folder import ImageFolder
from mergevq.data.images import all_unreadable, center_square, stack_images
from mergevq.errors import ConfigError, DataError

_log = logging.getLogger("mergevq")
_LOGGED = 5  # Unreadable images named in the log; `ImageFolder.unreadable` has all.
_ORDER = 2**40  # In place of a sample's number, for the draw of an epoch's order.

Batch = dict[str, Tensor]
"""image Float[B, 3, S, S] in [-1, 1]; label Int[B], -1 without classes; number Int[B] of each image in its data set;
in training also view_student Float[B, 3, V, V] and view_teacher Float[B, 3, T, T] in [-1, 1] if they were asked for."""


class Draw(NamedTuple):
    """One sample of a run."""

    number: int
    """Of the image in the data set."""
    epoch: int
    position: int
    """In the epoch's order, over all processes."""


def batches_per_epoch(num_images: int, batch_size: int, world_size: int = 1) -> int:
    """Returns how many batches each process sees in an epoch; what does not fill a batch is left for another epoch."""
    return max(1, num_images // (batch_size * world_size))


def training_batches(
    dataset: ImageFolder,
    views: Views,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    start_batch: int = 0,
) -> Iterator[Batch]:
    """Yields training batches for ever, each epoch in a new order.

    A data set smaller than `batch_size * world_size` is repeated within the batch, with other crops. Does not touch
    the global random state.

    Args:
        dataset: the images.
        views: which crops of each image.
        batch_size: images in a batch of one process.
        seed: of order and crops.
        rank: number of this process.
        world_size: how many processes share each global batch.
        workers: processes that read images; 0 reads in this one, as a data set with cached images always does.
        start_batch: batches that an earlier part of the run has seen.
    """
    if workers < 0:
        raise ConfigError(f"workers must be at least 0, got {workers}")
    order = EpochOrder(len(dataset), batch_size, seed, rank, world_size, start_batch)
    return _load(dataset, _Training(dataset, views, seed), order, workers)


def evaluation_batches(
    dataset: ImageFolder,
    size: int,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    workers: int = 0,
    whole_batches: bool = False,
) -> Iterator[Batch]:
    """Yields every image once, in order, its middle square resized to `size`; unreadable ones are left out.

    Args:
        dataset: the images.
        size: side in pixels.
        batch_size: images in a batch; the last batch, and one with unreadable images, has fewer.
        rank: number of this process, which gets every `world_size`-th image.
        world_size: how many processes share the images.
        limit: take only so many, evenly spread over the data set; None takes all.
        workers: processes that read images; 0 reads in this one, as a data set with cached images always does.
        whole_batches: give this process every `world_size`-th batch of those that one process would see, instead of
            batches of its own images. Then no number depends on how many processes there are, as the last digits of a
            network's output may depend on the batch; but a process may have a batch more than another, or none.

    Raises:
        DataError: this process could read none of its images.
    """
    total = len(dataset)
    count = total if limit is None else min(limit, total)
    if batch_size < 1 or count < 1:
        raise ConfigError(f"expected a batch_size and a limit of at least 1, got {batch_size} and {limit}")
    numbers = [i * total // count for i in range(count)]
    mine = numbers if whole_batches else numbers[rank::world_size]
    order = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    if whole_batches:
        order = order[rank::world_size]
    return _load(dataset, _Evaluation(dataset, size), order, workers)


class EpochOrder(Sampler[list[Draw]]):
    """The samples of each batch of one process, without end.

    Args:
        num_images: in the data set.
        batch_size: samples in a batch of one process.
        seed: of the order.
        rank: number of this process.
        world_size: how many processes share each global batch.
        start: batches that an earlier part of the run has seen.

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int, world_size: int, start: int) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("start_batch", start, 0)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed
        self._rank, self._world_size, self._start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Draw]]:
        per_epoch = batches_per_epoch(self._num_images, self._batch_size, self._world_size)
        epoch, batch = divmod(self._start, per_epoch)
        while True:
            order = torch.randperm(self._num_images, generator=sample_rng(self._seed, epoch, _ORDER)).tolist()
            for number in range(batch, per_epoch):
                first = (number * self._world_size + self._rank) * self._batch_size
                positions = range(first, first + self._batch_size)
                yield [Draw(order[at % self._num_images], epoch, at) for at in positions]
            epoch, batch = epoch + 1, 0


class _Item(NamedTuple):
    crops: dict[str, Image.Image]
    """Empty if the image could not be read."""
    label: int
    number: int
    unreadable: list[tuple[str, str]]
    """Name and reason of images that this process found unreadable since the last item."""


class _Training(Dataset[_Item]):
    def __init__(self, dataset: ImageFolder, views: Views, seed: int) -> None:
        self._dataset, self._views, self._seed = dataset, views, seed
        self._reported = 0

    def __getitem__(self, draw: Draw) -> _Item:
        sample = self._dataset[draw.number]
        crops = training_crops(sample.image, self._views, sample_rng(self._seed, draw.epoch, draw.position))
        fresh = list(self._dataset.unreadable.items())[self._reported :]
        self._reported += len(fresh)
        return _Item(crops, sample.label, sample.number, fresh)


class _Evaluation(Dataset[_Item]):
    def __init__(self, dataset: ImageFolder, size: int) -> None:
        self._dataset, self._size = dataset, size

    def __getitem__(self, number: int) -> _Item:
        try:
            sample = self._dataset.read(number)
        except DataError as error:
            return _Item({}, -1, number, [(self._dataset.name(number), str(error))])
        return _Item({"image": center_square(sample.image, self._size)}, sample.label, number, [])


def _collate(items: Sequence[_Item]) -> dict[str, Any]:
    kept = [item for item in items if item.crops]
    batch: dict[str, Any] = {"unreadable": [found for item in items for found in item.unreadable]}
    if kept:
        for name in kept[0].crops:
            batch[name] = stack_images([item.crops[name] for item in kept])
        batch["label"] = torch.tensor([item.label for item in kept])
        batch["number"] = torch.tensor([item.number for item in kept])
    return batch


def _load(dataset: ImageFolder, items: Dataset[_Item], order: Any, workers: int) -> Iterator[Batch]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loader = DataLoader(
        items,
        batch_sampler=order,
        num_workers=0 if dataset.cached else min(workers, cores),
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Without it the loader draws from the global generator, and a resumed run would differ.
        generator=torch.Generator(),
        worker_init_fn=_ignore_stop_requests,
    )
    logged: set[str] = set()
    some = False
    others = set(multiprocessing.active_children())
    batches: Any = iter(loader)
    readers = [child for child in multiprocessing.active_children() if child not in others]
    # Python ends leftover readers by the SIGTERM that they ignore, and then waits for them: end them before it does.
    at_exit = multiprocessing.util.Finalize(None, _end_at_exit, (readers,), exitpriority=0)
    try:
        for batch in batches:
            for name, reason in batch.pop("unreadable"):
                dataset.unreadable.setdefault(name, reason)
                if name not in logged and len(logged) < _LOGGED:
                    _log.warning("left out an unreadable image: %s", reason)
                logged.add(name)
            if batch:
                some = True
                yield batch
    except DataError as error:  # From a worker it comes with the traceback in its text; the last line is ours.
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("mergevq.errors.DataError: ")) from error
    finally:
        # The iterator lets its readers go when it is dropped; a traceback may keep it for long.
        if readers:
            batches._shutdown_workers()
        at_exit.cancel()
    if logged and not some:
        raise DataError(f"{dataset.root}: {all_unreadable(len(logged), next(iter(dataset.unreadable.values())))}")


def _ignore_stop_requests(worker: int) -> None:
    """Lets the training process decide when its readers end: Ctrl-C, Slurm and systemd signal the whole group.

    The readers notice by themselves when the training process is gone.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def _end_at_exit(readers: Sequence[multiprocessing.process.BaseProcess]) -> None:
    if threading.current_thread() is threading.main_thread():
        # torch watches its readers by this signal, to tell of one that died.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for reader in readers:
        if reader.is_alive():
            reader.kill()
