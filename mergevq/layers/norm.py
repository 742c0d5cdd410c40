"""Normalisation: group norm of token sequences, and group norm driven by the codes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group norm that also takes groups of a single number, whose variance is 0: nn.GroupNorm refuses a batch of them.
    The same numbers otherwise.
    """

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class TokenGroupNorm(GroupNorm):
    """Group norm of `[B, T, D]`: statistics over each group of channels and all tokens, as a GroupNorm over an image of
    them.
    """

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return super().forward(x.mT).mT


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift come from the mean and standard deviation of the unmerged codes.

    `(W_g std + b_g) * norm(x) + (W_b mean + b_b)`; the variance is unbiased, plus 1e-6. There is no `1 +` on the scale.

    Reference: the decoder of Open-MAGVIT2 (arXiv 2409.04410), which MergeVQ keeps.
    """

    def __init__(self, num_bits: int, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(num_groups, channels, eps=1e-6, affine=False)
        self.gamma = nn.Linear(num_bits, channels)
        self.beta = nn.Linear(num_bits, channels)

    def forward(self, x: Float[Tensor, "B C H W"], codes: Float[Tensor, "B N h w"]) -> Float[Tensor, "B C H W"]:
        flat = codes.float().flatten(2)
        # A single patch has no variance (0 / 0); its deviation from the mean is 0.
        variance = flat.var(-1) if flat.shape[-1] > 1 else torch.zeros_like(flat[..., 0])
        scale = self.gamma((variance + 1e-6).sqrt())
        shift = self.beta(flat.mean(-1))
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]
