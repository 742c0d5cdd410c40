"""Tying the class token to a frozen teacher, or to labels."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError


def alignment_loss(
    student: Float[Tensor, "B Dt"],
    target: Float[Tensor, "B Dt"] | Int[Tensor, "B"],
    kind: Literal["kl", "cosine", "labels"] = "kl",
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Distance of the student's output to its target, mean over images, in float32.

    Args:
        student: Output of the alignment head.
        target: The teacher's output [B, Dt], or for labels the class numbers [B].
        kind: kl: divergence of the student's softmax from the teacher's, both over the Dt numbers as if they were
            logits, times temperature squared so that the gradient does not depend on it to first order. cosine: 1 minus
            the cosine. labels: cross-entropy with label smoothing 0.1.
        temperature: Softness of both sides of kl.

    Reference:
        MergeVQ section 3.2, equation 10; kl with temperature 4 and labels as in the authors' release.
    """
    student = student.float()
    if kind == "labels":
        return F.cross_entropy(student, target, label_smoothing=0.1)
    target = target.float()
    if kind == "kl":
        wanted = F.log_softmax(target / temperature, -1)
        got = F.log_softmax(student / temperature, -1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True) * temperature**2
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, target, dim=-1).mean()
    raise ConfigError(f"alignment must be kl, cosine or labels, got {kind!r}")
