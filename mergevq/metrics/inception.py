"""The inception score: how sure a classifier is of each image, and how different its answers are."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ShapeError

_BLOCK = 8192  # Rows that are held in float64 at a time.


def inception_score(logits: Float[Tensor, "n C"]) -> float:
    """Returns exp of the mean over images of KL(p(class | image) || p(class)), 1 to C.

    1 if all images get the same answer, however sure; C if the classifier is certain of every image and every class is
    equally frequent. p(class) is the mean over all n images: there is one score and no splits. With few images it is
    too low, as it cannot exceed n.

    Args:
        logits: what a classifier says of each image, before the softmax. Computed in float64.

    Raises:
        ShapeError: a number is not finite, or there are no images.

    Reference:
        Salimans et al., Improved techniques for training GANs (arXiv 1606.03498), section 4.
    """
    if logits.ndim != 2 or not logits.numel():
        raise ShapeError(f"expected logits [n, C] of at least one image, got {list(logits.shape)}")
    if not logits.isfinite().all():
        raise ShapeError("expected finite logits, got NaN or infinity: look at the images or the classifier")
    negentropy = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(logits.shape[1], dtype=torch.float64)
    for part in logits.detach().cpu().split(_BLOCK):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        negentropy += (p * log_p).sum()  # Logits are finite, so log p is: 0 log 0 does not come up.
        total += p.sum(0)
    marginal = total / len(logits)
    return math.exp(float(negentropy / len(logits) - torch.xlogy(marginal, marginal).sum()))
