"""RandomAR: only the K kept tokens, in any order of ranks, several at a time if wanted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import (
    GenerationStats,
    Request,
    compiled,
    default_batch_size,
    in_batches,
    many_graphs,
    resolve_request,
)
from mergevq.generator.model import Generator
from mergevq.generator.parallel import Plan, decode_in_parallel, group_sizes, next_group
from mergevq.generator.transformer import Instruction, Transformer
from mergevq.layers.rotary import rotation_1d
from mergevq.sampling import GuidanceSchedule, Number, SamplingOptions, image_uniforms
from mergevq.tokens import MergedTokens


class RandomAR(Generator):
    """Generates the K kept tokens of an image in random order; the tokenizer's recovery places them.

    A token is told apart by its rank r among the K, which are ordered by their first patch. Before each token stands
    the instruction of its rank, at which it is predicted: [class] [merge instruction] P_a x_a P_b x_b ... Trained on
    random orders, it can predict several tokens at once.

    Reference: MergeVQ section 4.2, equation 13; RandAR (arXiv 2412.01827).
    """

    order = "random"

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        self.rank_instruction = Instruction(config.width)
        nn.init.normal_(self.rank_instruction.vector, std=0.02)
        for layer in self.rank_instruction.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(
        self,
        index: Int[Tensor, "B K"],
        classes: Int[Tensor, " B"],
        num_tokens: Int[Tensor, " B"],
        order: Int[Tensor, "B K"],
    ) -> tuple[Tensor, ...]:
        """Returns the logits of every bit group at every token, [B, K, 2**bits] each, in order of rank. Checks nothing.

        Args:
            index: the true tokens in order of rank, padded with 0 to the largest K.
            classes: numbers; `num_classes` is no class, which training draws for some samples.
            num_tokens: K of each image.
            order: the ranks in the order in which they are predicted: a permutation of 0 .. K-1, then the padding,
                whose logits mean nothing.
        """
        transformer, prefix = self.transformer, self.config.prefix_length
        pairs = torch.stack(
            [self._instructions(order, num_tokens), transformer.embed(index.gather(1, order))], 2
        ).flatten(1, 2)
        x = torch.cat([transformer.prefix(classes, num_tokens), pairs[:, :-1]], 1)  # Nothing follows the last token.
        hidden = transformer(x, self._rotation(order)[:, :-1])[:, prefix::2]
        rank = order.argsort(1)
        return transformer.group_logits(hidden.gather(1, rank[..., None].expand_as(hidden)), index)

    def generate(
        self,
        classes: Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        num_tokens: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: Number | Sequence[Number] = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: Number = 1.0,
        guidance_interval: tuple[Number, Number] = (0.0, 1.0),
        temperature: Number | Sequence[Number] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: Number | Sequence[Number] = 1.0,
        rng: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        dtype: torch.dtype | None = None,
        on_images: Callable[[int], None] | None = None,
    ) -> MergedTokens:
        """Returns generated tokens, on the generator's device, without a source map: `MergeVQ.decode` predicts it.

        Args:
            classes: numbers or names, one image each; None is unconditional.
            num_images: how many, without classes; 1 by default.
            num_tokens: K of all images or of each, 1 .. L. None is `config.num_tokens`.
            steps: passes through the network for each batch, 1 .. K; fewer than K sample several tokens at once, see
                `parallel.group_sizes`. None is K; the paper takes K / 4.
            guidance: scale of classifier-free guidance; 1 is off, 0 is unconditional. This and the filters below take
                one value, or one for each bit group, the lowest bits first.
            guidance_schedule: how the scale moves from the first token to the last, see `sampling.guidance_scale`; the
                tokens of one step share that of the first of them.
            guidance_power: of schedule power_cosine.
            guidance_interval: of schedule interval.
            temperature: divides the logits; 0 takes the most probable.
            top_k: draw from so many most probable values only; 0 is all.
            top_p: draw from the most probable values that have this probability together; 1 is all.
            rng: gives each image its seed; None takes torch's own of the CPU.
            seeds: the seeds, one an image. An image's order of ranks depends on its seed and K, the noise of a rank on
                the seed, and neither on the batch or `steps`.
            batch_size: images at a time, all of equal K; None is `generate.default_batch_size`.
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
            steps=steps,
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
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
        steps: int | None = None,
        guidance: Number | Sequence[Number] = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        guidance_power: Number = 1.0,
        guidance_interval: tuple[Number, Number] = (0.0, 1.0),
        temperature: Number | Sequence[Number] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: Number | Sequence[Number] = 1.0,
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
        request = resolve_request(config, classes, num_images, num_tokens, rng, seeds)
        if steps is not None:
            group_sizes(min(request.num_tokens), steps)
        kind = options.branches(len(config.groups))
        if classes is None or kind == "unconditional":
            request = replace(request, classes=(config.num_classes,) * len(request))
            kind = "unconditional"
        plan = Plan(
            options,
            2 if kind == "both" else 1,
            steps,
            compiled(next_group, self.device) if compile else next_group,
            dtype or torch.float32,
        )
        if batch_size is None:
            batch_size = default_batch_size(config, plan.branches, self.device, plan.dtype.itemsize)
        # Images of equal K are sampled together, then put back in their places.
        places = sorted(range(len(request)), key=request.num_tokens.__getitem__)
        columns = (request.classes, request.num_tokens, request.seeds)
        ordered = Request(*(tuple(column[place] for place in places) for column in columns))
        parts, total, start = [], GenerationStats(0, 0.0, 0), 0
        with self.sampling_mode(dtype) as transformer, many_graphs(compile):
            for _, equal in groupby(ordered.num_tokens):
                stop = start + len([*equal])
                part, stats = in_batches(
                    ordered.part(start, stop),
                    batch_size,
                    lambda batch: self._sample_batch(transformer, batch, plan),
                    on_images,
                )
                parts.append(part)
                total, start = total.plus(stats), stop
        tokens = MergedTokens.join(parts)
        back = torch.tensor(places, device=tokens.index.device).argsort()
        return replace(tokens, index=tokens.index[back], num_tokens=tokens.num_tokens[back]), total

    # ---------------------------------------------------------------------------------------------------------- private

    def _instructions(self, ranks: Int[Tensor, "B T"], num_tokens: Int[Tensor, " B"]) -> Float[Tensor, "B T D"]:
        """Returns the instructions of ranks; the last of few tokens is told like the last of many."""
        instructions: Tensor = self.rank_instruction(ranks / num_tokens[:, None])
        return instructions

    def _rotation(self, order: Int[Tensor, "B K"]) -> Float[Tensor, "B S P 2"]:
        """Returns the rotation of prefix and pairs: instruction and token of a rank share that of the rank."""
        config = self.config
        prefix = self.transformer.rotation[: config.prefix_length].expand(order.shape[0], -1, -1, -1)
        pairs = rotation_1d(order.repeat_interleave(2, 1), config.head_width, config.rotary_base)
        return torch.cat([prefix, pairs], 1)

    def _sample_batch(
        self, transformer: Transformer, request: Request, plan: Plan
    ) -> tuple[MergedTokens, GenerationStats]:
        """Samples images of equal K."""
        began = time.perf_counter()
        config, device, num_tokens = self.config, self.device, request.num_tokens[0]
        groups = len(config.groups)
        # One more column of noise puts the ranks in order: drawn from the same seed, yet independent of the others.
        noise = torch.stack([image_uniforms(seed, num_tokens, groups + 1) for seed in request.seeds])
        order = noise[..., -1].argsort(stable=True, dim=1)
        uniforms = noise[..., :-1].gather(1, order[..., None].expand(-1, -1, groups)).to(device)
        order = order.to(device)
        # The branch without classes comes after the one with them.
        nobody = (config.num_classes,) * len(request)
        classes = torch.tensor(request.classes + nobody * (plan.branches - 1), device=device)
        counts = torch.full_like(classes, num_tokens)
        decoded = decode_in_parallel(
            transformer,
            transformer.prefix(classes, counts),
            self._instructions(order, counts[: len(request)]),
            self._rotation(order),
            uniforms,
            plan,
        )
        index = torch.zeros_like(order).scatter(1, order, decoded.index)
        tokens = MergedTokens(index, None, config.grid, config.num_bits, config.tokenizer)
        cost = (decoded.forwards, decoded.cache_bytes, decoded.cache_slots)
        return tokens, GenerationStats(len(request), time.perf_counter() - began, *cost)
