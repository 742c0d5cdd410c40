"""What fine-tuning draws: which branches of which images are left out, and how images are mixed.

All draws come from the generator that is passed in; global random state is put back.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from mergevq.training.finetune_config import FinetuneLossConfig

_BRANCHES = 2
"""Attention and MLP."""


def drop_path_rates(largest: float, depth: int) -> tuple[float, ...]:
    """Returns the share of images that each block leaves out: linear in depth, from 0 at the first to `largest` at the
    last.
    """
    return tuple(largest * block / max(1, depth - 1) for block in range(depth))


def draw_branch_scales(rates: Sequence[float], samples: int, rng: torch.Generator) -> Float[Tensor, "samples depth 2"]:
    """Returns for each sample, block and branch 0 with the block's rate, and otherwise what keeps the mean at 1.

    Args:
        rates: of each block, below 1.
        samples: of all micro-batches and processes together, in order; so a sample's draws do not depend on how they
            are spread.
        rng: on the CPU.

    Reference: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382).
    """
    keep = 1 - torch.tensor(rates)[:, None]
    noise = torch.rand(samples, len(rates), _BRANCHES, generator=rng)
    return (noise < keep) / keep


def mix(
    images: Float[Tensor, "B 3 H W"],
    labels: Int[Tensor, " B"],
    num_classes: int,
    loss: FinetuneLossConfig,
    rng: torch.Generator,
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B classes"]]:
    """Returns images, each perhaps mixed with its neighbour in the batch, and the share of each class in them.

    Mixup (arXiv 1710.09412) blends two images, cutmix (arXiv 1905.04899) pastes a box of one into the other; both are
    torchvision's. One draw holds for the whole batch. The images that are given are not changed.

    Args:
        images: one micro-batch.
        labels: their classes.
        num_classes: of the data.
        loss: which are on.
        rng: on the CPU.
    """
    mixed, which = torch.rand(2, generator=rng).tolist()
    if mixed >= loss.mix_share or not (loss.mixup > 0 or loss.cutmix > 0):
        return images, one_hot(labels, num_classes).float()
    from torchvision.transforms import v2  # Slow to import.

    # torchvision draws from the global generator only.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        if loss.cutmix == 0 or (loss.mixup > 0 and which < 0.5):
            return v2.MixUp(alpha=loss.mixup, num_classes=num_classes)(images, labels)
        return v2.CutMix(alpha=loss.cutmix, num_classes=num_classes)(images, labels)
