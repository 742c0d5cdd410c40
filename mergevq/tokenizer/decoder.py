"""The decoder: the unmerged grid of codes to pixels."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from mergevq.layers.attention import ConvTransformerBlock, init_transformer
from mergevq.layers.blocks import NearestUpsample, ResidualBlock, ShuffleUpsample
from mergevq.layers.norm import AdaptiveGroupNorm, GroupNorm
from mergevq.tokenizer.config import TokenizerConfig


class Decoder(nn.Module):
    """Attention over all L patches, then levels of residual blocks, each at twice the resolution of the one before
    (equation 6).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        dec = config.decoder
        widths = [dec.channels * m for m in dec.multipliers]
        self.conv_in = nn.Conv2d(config.num_bits, dec.width, 3, padding=1)
        self.position = nn.Conv2d(dec.width, dec.width, 3, padding=1, groups=dec.width)
        self.blocks = nn.ModuleList(
            ConvTransformerBlock(dec.width, dec.heads, config.layer_scale) for _ in range(dec.depth)
        )
        init_transformer(self.position)
        init_transformer(self.blocks)
        # All three lists are ordered finest level first, as in the authors' checkpoints; forward walks them backwards.
        upsample = ShuffleUpsample if dec.upsample == "shuffle" else NearestUpsample
        self.adaptive = nn.ModuleList()
        self.levels = nn.ModuleList()
        self.upsample = nn.ModuleList()
        for i, (out, count) in enumerate(zip(widths, dec.blocks, strict=True)):
            width = widths[min(i + 1, len(widths) - 1)]
            self.adaptive.append(AdaptiveGroupNorm(config.num_bits, width, config.num_groups))
            blocks = [ResidualBlock(width if j == 0 else out, out, config.num_groups) for j in range(count)]
            self.levels.append(nn.Sequential(*blocks))
            if i > 0:
                self.upsample.append(upsample(out, out))
        self.norm_out = GroupNorm(config.num_groups, widths[0], eps=1e-6)
        self.out = nn.Conv2d(widths[0], 3, 3, padding=1) if dec.output_stride == 1 else upsample(widths[0], 3)

    def forward(self, codes: Float[Tensor, "B N rows columns"]) -> Float[Tensor, "B 3 H W"]:
        """Returns images, unclamped.

        Args:
            codes: -1 or +1, unmerged to the full patch grid.
        """
        grid = (codes.shape[-2], codes.shape[-1])
        x = self.conv_in(codes)
        x = (x + self.position(x)).flatten(2).mT.float()
        for block in self.blocks:
            x = block(x, grid)
        x = x.mT.unflatten(2, grid)
        for i in range(len(self.levels) - 1, -1, -1):
            x = self.levels[i](self.adaptive[i](x, codes))
            if i > 0:
                x = self.upsample[i - 1](x)
        out: Tensor = self.out(silu(self.norm_out(x)))
        return out.float()
