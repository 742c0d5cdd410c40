"""What a generator minimises, in one forward of one wrapped module, so that every gradient is averaged."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mergevq.data.augment import sample_rng
from mergevq.data.token_cache import TokenBatch
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.quantize import split_index
from mergevq.training.precision import autocast


def build_generator(config: GeneratorConfig) -> MergeAR | RandomAR:
    """Returns a new generator of the order that the configuration names."""
    return MergeAR(config) if config.order == "raster" else RandomAR(config)


def draw_noise(
    batch: TokenBatch, config: GeneratorConfig, seed: int, part: int
) -> tuple[Int[Tensor, " B"], Int[Tensor, "B K"] | None]:
    """Returns the classes that a training forward sees, some of them dropped, and for random order the ranks' order.

    The draws of a sample depend on the seed and the sample's place in the step alone, however the step's samples are
    spread over micro-batches and processes.

    Args:
        batch: tokens.
        config: of the generator.
        seed: of this optimizer step.
        part: how many batches of this size come before it in the step: those of the micro-batches before, of all
            processes, and of this micro-batch in the processes before.
    """
    size, device = len(batch["label"]), batch["label"].device
    rngs = [sample_rng(seed, 0, part * size + i) for i in range(size)]
    dropped = torch.stack([torch.rand((), generator=rng) for rng in rngs]) < config.class_dropout
    classes = known_classes(batch, config).masked_fill(dropped.to(device), config.num_classes)
    if config.order == "raster":
        return classes, None
    return classes, random_order(batch, rngs, config)


def random_order(batch: TokenBatch, rngs: Sequence[torch.Generator], config: GeneratorConfig) -> Int[Tensor, "B K"]:
    """Returns for each image a permutation of its ranks, then the padding.

    Args:
        batch: tokens.
        rngs: one an image, on the CPU.
        config: of the generator.
    """
    # One number for each rank there may ever be: the order does not depend on what else is in the batch.
    noise = torch.stack([torch.rand(config.num_patches, generator=rng) for rng in rngs])
    noise = noise[:, : batch["index"].shape[1]].to(batch["index"].device)
    return noise.masked_fill(~real_tokens(batch), 2.0).argsort(dim=1, stable=True)


def known_classes(batch: TokenBatch, config: GeneratorConfig) -> Int[Tensor, " B"]:
    """Returns the class of each image, `num_classes` where there is none."""
    return batch["label"].masked_fill(batch["label"] < 0, config.num_classes)


def real_tokens(batch: TokenBatch) -> Bool[Tensor, "B K"]:
    """Returns which kept tokens are no padding."""
    ranks = torch.arange(batch["index"].shape[1], device=batch["index"].device)
    return ranks < batch["num_tokens"][:, None]


def predict(
    model: MergeAR | RandomAR,
    batch: TokenBatch,
    classes: Int[Tensor, " B"],
    order: Int[Tensor, "B K"] | None,
) -> tuple[Sequence[Tensor], Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Returns the logits of each bit group, the indices they are to predict, and which of those count.

    T is L in raster order, where every patch is predicted, and the largest K in random order.
    """
    if isinstance(model, RandomAR):
        assert order is not None
        return model(batch["index"], classes, batch["num_tokens"], order), batch["index"], real_tokens(batch)
    full = batch["index"].gather(1, batch["source"])
    labels = batch["source"] if model.config.mask.duplicate == "source" and model.training else None
    return model(full, classes, batch["num_tokens"], labels), full, torch.ones_like(full, dtype=torch.bool)


def group_losses(
    logits: Sequence[Tensor], index: Int[Tensor, "B T"], groups: Sequence[int]
) -> tuple[Float[Tensor, "B T G"], Float[Tensor, "B T G"]]:
    """Returns for each bit group the cross-entropy with the truth, and with a uniform law, in nats and float32.

    Args:
        logits: [B, T, 2**bits] for each group.
        index: the truth.
        groups: bits of each group, the lowest first.
    """
    truth, even = [], []
    for values, part in zip(logits, split_index(index, tuple(groups)).unbind(-1), strict=True):
        log_p = values.float().log_softmax(-1)
        truth.append(-log_p.gather(-1, part[..., None])[..., 0])
        even.append(-log_p.mean(-1))
    return torch.stack(truth, -1), torch.stack(even, -1)


class GeneratorStep(nn.Module):
    """A generator and its loss.

    Args:
        model: what is trained.
        label_smoothing: share of the target that is spread evenly over the values of a bit group.
        dtype: arithmetic of the network; the losses are float32.
    """

    def __init__(
        self, model: MergeAR | RandomAR, label_smoothing: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.dtype = dtype

    def forward(
        self,
        batch: TokenBatch,
        classes: Int[Tensor, " B"],
        order: Int[Tensor, "B K"] | None,
        total: Float[Tensor, ""],
    ) -> dict[str, Tensor]:
        """Returns "loss", which is minimised, and the cross-entropy of each bit group, "group_0" and so on.

        All are sums over the tokens of the batch, divided by `total`, in nats. The loss is the sum over the groups, of
        the cross-entropy with the smoothed truth.

        Args:
            batch: one micro-batch.
            classes: what the model is told; `num_classes` is no class.
            order: of the ranks; None in raster order.
            total: tokens that the sums of all micro-batches are a mean over.
        """
        config = self.model.config
        with autocast(batch["index"].device, self.dtype):
            logits, index, counted = predict(self.model, batch, classes, order)
        truth, even = group_losses(logits, index, config.groups)
        weight = (counted / total)[..., None]
        smoothed = torch.lerp(truth, even, self.label_smoothing) if self.label_smoothing > 0 else truth
        groups = (truth.detach() * weight).sum((0, 1))
        return {"loss": (smoothed * weight).sum(), **{f"group_{i}": value for i, value in enumerate(groups)}}
