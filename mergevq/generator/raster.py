"""MergeAR: every patch in raster order, one after the other, with duplicates leaving the attention's memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError
from mergevq.generator.cache import Advance, FullCache, MergeCache, State, num_bytes, num_slots
from mergevq.generator.generate import (
    GenerationStats,
    Request,
    compiled,
    default_batch_size,
    in_batches,
    many_graphs,
    non_finite,
    resolve_request,
)
from mergevq.generator.masks import attention_bias
from mergevq.generator.model import Generator
from mergevq.generator.transformer import Transformer
from mergevq.sampling import (
    GroupSampling,
    GuidanceSchedule,
    Number,
    SamplingOptions,
    draw,
    filter_logits,
    guide,
    image_uniforms,
)
from mergevq.tokens import MergedTokens


class MergeAR(Generator):
    """Generates the codebook index of all L patches in raster order; equal ones become one token of the result.

    A token sees the R right before it, and of older tokens with equal index only one, so the keys and values of the
    others can be dropped. `mask.recent = None` drops nothing, which is LlamaGen.

    Reference: MergeVQ section 4.1.
    """

    order = "raster"

    def forward(
        self,
        index: Int[Tensor, "B L"],
        classes: Int[Tensor, " B"],
        num_tokens: Int[Tensor, " B"],
        duplicates: Int[Tensor, "B L"] | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns the logits of every bit group at every patch, [B, L, 2**bits] each. Checks nothing.

        Args:
            index: the true index of every patch.
            classes: numbers; `num_classes` is no class, which training draws for some samples.
            num_tokens: K of each image, for the instruction.
            duplicates: labels of the patches, the source map for example: equal ones count as duplicates in the mask.
                None takes the index.
        """
        transformer, prefix = self.transformer, self.config.prefix_length
        bias = attention_bias(index if duplicates is None else duplicates, self.config.mask, prefix)
        x = torch.cat([transformer.prefix(classes, num_tokens), transformer.embed(index[:, :-1])], 1)
        hidden = transformer(x, transformer.rotation[: x.shape[1]], bias)
        return transformer.group_logits(hidden[:, prefix - 1 :], index)

    def generate(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        num_tokens: int | Sequence[int] | None = None,
        guidance: Number | Sequence[Number] = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: Number = 1.0,
        guidance_interval: tuple[Number, Number] = (0.0, 1.0),
        temperature: Number | Sequence[Number] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: Number | Sequence[Number] = 1.0,
        cache: Literal["merge", "full"] = "merge",
        chunk: int = 32,
        rng: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        on_images: Callable[[int], None] | None = None,
    ) -> MergedTokens:
        """Returns generated tokens with their source map, on the generator's device, for `MergeVQ.decode`.

        Patches of equal index share a token, so K of the result is the number of distinct indices of an image.

        Args:
            classes: numbers or names, one image each; None is unconditional.
            num_images: how many, without classes; 1 by default.
            num_tokens: K that is asked for, of all images or of each, 1 .. L: an instruction, no guarantee. None is
                `config.num_tokens`.
            guidance: scale of classifier-free guidance; 1 is off, 0 is unconditional. This and the filters below take
                one value, or one for each bit group, the lowest bits first.
            guidance_schedule: how the scale moves from the first patch to the last, see `sampling.guidance_scale`.
            guidance_power: of schedule power_cosine.
            guidance_interval: of schedule interval.
            temperature: divides the logits; 0 takes the most probable.
            top_k: draw from so many most probable values only; 0 is all.
            top_p: draw from the most probable values that have this probability together; 1 is all.
            cache: merge drops keys and values that no later token sees, full keeps them; the tokens are the same, up
                to the rounding of sums.
            chunk: the cache grows by so many slots, at most L, and is looked after every so many steps.
            rng: gives each image its seed; None takes torch's own of the CPU.
            seeds: the seeds, one an image: an image depends on its seed and what is asked for, not on the batch.
            batch_size: images at a time; None is `generate.default_batch_size`.
            compile: compile the step with torch.compile, which pays off for many images.
            dtype: arithmetic of the network, such as torch.bfloat16. None is float32, also inside autocast.
            on_images: called after each batch with its number of images.

        Raises:
            ConfigError: an argument is out of range.
            MissingDependencyError: nothing here can compile.
            ShapeError: the network's numbers are not finite.
        """
        tokens, _ = self.generate_with_stats(
            classes,
            num_images=num_images,
            num_tokens=num_tokens,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            cache=cache,
            chunk=chunk,
            rng=rng,
            seeds=seeds,
            batch_size=batch_size,
            compile=compile,
            dtype=dtype,
            on_images=on_images,
        )
        return tokens

    def generate_with_stats(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        num_tokens: int | Sequence[int] | None = None,
        guidance: Number | Sequence[Number] = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: Number = 1.0,
        guidance_interval: tuple[Number, Number] = (0.0, 1.0),
        temperature: Number | Sequence[Number] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: Number | Sequence[Number] = 1.0,
        cache: Literal["merge", "full"] = "merge",
        chunk: int = 32,
        rng: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        on_images: Callable[[int], None] | None = None,
    ) -> tuple[MergedTokens, GenerationStats]:
        """Returns what `generate` returns, and what it cost; arguments and errors are the same."""
        config = self.config
        options = SamplingOptions(
            temperature, top_k, top_p, guidance, guidance_schedule, guidance_power, guidance_interval
        )
        options.check(len(config.groups))
        if cache not in ("merge", "full"):
            raise ConfigError(f"expected cache merge or full, got {cache!r}")
        if not isinstance(chunk, int) or chunk < 1:
            raise ConfigError(f"expected a whole number for chunk of at least 1, got {chunk!r}")
        request = resolve_request(config, classes, num_images, num_tokens, rng, seeds)
        kind = options.branches(len(config.groups))
        if classes is None or kind == "unconditional":
            request = replace(request, classes=(config.num_classes,) * len(request))
            kind = "unconditional"
        plan = Plan(
            # Guidance comes as a tensor: compiled code would be compiled again for every scale.
            tuple(group._replace(guidance=1.0) for group in options.per_group(len(config.groups))),
            2 if kind == "both" else 1,
            # With R = None nothing is dropped, and both caches are one.
            MergeCache if cache == "merge" and config.mask.recent is not None else FullCache,
            min(chunk, config.num_patches),
            compiled(next_token, self.device) if compile else next_token,
            dtype or torch.float32,
        )
        if batch_size is None:
            batch_size = default_batch_size(config, plan.branches, self.device, plan.dtype.itemsize)
        scales = torch.tensor(
            [options.scales(len(config.groups), t / max(1, config.num_patches - 1)) for t in range(config.num_patches)]
        )
        with self.sampling_mode(dtype) as transformer, many_graphs(compile):
            return in_batches(
                request, batch_size, lambda part: _sample_batch(transformer, part, plan, scales), on_images
            )


# ------------------------------------------------------------------------------------------------------------- sampling


class Batch(NamedTuple):
    """A batch on its way, written in place."""

    index: Int[Tensor, "B L"]  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    """Codebook indices, as far as they are known."""
    step: Int[Tensor, " 1"]
    """t, the token that is predicted next."""
    uniforms: Float[Tensor, "B L G"]
    """Noise of each draw."""
    scales: Float[Tensor, "L G"]
    """Guidance."""
    total: Float[Tensor, ""]
    """Sum of all guided logits so far, which is not finite if one of them was not: looked at once, at the end."""


@dataclass(frozen=True)
class Plan:
    """What does not change from step to step."""

    groups: tuple[GroupSampling, ...]
    branches: int
    cache: type[MergeCache] | type[FullCache]
    chunk: int
    next_token: Callable[..., None]
    dtype: torch.dtype


def _sample_batch(
    transformer: Transformer, request: Request, plan: Plan, scales: Tensor
) -> tuple[MergedTokens, GenerationStats]:
    config, device = transformer.config, transformer.norm.weight.device
    start, length, images = time.perf_counter(), config.num_patches, len(request)
    noise = torch.stack([image_uniforms(seed, length, len(config.groups)) for seed in request.seeds])
    batch = Batch(
        torch.zeros(images, length, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        noise.to(device),
        scales.to(device),
        torch.zeros((), device=device),
    )
    # The branch without classes comes after the one with them.
    nobody = (config.num_classes,) * images
    classes = torch.tensor(request.classes + nobody * (plan.branches - 1), device=device)
    num_tokens = torch.tensor(request.num_tokens * plan.branches, device=device)
    cache = plan.cache(config, images, plan.branches, chunk=plan.chunk, device=device, dtype=plan.dtype)
    draw_token(transformer, fill_prefix(transformer, cache.state, classes, num_tokens), batch, plan.groups)
    for step in range(1, length):
        if (step - 1) % plan.chunk == 0:
            cache.make_room(step)
        plan.next_token(transformer, cache.state, plan.cache.advance, batch, plan.groups)
    if not bool(torch.isfinite(batch.total)):
        raise non_finite()
    seconds = time.perf_counter() - start
    tokens = MergedTokens.from_full_index(batch.index, config.grid, config.num_bits, config.tokenizer)
    return tokens, GenerationStats(images, seconds, length, num_bytes(cache.state), num_slots(cache.state))


def fill_prefix(
    transformer: Transformer, state: State, classes: Int[Tensor, " rows"], num_tokens: Int[Tensor, " rows"]
) -> Float[Tensor, "rows D"]:
    """Writes class and instruction to an empty cache; returns what predicts the first token.

    Args:
        transformer: in evaluation mode.
        state: of the cache.
        classes: of each image, once for each branch of guidance.
        num_tokens: likewise.
    """
    prefix = transformer.prefix(classes, num_tokens)
    slots = torch.arange(prefix.shape[1], device=prefix.device)
    seen = torch.arange(num_slots(state), device=prefix.device) <= slots[:, None]
    bias = torch.where(seen, 0.0, -torch.inf)[None, None]
    hidden = transformer(prefix, transformer.rotation[: prefix.shape[1]], bias, state.memory, slots)
    return hidden[:, -1]


def feed_token(
    transformer: Transformer, state: State, advance: Advance, step: Int[Tensor, " 1"], previous: Int[Tensor, " B"]
) -> Float[Tensor, "rows D"]:
    """Writes token t - 1 to a cache; returns what predicts token t.

    Args:
        transformer: in evaluation mode.
        state: of a cache that holds the tokens before, with room for one more.
        advance: of that cache.
        step: t.
        previous: the codebook indices of token t - 1.
    """
    config = transformer.config
    slots, bias = advance(state, config.mask, config.prefix_length, step, previous)
    branches = state.memory.keys[0].shape[0] // previous.shape[0]
    if slots.ndim == 2:
        slots = slots.repeat(branches, 1)
    x = transformer.embed(previous[:, None]).repeat(branches, 1, 1)
    rotation = transformer.rotation.index_select(0, config.prefix_length - 1 + step)
    hidden: Tensor = transformer(x, rotation, bias.repeat(branches, 1, 1, 1), state.memory, slots)
    return hidden[:, 0]


def next_token(
    transformer: Transformer, state: State, advance: Advance, batch: Batch, groups: tuple[GroupSampling, ...]
) -> None:
    """Draws token t of every image from the tokens before it; compiles as one graph.

    Args:
        transformer: in evaluation mode.
        state: of a cache with room for token t - 1.
        advance: of that cache.
        batch: t is its step; receives the token.
        groups: how each bit group is sampled, but for guidance.
    """
    previous = batch.index.index_select(1, batch.step - 1)[:, 0]
    draw_token(transformer, feed_token(transformer, state, advance, batch.step, previous), batch, groups)


def draw_token(
    transformer: Transformer, hidden: Float[Tensor, "rows D"], batch: Batch, groups: tuple[GroupSampling, ...]
) -> None:
    """Draws token t of every image from what predicts it, and moves on to t + 1; arguments as for `next_token`."""
    uniform = batch.uniforms.index_select(1, batch.step)[:, 0]
    scale = batch.scales.index_select(0, batch.step)[0]
    guided = hidden.shape[0] > uniform.shape[0]

    def choose(group: int, logits: Tensor) -> Tensor:
        logits = logits.float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, scale[group])
        batch.total.add_(logits.sum())
        how = groups[group]
        return draw(filter_logits(logits, how.temperature, how.top_k, how.top_p), uniform[:, group])

    batch.index.index_copy_(1, batch.step, transformer.sample_groups(hidden, choose)[:, None])
    batch.step.add_(1)
