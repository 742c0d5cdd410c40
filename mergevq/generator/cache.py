"""Keys and values of earlier tokens while MergeAR samples: all of them, or only those that the merge mask still sees.

Each cache is a tuple of tensors, written in place, and a function that prepares it for the next token: plain tensors,
the step number among them, so that a step compiles as one graph, and nothing in it waits for the device or loops over
images. Between steps the host makes room, chunk by chunk.

The merge cache lies in memory as

    prefix P | ring of the R recent tokens | scratch 1 | compact part C, the older tokens that are kept

Token n enters the ring at n % R. When the next token takes its place, its keys and values move: to the compact part if
it is the first with its index (or, under keep = "last", to the place of the one before with its index), otherwise to
the scratch slot, which nobody sees. Images differ in where they write; they share one capacity.

Reference: MergeVQ section 4.1, figure 6 (b).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.transformer import KeyValues


class MergeState(NamedTuple):
    """The merge cache. Rows of `memory` are the images, once for each branch of guidance."""

    memory: Float[Tensor, "2 depth rows heads S C"]
    """Keys, values."""
    recent: Int[Tensor, "B R"]
    """Codebook index of each token in the ring."""
    kept: Int[Tensor, "B C1"]
    """Codebook index that scratch and compact slots hold; -1 is none, and the scratch slot never has one."""
    counts: Float[Tensor, "B C1"]
    """Tokens that each of these slots stands for."""
    used: Int[Tensor, " B"]
    """Compact slots in use."""


class FullState(NamedTuple):
    """The cache that keeps everything: prefix, then a slot for each token."""

    memory: Float[Tensor, "2 depth rows heads S C"]
    """Keys, values."""
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
) -> tuple[Int[Tensor, " 1"], Float[Tensor, "B 1 1 S"]]:
    """Makes room in the ring for the token before `step`; returns its slot, and the bias of the row of token `step`.

    Args:
        state: holds the tokens before `previous`; afterwards all of `previous` but its keys and values.
        mask: of the generator, with R.
        prefix_length: P.
        step: t, the token that is to be predicted, 1 .. L-1.
        previous: codebook indices of token t - 1.
    """
    ring, width = state.recent.shape[1], state.kept.shape[1]
    place = (step - 1) % ring
    leaving = state.recent.index_select(1, place)  # [B, 1]: token t - 1 - R.
    leaves = step > ring
    slot = torch.arange(width, device=step.device)
    same = (state.kept == leaving) & leaves
    known = same.any(1)
    # Slot 0 is scratch.
    to = torch.where(known, same.to(torch.uint8).argmax(1) if mask.keep == "last" else 0, state.used + 1)
    to = torch.where(leaves, to, 0)
    fresh = (slot == to[:, None]) & (slot > 0)
    state.kept.copy_(torch.where(fresh, leaving, state.kept))
    state.counts.add_(same | fresh)
    state.used.add_(leaves & ~known)
    state.recent.index_copy_(1, place, previous[:, None])

    moved = state.memory.index_select(4, prefix_length + place)
    branches = state.memory.shape[2] // to.shape[0]
    target = (prefix_length + ring + to).repeat(branches)[:, None, None, None]
    state.memory.scatter_(4, target.expand(moved.shape), moved)

    older = state.counts.log() if mask.proportional else torch.where(state.counts > 0, 0.0, -torch.inf)
    filled = torch.arange(ring, device=step.device) < step
    recent = torch.where(filled, 0.0, -torch.inf).expand(to.shape[0], -1)
    bias = torch.cat([torch.zeros_like(recent[:, :1]).expand(-1, prefix_length), recent, older], 1)
    return prefix_length + place, bias[:, None, None]


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

    Its slots never exceed P + R + 1 + the largest number of distinct indices of an image + 2 `chunk` - 1.

    Args:
        config: of the generator; its mask has an R.
        images: in the batch.
        branches: 2 with guidance, which feeds each image twice.
        chunk: the compact part is a multiple of this, and is looked after every so many steps.
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
        ring = max(1, min(config.mask.recent, config.num_patches - 1))
        self._chunk = chunk
        self._most = _up_to_multiple(config.num_patches - 1 - ring, chunk)
        none = torch.full((images, ring), -1, device=device)
        self.state = MergeState(
            _memory(config, images * branches, config.prefix_length + ring + 1, device, dtype),
            none,
            none[:, :1].clone(),
            torch.zeros(images, 1, device=device),
            torch.zeros(images, dtype=torch.int64, device=device),
        )

    advance: Advance = staticmethod(advance_merge)

    def make_room(self, step: int) -> None:
        """Sees to it that the tokens from `step` on have room for a chunk; called every `chunk` steps, from 1 on.

        Waits for the device once, to read how far the fullest image is.
        """
        used = 0 if step == 1 else int(self.state.used.max())
        room = self.state.kept.shape[1] - 1
        wanted = min(_up_to_multiple(used + self._chunk, self._chunk), self._most)
        if wanted > room:
            memory, recent, kept, counts, used_slots = self.state
            more = wanted - room
            self.state = MergeState(
                pad(memory, (0, 0, 0, more)), recent, pad(kept, (0, more), value=-1), pad(counts, (0, more)), used_slots
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
            _memory(config, images * branches, config.prefix_length, device, dtype),
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
                pad(memory, (0, 0, 0, more)),
                pad(tokens, (0, more), value=-1),
                pad(seen, (0, more), value=-torch.inf),
                pad(counts, (0, more), value=1.0),
            )


def key_values(state: State) -> KeyValues:
    """Returns keys and values of a cache, as views."""
    return KeyValues(state.memory[0], state.memory[1])


def num_slots(state: State) -> int:
    """Returns how many keys a token attends to, masked ones included."""
    return state.memory.shape[4]


def num_bytes(state: State) -> int:
    """Returns the memory that a cache has, bookkeeping included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state)


def _memory(config: GeneratorConfig, rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Zeros, not rubbish: a weight of 0 does not hide a NaN.
    shape = (2, config.depth, rows, config.num_kv_heads, slots, config.head_width)
    return torch.zeros(shape, device=device, dtype=dtype)


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
