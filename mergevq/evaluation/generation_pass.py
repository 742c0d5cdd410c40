"""What every process does in an evaluation of generation: look at its share of real images, generate its share of new
ones. Results are tensors with a row an image and the image's number, so that shares can be joined in any order."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.errors import DataError
from mergevq.evaluation.generation_plan import Plan
from mergevq.evaluation.generation_result import Setting
from mergevq.evaluation.processes import Processes
from mergevq.evaluation.protocol import now
from mergevq.generator.config import GeneratorConfig
from mergevq.metrics.features import FeatureNetwork
from mergevq.metrics.image import to_uint8
from mergevq.tokenizer.model import MergeVQ

ENCODED = 256
"""Real images whose distinct tokens are counted, evenly spread."""


@runtime_checkable
class TokenGenerator(Protocol):
    """What is evaluated: `MergeAR` or `RandomAR`."""

    config: GeneratorConfig

    def generate_with_stats(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        """Returns `MergedTokens` and `GenerationStats`; see `MergeAR.generate`."""

    def fingerprint(self) -> str:
        """Returns what tells it from others."""


class Worker:
    """The models, on this process's device.

    Args:
        generator: in evaluation mode.
        tok: in evaluation mode.
        network: gives features; None leaves them out.
        processes: that share the work.
        on_images: called after each batch with its number of images.
    """

    def __init__(
        self,
        generator: TokenGenerator,
        tok: MergeVQ,
        network: FeatureNetwork | None,
        processes: Processes,
        on_images: Callable[[int], None] | None,
    ) -> None:
        self.generator, self.tok, self.network, self.processes = generator, tok, network, processes
        self.on_images = on_images or (lambda _: None)
        self.device = tok.encoder.class_token.device

    @torch.no_grad()
    def look(
        self, images: ImageFolder, side: int, counts: Sequence[int], batch_size: int, limit: int | None
    ) -> dict[str, Tensor]:
        """Returns of this process's share of real images: number, features, and of some the distinct tokens at each K.

        Batches are the same for any number of processes.

        Args:
            images: all of them.
            side: pixels.
            counts: each K that some are encoded with; none skips it.
            batch_size: images at a time.
            limit: take so many, evenly spread; None takes all.
        """
        total = min(len(images), limit or len(images))
        numbers = [i * len(images) // total for i in range(total)]
        encoded = set(numbers[:: -(-total // ENCODED)]) if counts else set()
        parts = _Parts()
        batches = evaluation_batches(
            images,
            side,
            batch_size=batch_size,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            limit=limit,
            workers=2 if total > 256 else 0,
            whole_batches=True,
        )
        try:
            for batch in batches:
                pixels = to_uint8(batch["image"].to(self.device))
                parts.add(number=batch["number"])
                if self.network is not None:
                    parts.add(features=self.network(pixels))
                picked = [i for i, number in enumerate(batch["number"].tolist()) if number in encoded]
                if picked:
                    tokens = [self.tok.encode(batch["image"][picked], k) for k in counts]
                    distinct = [count_distinct(found.index, found.mask()) for found in tokens]
                    parts.add(encoded=batch["number"][picked], distinct=torch.stack(distinct, 1))
                self.on_images(len(pixels))
        except DataError:
            # This share has no readable image; whether another one has is seen when they are joined.
            if self.processes.world_size == 1:
                raise
        return parts.joined()

    @torch.no_grad()
    def generate(self, setting: Setting, plan: Plan) -> dict[str, Tensor]:
        """Returns of this process's share of generated images: number, features, tokens, distinct tokens, the first
        pictures; and of each batch its process, images, times of generating and decoding, and bytes of the cache.
        """
        raster = self.generator.config.order == "raster"
        order = {"cache": setting.cache} if raster else {"steps": setting.steps}
        parts = _Parts()
        for numbers in plan.batches(self.processes):
            batch = slice(numbers.start, numbers.stop)
            start = now(self.device)
            tokens, stats = self.generator.generate_with_stats(
                None if plan.labels is None else list(plan.labels[batch]),
                num_images=len(numbers),
                num_tokens=setting.num_tokens,
                guidance=setting.guidance,
                seeds=list(plan.seeds[batch]),
                batch_size=len(numbers),
                **order,
                **plan.options,
            )
            middle = now(self.device)
            pixels = to_uint8(self.tok.decode(tokens))
            end = now(self.device)
            number = torch.tensor(numbers)
            length = torch.full_like(number, tokens.num_patches) if raster else tokens.num_tokens
            parts.add(
                number=number,
                length=length,
                distinct=count_distinct(tokens.index, tokens.mask()),
                batch=torch.tensor([[self.processes.rank, len(numbers), stats.cache_bytes]]),
                seconds=torch.tensor([[middle - start, end - middle]], dtype=torch.float64),
            )
            if self.network is not None:
                parts.add(features=self.network(pixels))
            shown = number < plan.shown
            if shown.any():
                parts.add(shown=number[shown], pixels=pixels[shown.to(pixels.device)])
            self.on_images(len(numbers))
        return parts.joined()


def count_distinct(index: Int[Tensor, "B K"], mask: Bool[Tensor, "B K"]) -> Int[Tensor, " B"]:
    """Returns the number of different indices in each image, padding left out."""
    ordered = index.masked_fill(~mask, -1).sort(1).values
    new = torch.ones_like(mask)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).sum(1)


def in_order(found: Mapping[str, Tensor], *names: str, by: str = "number") -> list[Tensor]:
    """Returns what shares said of the same images, sorted by number; a missing name is empty."""
    order = found[by].argsort() if by in found else torch.zeros(0, dtype=torch.int64)
    return [found[name][order] if name in found else torch.zeros(0) for name in names]


@contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Puts modules in evaluation mode inside the block, and back into the mode they were in."""
    modules = [model for model in models if isinstance(model, nn.Module)]
    before = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.train(mode)


@contextmanager
def warning_once() -> Iterator[None]:
    """Lets each warning through once inside the block: every batch would repeat it."""
    log, seen = logging.getLogger("mergevq"), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known, message = len(seen), record.getMessage()
        seen.add(message)
        return len(seen) > known

    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)


class _Parts:
    """Named tensors of one batch after the other."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self._parts.setdefault(name, []).append(tensor.cpu())

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
