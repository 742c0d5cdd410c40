"""The transformer of both generators: blocks over positions, then blocks over the bit groups of one position.

Llama-like (RMSNorm, SwiGLU, rotary positions, no biases). An index has too many values for one softmax, so it is
predicted in bit groups, the lowest bits first, each knowing the ones before.

Reference: LlamaGen (arXiv 2406.06525) for the blocks; Open-MAGVIT2 (arXiv 2409.04410) section 3.2 for the bit groups.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, rms_norm, scaled_dot_product_attention, silu

from mergevq.generator.config import GeneratorConfig
from mergevq.layers.position import sinusoid
from mergevq.layers.rotary import rotate, rotation_grid
from mergevq.quantize import join_index, split_index


class KeyValues(NamedTuple):
    """Keys (already rotated) and values, written in place.

    Every block has tensors of its own: compiled code that writes to a part of a tensor and reads it copies all of it.
    """

    keys: tuple[Float[Tensor, "B heads S C"], ...]
    values: tuple[Float[Tensor, "B heads S C"], ...]

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of one block."""
        return self.keys[number], self.values[number]

    def first(self, slots: int) -> "KeyValues":
        """Returns those of the first slots, as views."""
        return KeyValues(tuple(k[:, :, :slots] for k in self.keys), tuple(v[:, :, :slots] for v in self.values))

    def num_bytes(self) -> int:
        """Returns their memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    @staticmethod
    def empty(
        blocks: int, rows: int, slots: int, config: GeneratorConfig, device: torch.device, dtype: torch.dtype
    ) -> "KeyValues":
        """Returns keys and values of nothing yet: zeros, not rubbish, as a weight of 0 does not hide a NaN."""
        shape = (rows, config.num_kv_heads, slots, config.head_width)
        keys, values = (tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(blocks)) for _ in range(2))
        return KeyValues(keys, values)


class RMSNorm(nn.Module):
    """Divides by the root of the mean square and scales each channel, in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        return rms_norm(high, high.shape[-1:], self.weight.to(high.dtype), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions; several query heads may share one head of keys and values."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = config.heads, config.num_kv_heads, config.dropout
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * config.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Float[Tensor, "*B T P 2"],
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        slots: Int[Tensor, "*place"] | None,
    ) -> Float[Tensor, "B T D"]:
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.kv_heads, -1)).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = rotate(qk, rotation).split([self.heads, self.kv_heads], 1)
        if cache is not None and slots is not None:
            keys, values = cache
            _write(keys, slots, k)
            _write(values, slots, v)
            k, v = keys.to(q.dtype), values.to(q.dtype)
        shared = self.kv_heads != self.heads
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
        return dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


def _write(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    if slots.ndim == 1:
        cache.index_copy_(2, slots, new.to(cache.dtype))
    else:
        cache.scatter_(2, slots, new.to(cache.dtype))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): `reduce(silu(gate) * value)`, gate and value being halves of one linear layer."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.reduce = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        gate, value = self.expand(x).chunk(2, -1)
        return dropout(self.reduce(silu(gate) * value), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer, each added to its input."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Float[Tensor, "*B T P 2"],
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        slots: Int[Tensor, "*place"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.attention(self.norm1(x), rotation, mask, cache, slots)
        return x + self.feed_forward(self.norm2(x))


class Instruction(nn.Module):
    """A token that tells a number: a learned vector plus an MLP of the number's sinusoidal embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))
        self.mlp = nn.Sequential(nn.Linear(width, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))

    def forward(self, fraction: Float[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """Returns one token for each number in 0..1."""
        # The sinusoids' wave lengths run from 6 to 60,000.
        return self.vector + self.mlp(sinusoid(1000 * fraction, self.vector.shape[0]).to(self.vector.dtype))


class Transformer(nn.Module):
    """Embeddings, blocks over positions, blocks over bit groups, and one head for each group.

    Attributes:
        rotation: of the slots of raster order: prefix, then each cell of the grid, [P + L, head_width / 2, 2].
        group_rotation: of the slots of one position: that of the prefix, then of the grid's first cells.
    """

    rotation: Tensor
    group_rotation: Tensor

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.embeddings = nn.ModuleList(nn.Embedding(2**bits, width) for bits in config.groups)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # The last row is no class.
        self.instruction = Instruction(width) if config.instruction else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.group_blocks = nn.ModuleList(Block(config) for _ in range(config.group_depth))
        self.norm = RMSNorm(width, config.norm_eps)
        self.heads = nn.ModuleList(nn.Linear(width, 2**bits, bias=False) for bits in config.groups)
        pairs = config.head_width // 2
        slots = config.prefix_length + config.num_patches
        self.register_buffer("rotation", torch.empty(slots, pairs, 2), persistent=False)
        self.register_buffer("group_rotation", torch.empty(len(config.groups), pairs, 2), persistent=False)
        self._initialise()
        self.fill_rotations()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, Instruction):
                nn.init.normal_(module.vector, std=0.02)
        for weight in self.heads.parameters():
            nn.init.zeros_(weight)

    def fill_rotations(self) -> None:
        """Computes the rotations, which no file holds; to be called again after `to_empty`."""
        c, device = self.config, self.rotation.device
        prefix = torch.zeros(c.prefix_length, c.head_width // 2, 2, device=device)
        if c.prefix_position == "identity":
            prefix[..., 0] = 1
        cells = rotation_grid(*c.grid, c.head_width, c.rotary_base, device)
        self.rotation.copy_(torch.cat([prefix, cells]))
        # As in the authors' release, the slots of one position count as prefix and first cells of the grid.
        later = len(c.groups) - 1
        cells = rotation_grid(-(-later // c.grid[1]), c.grid[1], c.head_width, c.rotary_base, device)
        self.group_rotation.copy_(torch.cat([prefix[:1], cells[:later]]))

    def embed(self, index: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Returns the tokens of codebook indices: the sum of the bit groups' embeddings."""
        parts = split_index(index, self.config.groups).unbind(-1)
        tokens: list[Tensor] = [embedding(part) for embedding, part in zip(self.embeddings, parts, strict=True)]
        return reduce(torch.add, tokens)

    def prefix(self, classes: Int[Tensor, " B"], num_tokens: Int[Tensor, " B"]) -> Float[Tensor, "B P D"]:
        """Returns the slots before the tokens: class, and instruction if there is one.

        Args:
            classes: numbers; `num_classes` is no class.
            num_tokens: K, 1 .. L.
        """
        slots = [self.class_embedding(classes)]
        if self.instruction is not None:
            slots.append(self.instruction(num_tokens.float() / self.config.num_patches))
        return torch.stack(slots, 1)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotation: Float[Tensor, "*#B T P 2"],
        bias: Float[Tensor, "#B 1 T S"] | None = None,
        cache: KeyValues | None = None,
        slots: Int[Tensor, "*#B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Returns what the blocks over positions make of the slots, before the final norm.

        Args:
            x: prefix and tokens; drops out in training.
            rotation: of each slot, [T, P, 2], or [B, T, P, 2] if images differ.
            bias: added to the attention logits, -inf where a key (S = T without a cache, S = its capacity with one) is
                not seen; None is causal, without a cache only.
            cache: keys and values of earlier slots, one entry for each image of `x`. The new ones are written at
                `slots`, then the queries attend to all of it.
            slots: where in the cache, [T], or [B, T] if images differ.
        """
        x = dropout(x, self.config.token_dropout, self.training)
        if rotation.ndim == 4:
            rotation = rotation[:, None]  # One for all heads.
        if bias is not None:
            bias = _as_attention_wants(bias, x)
        if slots is not None and slots.ndim == 2:
            # As scatter_ wants it, made once and not once a block.
            slots = slots[:, None, :, None].expand(-1, self.config.num_kv_heads, -1, self.config.head_width)
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, bias, None if cache is None else cache.layer(number), slots)
        return x

    # ------------------------------------------------------------------------------------------------------- bit groups

    def group_logits(self, hidden: Float[Tensor, "B T D"], index: Int[Tensor, "B T"]) -> tuple[Tensor, ...]:
        """Returns the logits of every bit group, [B, T, 2**bits] each, given the true groups before it.

        Args:
            hidden: what `forward` gives at the slot that predicts each token.
            index: those tokens.
        """
        parts = split_index(index, self.config.groups).unbind(-1)
        slots = [hidden, *(emb(part) for emb, part in zip(self.embeddings, parts[:-1], strict=False))]
        x = torch.stack(slots, 2).flatten(0, 1)  # One short sequence for each position.
        if not self.group_blocks:
            x = x.cumsum(1)
        for block in self.group_blocks:
            x = block(x, self.group_rotation)
        x = self.norm(x).unflatten(0, hidden.shape[:2])
        return tuple(head(x[:, :, group]) for group, head in enumerate(self.heads))

    def sample_groups(
        self, hidden: Float[Tensor, "B D"], choose: Callable[[int, Tensor], Tensor]
    ) -> Int[Tensor, " images"]:
        """Returns codebook indices sampled bit group after bit group.

        Args:
            hidden: what `forward` gives at the slot that predicts each token. Several branches (with class, without)
                of the same images are stacked one after the other.
            choose: gets the number of a group and its logits [B, 2**bits], and returns the sampled part [images],
                which all branches of an image are then given. B is a multiple of the images.
        """
        groups, device = len(self.heads), hidden.device
        # In the type of what is written.
        cache = KeyValues.empty(
            len(self.group_blocks), hidden.shape[0], groups, self.config, device, _compute_type(hidden)
        )
        order = torch.arange(groups, device=device)
        parts: list[Tensor] = []
        x = hidden[:, None]
        for group, head in enumerate(self.heads):
            slot = order[group : group + 1]
            for number, block in enumerate(self.group_blocks):
                x = block(x, self.group_rotation[group : group + 1], order <= slot[:, None], cache.layer(number), slot)
            parts.append(choose(group, head(self.norm(x[:, 0]))))
            if group + 1 < groups:
                branches = hidden.shape[0] // parts[group].shape[0]
                token = self.embeddings[group](parts[group]).repeat(branches, 1)[:, None]
                x = token if self.group_blocks else x + token
        return join_index(torch.stack(parts, -1), self.config.groups)


def _compute_type(x: Tensor) -> torch.dtype:
    """Returns the type that attention computes in: autocast's, or that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _as_attention_wants(bias: Tensor, x: Tensor) -> Tensor:
    """Returns the bias in the type of queries and keys: converted once, not once a block."""
    bias = bias.to(_compute_type(x))
    if bias.is_cuda:
        # The kernels want rows that start at multiples of 8 numbers, and would copy the whole bias in every block.
        width = bias.shape[-1]
        bias = pad(bias, (0, -width % 8))[..., :width]
    return bias
