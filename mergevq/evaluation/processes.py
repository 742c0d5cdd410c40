"""Sharing an evaluation between the processes of `torch.distributed`: each does its part, the first has the result."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from mergevq.errors import MergeVQError

# The first process measures distances while the others wait for it.
_PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; one by default."""

    rank: int = 0
    world_size: int = 1
    group: Any = None
    """A gloo group: it carries tensors of the CPU, whatever the training's own group does."""

    def collect(self, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Runs `work` on every process and returns its tensors, joined along axis 0 in the order of the processes.

        The tensors of one name have equal types and equal further axes; a process may leave a name out. The first
        process gets all rows, the others none. An error of one process is raised by all.

        Raises:
            MergeVQError: as raised by `work`; on the other processes it says which process failed, and why.
        """
        if self.world_size == 1:
            return {name: tensor.cpu() for name, tensor in work().items()}
        failure: MergeVQError | None = None
        tensors: dict[str, Tensor] = {}
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in work().items()}
        except MergeVQError as error:
            failure = error
        shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}
        heads = self._exchange({"error": None if failure is None else str(failure), "shapes": shapes})
        if failure is not None:
            raise failure
        for rank, head in enumerate(heads):
            if head["error"] is not None:
                raise MergeVQError(f"process {rank} of {self.world_size} failed: {head['error']}")
        names = sorted({name for head in heads for name in head["shapes"]})
        return {name: self._gather(tensors.get(name), [head["shapes"].get(name) for head in heads]) for name in names}

    def first(self, work: Callable[[], Any]) -> Any:
        """Runs `work` on the first process alone and returns its result, a JSON value, on every process.

        Raises:
            MergeVQError: as raised by `work`; on the other processes it repeats the message.
        """
        if self.world_size == 1:
            return work()
        result, failure = None, None
        if self.rank == 0:
            try:
                result = work()
            except MergeVQError as error:
                failure = error
        head = self._exchange({"result": result, "error": None if failure is None else str(failure)})[0]
        if failure is not None:
            raise failure
        if head["error"] is not None:
            raise MergeVQError(f"process 0 of {self.world_size} failed: {head['error']}")
        return result if self.rank == 0 else head["result"]

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """Runs `work` on every process and returns all results, JSON values, in the order of the processes, everywhere.

        Raises:
            MergeVQError: as raised by `work`; on the other processes it says which process failed, and why.
        """
        if self.world_size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except MergeVQError as error:
            failure = error
        heads = self._exchange({"result": result, "error": None if failure is None else str(failure)})
        if failure is not None:
            raise failure
        for rank, head in enumerate(heads):
            if head["error"] is not None:
                raise MergeVQError(f"process {rank} of {self.world_size} failed: {head['error']}")
        return [head["result"] for head in heads]

    def _exchange(self, value: Any) -> list[Any]:
        """The JSON values of all processes."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(texts, torch.nn.functional.pad(data, (0, longest - len(data))), group=self.group)
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in pairs]

    def _gather(self, rows: Tensor | None, shapes: Sequence[Sequence[Any] | None]) -> Tensor:
        known = next(shape for shape in shapes if shape is not None)
        counts = [0 if shape is None else shape[1] for shape in shapes]
        dtype = getattr(torch, known[0])
        padded = torch.zeros(max(counts), *known[2:], dtype=dtype)
        if rows is not None:
            padded[: len(rows)] = rows
        # Not the ranks of the group: gather wants the destination's number among all processes.
        if self.rank != 0:
            dist.gather(padded, None, dst=0, group=self.group)
            return torch.zeros(0, *known[2:], dtype=dtype)
        received = [torch.zeros_like(padded) for _ in counts]
        dist.gather(padded, received, dst=0, group=self.group)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)])


@contextmanager
def shared_processes() -> Iterator[Processes]:
    """Gives the processes that `torch.distributed` has started, by torchrun or Fabric or otherwise; else this one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield Processes()
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)
