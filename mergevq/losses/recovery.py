"""Learning to predict the source map from the codes."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RecoveryLoss(NamedTuple):
    """How well the source map is predicted."""

    loss: Float[Tensor, ""]
    """Mean negative log-probability, over patches, of the right kept token or one of equal index; in nats."""
    accuracy: Float[Tensor, ""]
    """Share of patches whose most probable kept token has the right index; no gradient."""


def recovery_loss(
    logits: Float[Tensor, "B L K"], source: Int[Tensor, "B L"], index: Int[Tensor, "B K"]
) -> RecoveryLoss:
    """Cross-entropy of each patch's kept token, where kept tokens of equal index are one class.

    Tokens of equal index are the same vector to the decoder, so choosing between them is neither possible nor needed.

    Args:
        logits: Of each kept token, for each patch.
        source: The true map, 0 <= source < K.
        index: Codebook index of each kept token.

    Reference:
        MergeVQ section 3.2, equations 8 and 9 (there as a binary cross-entropy of every entry of the matrix).
    """
    logits = logits.float()
    same = index[:, :, None] == index[:, None, :]
    right = same.gather(1, source[:, :, None].expand_as(logits))
    loss = (logits.logsumexp(-1) - logits.masked_fill(~right, -torch.inf).logsumexp(-1)).mean()
    hit = right.gather(-1, logits.detach().argmax(-1, keepdim=True))
    return RecoveryLoss(loss, hit.float().mean())
