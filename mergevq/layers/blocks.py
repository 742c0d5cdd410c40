"""Convolutional blocks: residual, down- and upsampling."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from mergevq.layers.norm import GroupNorm


class ResidualBlock(nn.Module):
    """Twice group norm, SiLU, 3x3 convolution, added to the input (projected by a 1x1 convolution if the width
    changes). No biases.
    """

    def __init__(self, channels_in: int, channels_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(num_groups, channels_in, eps=1e-6)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = GroupNorm(num_groups, channels_out, eps=1e-6)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H W"]:
        y = self.conv1(silu(self.norm1(x)))
        return self.conv2(silu(self.norm2(y))) + self.shortcut(x)


class ShuffleUpsample(nn.Module):
    """Doubles the resolution: 3x3 convolution to four times the channels, then depth-to-space.

    Input channel `(2 dy + dx) * C + k` becomes channel k of pixel `(2 y + dy, 2 x + dx)`: the order of the authors'
    release, not `torch.pixel_shuffle`'s.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)
        # All four pixels start equal (ICNR, arXiv 1707.02937): otherwise a dot texture is there from the first step
        # and stays for long.
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[:channels_out].repeat(4, 1, 1, 1))
            if self.conv.bias is not None:
                self.conv.bias.copy_(self.conv.bias[:channels_out].repeat(4))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        return rearrange(self.conv(x), "b (dy dx c) h w -> b c (h dy) (w dx)", dy=2, dx=2)


class NearestUpsample(nn.Module):
    """Doubles the resolution by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C2 H2 W2"]:
        out: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
