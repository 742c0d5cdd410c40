"""MergeAR's sampling: merge cache against full cache, eager against compiled, and against the release's way."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import interleaved, median, ratio, synchronize
from benchmarks.plain_sampler import PlainSampler
from mergevq import presets
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.loader import evaluation_batches
from mergevq.generator import transformer as transformer_module
from mergevq.generator.cache import FullCache, MergeCache, num_bytes, num_slots
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.raster import Batch, MergeAR, draw_token, feed_token, fill_prefix
from mergevq.sampling import SamplingOptions
from mergevq.tokenizer.model import MergeVQ

Table = tuple[str, list[dict[str, Any]], str]

CACHES = {"full": FullCache, "merge": MergeCache}
_PARTS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # Where in an image steps are timed.
_BANDWIDTH = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12}  # Bytes a second, of the card's data sheet.
_DUPLICATES = (
    "Indices are not drawn but given: those of held-out emoji, encoded by the tokenizer that comes with the package "
    "(64 pixels for L = 256, enlarged to 128 for L = 1,024), because random weights draw no duplicates."
)


def sequences(length: int, num_tokens: int, images: int) -> Tensor:
    """Returns indices in raster order [images, length] of real images encoded with `num_tokens` tokens."""
    tok = MergeVQ.from_pretrained("emoji_64")
    side = int(length**0.5) * tok.config.downsampling
    batches = evaluation_batches(EmbeddedImages("val"), side, batch_size=16, limit=images)
    return torch.cat([tok.encode(batch["image"], num_tokens).full_index() for batch in batches])


def on_grid(config: GeneratorConfig, side: int) -> GeneratorConfig:
    """Returns the configuration for a square grid, of which a row is in sight."""
    return replace(config, grid=(side, side), mask=replace(config.mask, recent=side))


def build(config: GeneratorConfig, device: str) -> MergeAR:
    torch.manual_seed(0)
    model = MergeAR(config)
    for head in model.transformer.heads.parameters():
        torch.nn.init.normal_(head, std=0.02)
    return model.to(device).eval()


class Driver:
    """Samples a batch from some step on, being told the tokens before."""

    def __init__(self, model: MergeAR, given: Tensor, cache: str, guided: bool, chunk: int = 32) -> None:
        config, device = model.config, model.device
        images, length = given.shape
        self.model, self.given, self.chunk = model, given.to(device), chunk
        groups = len(config.groups)
        options = SamplingOptions(guidance=2.0 if guided else 1.0)
        self.groups = options.per_group(groups)
        self.branches = 2 if guided else 1
        self.cache = CACHES[cache](config, images, self.branches, chunk=chunk, device=device)
        self.batch = Batch(
            torch.zeros(images, length, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.rand(images, length, groups, generator=torch.Generator().manual_seed(0)).to(device),
            torch.full((length, groups), 2.0, device=device),
            torch.zeros((), device=device),
        )
        rows = images * self.branches
        self.request = (torch.zeros(rows, dtype=torch.int64, device=device), torch.full((rows,), 64, device=device))
        self.step = 0
        self.run_step: Callable[..., None] = given_step

    def start(self) -> None:
        hidden = fill_prefix(self.model.transformer, self.cache.state, *self.request)
        draw_token(self.model.transformer, hidden, self.batch, self.groups)
        self.step = 1

    def skip_to(self, step: int) -> None:
        """Goes on without the network: the cache drops and keeps what it would, and holds zeros."""
        config = self.model.config
        while self.step < step:
            self._make_room()
            at = torch.tensor([self.step], device=self.given.device)
            self.cache.advance(
                self.cache.state, config.mask, config.prefix_length, at, self.given[:, self.step - 1].clone()
            )
            self.step += 1
        self.batch.step.fill_(self.step)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._make_room()
            self.run_step(
                self.model.transformer, self.cache.state, self.cache.advance, self.batch, self.given, self.groups
            )
            self.step += 1

    def _make_room(self) -> None:
        if (self.step - 1) % self.chunk == 0:
            self.cache.make_room(self.step)


def given_step(transformer: Any, state: Any, advance: Any, batch: Batch, given: Tensor, groups: Any) -> None:
    """A step of `mergevq.generator.raster.next_token` after a token that is given."""
    previous = given.index_select(1, batch.step - 1)[:, 0]
    draw_token(transformer, feed_token(transformer, state, advance, batch.step, previous), batch, groups)


@torch.no_grad()
def step_seconds(
    drivers: dict[str, Callable[[], Driver]], length: int, steps: int, repetitions: int
) -> dict[str, list[float]]:
    """Returns for each driver the seconds of a step, means over the positions of `_PARTS`, a number a repetition."""
    found: dict[str, list[list[float]]] = {name: [] for name in drivers}
    for part in _PARTS:
        ready = {}
        for name, make in drivers.items():
            ready[name] = make()
            ready[name].start()
            ready[name].skip_to(int(part * length))
        seconds = interleaved({name: lambda d=d: d.run(steps) for name, d in ready.items()}, repetitions)
        for name, values in seconds.items():
            found[name].append([value / steps for value in values])
    return {name: [statistics.mean(turn) for turn in zip(*parts, strict=True)] for name, parts in found.items()}


def speed(quick: bool, device: str = "cpu") -> Table:
    """Tokens and images a second of both caches, eager and compiled."""
    on_gpu = device == "cuda"
    base = presets.generator("l_256" if on_gpu else "b_256").model
    if not on_gpu:
        base = replace(base, width=512, depth=8, group_depth=1, heads=8)
    rows = []
    for length, num_tokens in ((256, 144), (256, 64), (1024, 256)):
        side = int(length**0.5)
        model = build(on_grid(base, side), device)
        for images in (1, 8) if quick else (1, 8, 64):
            given = sequences(length, num_tokens, images)
            for compiled in (False, True):
                if compiled and not on_gpu and (length > 256 or num_tokens != 144 or quick):
                    continue
                seconds = _both_caches(model, given, compiled, length, 2 if quick else 4, 2 if quick else 5)
                for name in CACHES:
                    second = median(seconds[name])
                    rows.append(
                        {
                            "L": length,
                            "K": num_tokens,
                            "batch": images,
                            "cache": name,
                            "step": "compiled" if compiled else "eager",
                            "ms a step": 1000 * second,
                            "tokens/s": images / second,
                            "images/s": images / second / length,
                            "time / full's": ratio(seconds, name, "full"),
                        }
                    )
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"Sampling with both caches, a generator of {size:.0f} million parameters",
        rows,
        f"R is a row of the grid, without guidance, float32, chunk 32. {_DUPLICATES} A step is the mean over stretches "
        "at 1/8, 3/8, 5/8 and 7/8 of the image; tokens/s and images/s follow from it.",
    )


def _both_caches(
    model: MergeAR, given: Tensor, compiled: bool, length: int, steps: int, repetitions: int
) -> dict[str, list[float]]:
    if compiled:
        # Graphs of other models and batches count too, and torch refuses the ninth of one function.
        torch.compiler.reset()
    run_step = torch.compile(given_step, fullgraph=True) if compiled else given_step

    def make(name: str) -> Driver:
        driver = Driver(model, given, name, guided=False)
        driver.run_step = run_step
        return driver

    return step_seconds({name: lambda name=name: make(name) for name in CACHES}, length, steps, repetitions)


@torch.no_grad()
def sizes(quick: bool) -> Table:
    """Slots and bytes of both caches at the end of an image; nothing is timed."""
    rows = []
    images = 8 if quick else 64
    for length, num_tokens in ((256, 144), (256, 64), (1024, 256)):
        side = int(length**0.5)
        config = replace(on_grid(presets.generator("l_256").model, side), depth=1, group_depth=0)
        model = build(config, "cpu")
        given = sequences(length, num_tokens, images)
        distinct = max(len(set(row.tolist())) for row in given)
        for chunk in (16, 32, 64):
            found = {}
            for name in CACHES:
                driver = Driver(model, given, name, guided=False, chunk=chunk)
                driver.start()
                driver.skip_to(length)
                found[name] = driver.cache.state
            # Of the 24 blocks of l_256, one was built.
            layers = [24 * found[kind].memory.num_bytes() / images for kind in ("full", "merge")]
            rows.append(
                {
                    "L": length,
                    "K": num_tokens,
                    "chunk": chunk,
                    "most distinct": distinct,
                    "slots full": num_slots(found["full"]),
                    "slots merge": num_slots(found["merge"]),
                    "bound": config.prefix_length + side + distinct + 2 * chunk - 1,
                    "MiB an image full": layers[0] / 2**20,
                    "MiB an image merge": layers[1] / 2**20,
                    "merge / full": num_slots(found["merge"]) / num_slots(found["full"]),
                    "bookkeeping KiB": (num_bytes(found["merge"]) - found["merge"].memory.num_bytes()) / images / 1024,
                }
            )
    return (
        "Slots and bytes of the caches of l_256",
        rows,
        f"R is a row of the grid, a batch of {images}, whose fullest image decides the merge cache's slots; float32, "
        "one branch. "
        f"{_DUPLICATES} The bound is prefix + R + most distinct + 2 chunk - 1.",
    )


@torch.no_grad()
def against_release(quick: bool, device: str = "cpu") -> Table:
    """l_256 with guidance against the release's way of sampling."""
    config = presets.generator("l_256").model
    if quick:
        config = replace(config, depth=2)
    model = build(config, device)
    plain_model = build(replace(config, mask=MaskConfig(recent=None)), device)
    length = config.num_patches
    rows = []
    for images in (1, 4):
        given = sequences(length, 144, images).to(device)
        _check_plain(plain_model, given)
        drivers: dict[str, Callable[[], Any]] = {
            name: partial(Driver, model, given, name, guided=True) for name in CACHES
        }
        drivers["plain"] = partial(PlainDriver, model, given)
        seconds = step_seconds(drivers, length, 1 if quick else 2, 2 if quick else 4)
        for name in drivers:
            rows.append(
                {
                    "batch": images,
                    "sampler": name,
                    "ms a step": 1000 * median(seconds[name]),
                    "s an image": median(seconds[name]) * length / images,
                    "time / plain's": ratio(seconds, name, "plain"),
                }
            )
    return (
        "l_256 with guidance, 256 tokens, against the release's way" + (" (2 of 24 blocks)" if quick else ""),
        rows,
        "Plain is re-created with our weights: static caches of the whole length, those of the bit groups allocated "
        "anew for each token; its logits equal ours under plain causal attention. The release was measured on another "
        "machine's 2 cores (with AMX): 31 s an image at batch 1, 17 s at batch 4. Eager, float32, guidance 2, K = 144. "
        f"{_DUPLICATES} Seconds an image are 256 mean steps.",
    )


class PlainDriver:
    """`PlainSampler` behind the methods of `Driver`."""

    def __init__(self, model: MergeAR, given: Tensor) -> None:
        self.inner = Driver(model, given, "full", guided=True)
        self.sampler = PlainSampler(model.transformer, 2 * given.shape[0])
        self.step = 0

    def start(self) -> list[Tensor]:
        inner = self.inner
        self.step = 1
        return self.sampler.draw_token(self.sampler.fill_prefix(*inner.request), inner.batch, 0, inner.groups)

    def skip_to(self, step: int) -> None:
        self.step = step

    def run(self, steps: int) -> list[Tensor]:
        inner, found = self.inner, []
        for _ in range(steps):
            hidden = self.sampler.feed_token(self.step, inner.given[:, self.step - 1])
            found = self.sampler.draw_token(hidden, inner.batch, self.step, inner.groups)
            self.step += 1
        return found


def _check_plain(model: MergeAR, given: Tensor, steps: int = 4) -> None:
    """The reference is one only if it computes the same."""
    plain, ours = PlainDriver(model, given), Driver(model, given, "full", guided=True)
    plain.start()
    ours.start()
    plain.run(steps)
    ours.run(steps)
    assert torch.equal(plain.inner.batch.index[:, : steps + 1], ours.batch.index[:, : steps + 1])


@torch.no_grad()
def attention_share(quick: bool, device: str = "cpu") -> Table:
    """How much of a step is attention: the same step with the attention replaced by its query."""
    config = presets.generator("l_256").model
    depth = 4 if quick or device == "cpu" else config.depth
    rows = []
    attention = transformer_module.scaled_dot_product_attention
    for length, num_tokens in ((256, 144), (1024, 256)):
        side = int(length**0.5)
        model = build(replace(on_grid(config, side), depth=depth), device)
        for images in (1, 8) if quick else (1, 8, 32):
            given = sequences(length, num_tokens, images)
            for name in CACHES:
                driver = Driver(model, given, name, guided=False)
                driver.start()
                driver.skip_to(7 * length // 8)

                def without(driver: Driver = driver) -> None:
                    transformer_module.scaled_dot_product_attention = lambda q, *_, **__: q
                    try:
                        driver.run(1)
                        synchronize()
                    finally:
                        transformer_module.scaled_dot_product_attention = attention

                seconds = interleaved({"whole": lambda d=driver: d.run(1), "without": without}, 3 if quick else 8)
                rows.append(
                    {
                        "L": length,
                        "batch": images,
                        "cache": name,
                        "slots": num_slots(driver.cache.state),
                        "ms a step": 1000 * median(seconds["whole"]),
                        "attention %": 100 * (1 - ratio(seconds, "without", "whole")),
                        **(_bandwidth(model, driver, median(seconds["whole"])) if device == "cuda" else {}),
                    }
                )
    return (
        f"Share of attention in a step of l_256{'' if depth == config.depth else f' ({depth} of its 24 blocks)'}",
        rows,
        f"At 7/8 of the image, eager, float32, without guidance. {_DUPLICATES}",
    )


def _bandwidth(model: MergeAR, driver: Driver, seconds: float) -> dict[str, Any]:
    read = sum(p.nbytes for p in model.transformer.blocks.parameters()) + driver.cache.state.memory.num_bytes()
    name = torch.cuda.get_device_name()
    peak = next((value for card, value in _BANDWIDTH.items() if card in name), None)
    return {"GB/s": read / seconds / 1e9, "of the card %": None if peak is None else 100 * read / seconds / peak}
