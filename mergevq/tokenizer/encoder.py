"""The encoder: convolutions or patches, then attention in which tokens are merged, then one vector of N numbers per
kept token.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from mergevq.layers.attention import TransformerBlock, init_transformer
from mergevq.layers.blocks import ResidualBlock
from mergevq.layers.norm import GroupNorm, TokenGroupNorm
from mergevq.layers.position import sinusoid_grid
from mergevq.merging import match_and_merge, sort_by_raster
from mergevq.tokenizer.config import EncoderConfig, TokenizerConfig


class EncoderOutput(NamedTuple):
    """What the attention stack leaves. `tokens` are the semantic tokens Z_K of the paper, before quantization."""

    tokens: Float[Tensor, "B K D"]
    class_token: Float[Tensor, "B D"]
    source: Int[Tensor, "B L"]


class ConvStem(nn.Module):
    """Levels of residual blocks, each at half the resolution of the one before (MAGVIT-v2 style)."""

    def __init__(self, config: EncoderConfig, num_groups: int) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        # The stride-2 stem of small models reads 4x4 pixels, so that every pixel counts equally.
        kernel = 3 if config.stem_stride == 1 else 2 * config.stem_stride
        padding = (kernel - config.stem_stride + 1) // 2
        self.conv_in = nn.Conv2d(3, config.channels, kernel, config.stem_stride, padding, bias=False)
        self.levels = nn.ModuleList()
        self.downsample = nn.ModuleList()
        width = config.channels
        for i, (out, count) in enumerate(zip(widths, config.blocks, strict=True)):
            blocks = [ResidualBlock(width if j == 0 else out, out, num_groups) for j in range(count)]
            self.levels.append(nn.Sequential(*blocks))
            width = out
            if i < len(widths) - 1:
                self.downsample.append(nn.Conv2d(width, width, 3, 2, 1))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D rows columns"]:
        x = self.conv_in(images)
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.downsample):
                x = self.downsample[i](x)
        return x


class PatchStem(nn.Module):
    """Non-overlapping patches through one linear map, each channel normalised over the grid."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.norm = GroupNorm(config.width, config.width, eps=1e-6)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D rows columns"]:
        return self.norm(self.conv(images))


class MergingBlock(TransformerBlock):
    """A transformer block that merges tokens between its attention and its MLP (ToMe, section 3)."""

    def merge(
        self,
        x: Float[Tensor, "B T D"],
        sizes: Float[Tensor, "B T"] | None,
        source: Int[Tensor, "B L"],
        num_merged: int,
        branch_scale: Float[Tensor, "2 B"] | None = None,
    ) -> tuple[Float[Tensor, "B T2 D"], Float[Tensor, "B T2"] | None, Int[Tensor, "B L"]]:
        """Returns the tokens, sizes and source after this block; `sizes` is None as long as nothing has been merged.

        `branch_scale` multiplies what attention and MLP add to each image's tokens.
        """
        update, keys = self.attn(self.norm1(x), sizes)
        x = x + _scaled(self.ls1 * update, branch_scale, 0)
        if num_merged > 0:
            if sizes is None:
                sizes = x.new_ones(x.shape[:2])
            x, sizes, source = match_and_merge(x, sizes, source, keys.detach(), num_merged)
        return x + _scaled(self.ls2 * self.mlp(self.norm2(x)), branch_scale, 1), sizes, source


class Encoder(nn.Module):
    """Images to K semantic tokens, a class token and the source map (equations 1 to 3 and 7 of the paper)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        enc = config.encoder
        self.position = enc.position
        self.order = config.merging.order
        self.stem = ConvStem(enc, config.num_groups) if enc.kind == "hybrid" else PatchStem(enc)
        self.class_token = nn.Parameter(torch.randn(1, 1, enc.width) * 1e-6)
        self.blocks = nn.ModuleList(MergingBlock(enc.width, enc.heads, config.layer_scale) for _ in range(enc.depth))
        self.norm_out = TokenGroupNorm(config.num_groups, enc.width, eps=1e-6)
        self.code_out = nn.Linear(enc.width, config.num_bits)
        init_transformer(self.blocks)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        schedule: tuple[int, ...],
        branch_scale: Float[Tensor, "depth 2 B"] | None = None,
    ) -> EncoderOutput:
        """Returns the kept tokens and where each patch went.

        Args:
            images: in [-1, 1]; the downsampling divides both sides.
            schedule: tokens merged in each block, from `merge_schedule`.
            branch_scale: what each block multiplies its attention's and its MLP's update of each image by: 0 leaves the
                branch out, which is how stochastic depth (arXiv 1603.09382) trains. None is 1 everywhere.
        """
        return self.keep(*self.embed(images), schedule, branch_scale)

    def keep(
        self,
        x: Float[Tensor, "B T D"],
        source: Int[Tensor, "B L"],
        schedule: tuple[int, ...],
        branch_scale: Float[Tensor, "depth 2 B"] | None = None,
    ) -> EncoderOutput:
        """Returns what `forward` does of what `embed` returned; the other arguments are those of `forward`."""
        x, sizes, source = self.attend(x, source, schedule, branch_scale)
        class_token, tokens = x[:, 0], x[:, 1:]
        if sizes is not None and self.order == "raster":
            tokens, source = sort_by_raster(tokens, source)
        return EncoderOutput(tokens, class_token, source)

    def embed(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B L"]]:
        """Returns what goes into the first attention block: the class token and L patches; and the map that says so."""
        features = self.stem(images)
        grid = features.shape[-2:]
        # The residual stream is float32 under autocast as well: merging averages it and the codes are its signs.
        x = features.flatten(2).mT.float()
        if self.position == "sincos":
            x = x + sinusoid_grid(grid[0], grid[1], x.shape[-1], x.device)
        source = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1), source

    def attend(
        self,
        x: Float[Tensor, "B T D"],
        source: Int[Tensor, "B L"],
        schedule: tuple[int, ...],
        branch_scale: Float[Tensor, "depth 2 B"] | None = None,
    ) -> tuple[Float[Tensor, "B T2 D"], Float[Tensor, "B T2"] | None, Int[Tensor, "B L"]]:
        """Returns tokens, sizes and source after as many attention blocks as `schedule` has numbers, in the order that
        merging leaves; `sizes` is None if nothing has been merged.

        Args:
            x: from `embed`.
            source: likewise.
            schedule: tokens merged in each block.
            branch_scale: as in `forward`.
        """
        sizes = None
        scales = [None] * len(schedule) if branch_scale is None else branch_scale.unbind(0)
        for block, num_merged, scale in zip(self.blocks, schedule, scales, strict=False):
            assert isinstance(block, MergingBlock)
            x, sizes, source = block.merge(x, sizes, source, num_merged, scale)
        return x, sizes, source

    def to_codes(self, tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K N"]:
        """Returns the N numbers of each token whose signs are its code, in float32 also under autocast."""
        with torch.autocast(tokens.device.type, enabled=False):
            out: Tensor = self.code_out(silu(self.norm_out(tokens.float())))
        return out


def _scaled(update: Tensor, branch_scale: Tensor | None, branch: int) -> Tensor:
    return update if branch_scale is None else update * branch_scale[branch, :, None, None]
