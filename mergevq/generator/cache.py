"""Keys and values of earlier tokens while MergeAR samples: all of them, or only those that the merge mask still sees.

Each cache is a tuple of tensors, written in place, and a function that prepares it for the next token: plain tensors,
the step number among them, so that a step compiles as one graph, and nothing in it waits for the device or loops over
images. Between steps the host makes room, chunk by chunk.

In the merge cache no token ever moves. When one is no longer recent it stays where it is if it is the first older one
with its index; if it is not, the next token takes its slot (under keep = "last" the slot of the one before with its
index). So every slot is one that the mask sees. Images differ in where they write; they share one capacity.

Reference: MergeVQ section 4.1, figure 6 (b).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.transformer import KeyValues


class MergeState(NamedTuple):
    """The merge cache: prefix, then slots that tokens come and go in."""

    memory: KeyValues
    """S slots. Rows are the images, once for each branch of guidance."""
    tokens: Int[Tensor, "B C"]
    """Codebook index of the token in each slot; -1 is none."""
    counts: Float[Tensor, "B C"]
    """Tokens that it stands for: 1 if it is recent, 0 if there is none."""
    older: Bool[Tensor, "B C"]
    """Whether it is no longer recent."""
    recent: Int[Tensor, "B R"]
    """Slot of each recent token, token n at n % R."""
    used: Int[Tensor, " B"]
    """Slots that have a token: those before this one."""


class FullState(NamedTuple):
    """The cache that keeps everything: prefix, then a slot for each token."""

    memory: KeyValues
    """S slots. Rows are the images, once for each branch of guidance."""
    tokens: Int[Tensor, "B C"]
    """Codebook index of each token, -1 if it is still to come."""
    seen: Float[Tensor, "B C"]
    """0 for what the next row sees, -inf for the rest."""
    counts: Float[Tensor, "B C"]
    """Tokens that each of these stands for."""


State = MergeState | FullState
Advance = Callable[[Any, MaskConfig, int, Tensor, Tensor], tuple[Tensor, Tensor]]


def advance_merge(
    state: MergeState,
    mask: MaskConfig,
    prefix_length: int,
    step: Int[Tensor, " 1"],
    previous: Int[Tensor, " B"],
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1 1 S"]]:
    """Finds a slot for the token before `step`; returns it, and the bias of the row of token `step`.

    Args:
        state: holds the tokens before `previous`; afterwards all of `previous` but its keys and values.
        mask: of the generator, with R.
        prefix_length: P.
        step: t, the token that is to be predicted, 1 .. L-1.
        previous: codebook indices of token t - 1.
    """
    slot = torch.arange(state.tokens.shape[1], device=step.device)
    place = (step - 1) % state.recent.shape[1]
    leaves = step > state.recent.shape[1]  # Token t - 1 - R is no longer recent, if there is one.
    lies = state.recent.index_select(1, place)
    leaving = (slot == lies) & leaves
    same = state.older & (state.tokens == state.tokens.gather(1, lies)) & leaves
    known = same.any(1, keepdim=True)
    if mask.keep == "last":
        state.counts.add_(leaving * (state.counts * same).sum(1, keepdim=True))
        free = same
    else:
        state.counts.add_(same)
        free = leaving
    to = torch.where(known, free, slot == state.used[:, None])
    state.older.logical_or_(leaving).logical_and_(~to)
    state.counts.masked_fill_(to, 1)
    state.tokens.copy_(torch.where(to, previous[:, None], state.tokens))
    state.used.add_(~known[:, 0])
    found = to.to(torch.uint8).argmax(1, keepdim=True)
    state.recent.index_copy_(1, place, found)
    bias = state.counts.log() if mask.proportional else torch.where(state.counts > 0, 0.0, -torch.inf)
    return prefix_length + found, pad(bias, (prefix_length, 0))[:, None, None]


def advance_full(
    state: FullState,
    mask: MaskConfig,
    prefix_length: int,
    step: Int[Tensor, " 1"],
    previous: Int[Tensor, " B"],
) -> tuple[Int[Tensor, " 1"], Float[Tensor, "B 1 1 S"]]:
    """Does for the full cache what `advance_merge` does: the same rows of the merge mask, with nothing dropped."""
    position = torch.arange(state.tokens.shape[1], device=step.device)
    place = step - 1
    state.tokens.index_copy_(1, place, previous[:, None])
    state.seen.index_fill_(1, place, 0)
    if mask.recent is not None:
        oldest = step - 1 - mask.recent  # Of the tokens that are no longer recent, the last; below 0 there is none.
        index = state.tokens.index_select(1, oldest.clamp_min(0))
        same = (state.tokens == index) & (position < oldest)
        new = position == oldest
        hidden = same if mask.keep == "last" else new & same.any(1, keepdim=True)
        state.seen.masked_fill_(hidden, -torch.inf)
        state.counts.add_(same + new * same.sum(1, keepdim=True))
    older = state.seen + state.counts.log() if mask.proportional else state.seen
    bias = pad(older, (prefix_length, 0))
    return prefix_length + place, bias[:, None, None]


class MergeCache:
    """A merge cache that grows as far as the images have distinct indices.

    Its slots never exceed P + R + the largest number of distinct indices of an image + 2 `chunk` - 1.

    Args:
        config: of the generator; its mask has an R.
        images: in the batch.
        branches: 2 with guidance, which feeds each image twice.
        chunk: its slots but the prefix are a multiple of this, and are looked after every so many steps.
        device: where.
        dtype: of keys and values.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        images: int,
        branches: int,
        *,
        chunk: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert config.mask.recent is not None
        # Of an image of L tokens, the last is never a key.
        most = config.num_patches - 1
        self._chunk, self._most = chunk, _up_to_multiple(most, chunk)
        self.state = MergeState(
            KeyValues.empty(config.depth, images * branches, config.prefix_length, config, device, dtype),
            torch.zeros(images, 0, dtype=torch.int64, device=device),
            torch.zeros(images, 0, device=device),
            torch.zeros(images, 0, dtype=torch.bool, device=device),
            torch.zeros(images, max(1, min(config.mask.recent, most)), dtype=torch.int64, device=device),
            torch.zeros(images, dtype=torch.int64, device=device),
        )

    advance: Advance = staticmethod(advance_merge)

    def make_room(self, step: int) -> None:
        """Sees to it that the tokens from `step` on have room for a chunk; called every `chunk` steps, from 1 on.

        Waits for the device once, to read how far the fullest image is.
        """
        memory, tokens, counts, older, recent, used = self.state
        fullest = 0 if step == 1 else int(used.max())
        more = min(_up_to_multiple(fullest + self._chunk, self._chunk), self._most) - tokens.shape[1]
        if more > 0:
            self.state = MergeState(
                _grown(memory, more),
                pad(tokens, (0, more), value=-1),
                pad(counts, (0, more)),
                pad(older, (0, more)),
                recent,
                used,
            )


class FullCache:
    """A cache of all tokens, which grows chunk by chunk; arguments as for `MergeCache`."""

    def __init__(
        self,
        config: GeneratorConfig,
        images: int,
        branches: int,
        *,
        chunk: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._chunk = chunk
        self.state = FullState(
            KeyValues.empty(config.depth, images * branches, config.prefix_length, config, device, dtype),
            torch.zeros(images, 0, dtype=torch.int64, device=device),
            torch.zeros(images, 0, device=device),
            torch.zeros(images, 0, device=device),
        )

    advance: Advance = staticmethod(advance_full)

    def make_room(self, step: int) -> None:
        """Sees to it that the tokens from `step` on have room for a chunk; called every `chunk` steps, from 1 on."""
        memory, tokens, seen, counts = self.state
        more = _up_to_multiple(step - 1 + self._chunk, self._chunk) - tokens.shape[1]
        if more > 0:
            self.state = FullState(
                _grown(memory, more),
                pad(tokens, (0, more), value=-1),
                pad(seen, (0, more), value=-torch.inf),
                pad(counts, (0, more), value=1.0),
            )


def num_slots(state: State) -> int:
    """Returns how many keys a token attends to, masked ones included."""
    return state.memory.keys[0].shape[2]


def num_bytes(state: State) -> int:
    """Returns the memory that a cache has, bookkeeping included."""
    memory, *books = state
    return memory.num_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in books)


def _grown(memory: KeyValues, slots: int) -> KeyValues:
    keys, values = (tuple(pad(tensor, (0, 0, 0, slots)) for tensor in tensors) for tensors in memory)
    return KeyValues(keys, values)


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
