"""How a codebook is used, counted over many batches of indices."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.quantize import index_to_bits


class CodebookUsage:
    """Counts the codebook indices of kept tokens.

    Args:
        num_bits: N; the codebook has 2**N entries.
    """

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits
        # Only the indices that were seen, sorted: a table of 2**N would not do for every N.
        self.index = torch.zeros(0, dtype=torch.long)
        self.counts = torch.zeros(0, dtype=torch.long)

    def update(self, index: Int[Tensor, "*n"]) -> None:
        """Counts indices; leave the padding of images with fewer tokens out, as in `index[tokens.mask()]`.

        Raises:
            ShapeError: An index is not in the codebook.
        """
        index = index.detach().cpu().long().flatten()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < 2**self.num_bits:
            raise ShapeError(
                f"expected indices in 0..{2**self.num_bits - 1}, got {int(index.min())}..{int(index.max())}"
            )
        new, new_counts = index.unique(return_counts=True)
        self.index, where = torch.cat([self.index, new]).unique(return_inverse=True)
        counts = torch.cat([self.counts, new_counts])
        self.counts = torch.zeros_like(self.index).index_add_(0, where, counts)

    @property
    def total(self) -> int:
        """Tokens counted."""
        return int(self.counts.sum())

    @property
    def distinct(self) -> int:
        """Different indices seen."""
        return len(self.index)

    @property
    def usage(self) -> float:
        """Share of the codebook that was seen; with n tokens at most n / 2**N."""
        return self.distinct / 2**self.num_bits

    def bit_balance(self) -> Float[Tensor, "N"]:
        """Share of tokens in which each bit is set (float64); 0.5 is balanced, 0 or 1 is a dead bit."""
        bits = index_to_bits(self.index, self.num_bits).double()
        return (bits * self._share()[:, None]).sum(0)

    def entropy(self) -> float:
        """Entropy of the index in bits, 0 to N; what is estimated from n tokens is at most log2 n."""
        share = self._share()
        return -float((share * share.log2()).sum()) + 0.0  # never -0

    def perplexity(self) -> float:
        """Size of an evenly used codebook of the same entropy."""
        return math.pow(2, self.entropy())

    def _share(self) -> Tensor:
        if not self.total:
            raise ShapeError("no tokens were counted: call update() first")
        return self.counts.double() / self.total
