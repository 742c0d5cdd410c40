"""Multi-head attention, to itself and across, and the transformer blocks made of it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class SelfAttention(nn.Module):
    """Multi-head self-attention that also hands out its keys, which token merging compares."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B T D"], sizes: Float[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T C"]]:
        """Returns the attention's output and the mean of the keys over the heads, the latter in float32.

        Args:
            x: tokens.
            sizes: patches in each token; their logarithm is added to the logits, so that a token of s patches counts s
                times (ToMe's proportional attention). None when nothing has been merged, which leaves the fast kernels
                free to run.
        """
        batch, length, width = x.shape
        q, k, v = self._split(x)
        bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None]
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width)), k.float().mean(1)

    def first_row(
        self, x: Float[Tensor, "B T D"], sizes: Float[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B heads T"]:
        """Returns the weights by which `forward` lets the first token read each token; they sum to 1.

        Args:
            x: as in `forward`.
            sizes: likewise.
        """
        q, k, _ = self._split(x)
        logits = (q[:, :, :1] @ k.mT).squeeze(2).float() / q.shape[-1] ** 0.5
        return (logits if sizes is None else logits + sizes.log()[:, None]).softmax(-1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, heads, T, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class CrossAttention(nn.Module):
    """Multi-head attention of queries to another sequence, whose padding is masked."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B L D"], memory: Float[Tensor, "B K D"], mask: Tensor | None = None
    ) -> Float[Tensor, "B L D"]:
        """Returns what the queries `x` read from `memory`; `mask` [B, K] is true where memory is real."""
        batch, length, width = x.shape
        q = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = self.kv(memory).view(batch, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class ConvMLP(nn.Module):
    """An MLP with a 3x3 depth-wise convolution over the patch grid before its GELU (MixFFN, arXiv 2105.15203)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.dwconv = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B L D"], grid: tuple[int, int]) -> Float[Tensor, "B L D"]:
        # A view as [B, C, rows, columns] of token-major memory: the convolution runs channels-last, without a copy.
        hidden = self.fc1(x).unflatten(1, grid).permute(0, 3, 1, 2)
        hidden = self.dwconv(hidden).permute(0, 2, 3, 1).flatten(1, 2)
        out: Tensor = self.fc2(gelu(hidden))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each scaled by a learned vector (LayerScale, arXiv 2103.17239)."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ls1 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ls2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x = x + self.ls1 * self.attn(self.norm1(x))[0]
        return x + self.ls2 * self.mlp(self.norm2(x))


class ConvTransformerBlock(nn.Module):
    """A transformer block for a full patch grid: its MLP sees the neighbours."""

    def __init__(self, width: int, heads: int, layer_scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.ls1 = nn.Parameter(torch.full((width,), layer_scale))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = ConvMLP(width)
        self.ls2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Float[Tensor, "B L D"], grid: tuple[int, int]) -> Float[Tensor, "B L D"]:
        x = x + self.ls1 * self.attn(self.norm1(x))[0]
        return x + self.ls2 * self.mlp(self.norm2(x), grid)


class CrossBlock(nn.Module):
    """Pre-norm cross-attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Float[Tensor, "B L D"], memory: Float[Tensor, "B K D"], mask: Tensor | None
    ) -> Float[Tensor, "B L D"]:
        x = x + self.attn(self.norm1(x), memory, mask)
        return x + self.mlp(self.norm2(x))


def init_transformer(module: nn.Module) -> None:
    """Draws every linear and convolution weight inside from a normal of deviation 0.02 cut at 2, and zeroes the biases,
    in place.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
