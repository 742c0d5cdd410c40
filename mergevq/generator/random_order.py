"""RandomAR: only the K kept tokens, in any order of ranks, several at a time if wanted."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mergevq.errors import ConfigError
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.model import Generator
from mergevq.generator.transformer import Instruction
from mergevq.layers.rotary import rotation_1d


def group_sizes(num_tokens: int, steps: int) -> tuple[int, ...]:
    """Returns how many tokens each step of parallel decoding samples: few at first, more the more is known.

    After step s of S, K (1 - cos(pi s / 2S)) tokens are done, but at least one more than before, and always so few that
    each step to come has one.

    Args:
        num_tokens: K.
        steps: S, 1 .. K; K is one at a time.

    Raises:
        ConfigError: steps is out of range.

    Reference: the schedule of RandAR (arXiv 2412.01827), which MergeVQ section 4.2 samples with.
    """
    if not 1 <= steps <= num_tokens:
        raise ConfigError(f"expected steps in 1..{num_tokens}, the number of tokens, got {steps}")
    done, sizes = 0, []
    for step in range(1, steps + 1):
        wanted = round(num_tokens * (1 - math.cos(math.pi / 2 * step / steps)))
        after = min(max(wanted, done + 1), num_tokens - (steps - step))
        sizes.append(after - done)
        done = after
    return tuple(sorted(sizes))  # Rounding may have put a larger step before a smaller one.


def step_bias(
    begin: int, first: int, end: int, capacity: int, device: torch.device | str | None = None
) -> Float[Tensor, "1 1 T S"]:
    """Returns what the slots fed in one step of parallel decoding see, 0 or -inf: T = end - begin, S = `capacity`.

    Slots from `begin` to `first` are finished pairs (or the prefix) and see every slot up to their own. Those from
    `first` to `end` are instructions whose tokens are sampled now: each sees what is finished and itself.

    Args:
        begin: first slot fed.
        first: first of the instructions.
        end: behind the last slot fed.
        capacity: slots of the cache.
        device: where to make it.
    """
    slot = torch.arange(begin, end, device=device)[:, None]
    key = torch.arange(capacity, device=device)
    seen: Bool[Tensor, "T S"] = (key <= slot) & ((key < first) | (key == slot))
    return torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)[None, None]


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
