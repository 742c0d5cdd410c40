"""The two forwards of a training step, each one wrapped module, so that every gradient is averaged over processes."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.data.loader import Batch
from mergevq.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    hinge_discriminator,
    hinge_generator,
    non_saturating_generator,
    vanilla_discriminator,
)
from mergevq.losses.alignment import alignment_loss
from mergevq.losses.reconstruction import pixel_loss
from mergevq.losses.recovery import recovery_loss
from mergevq.tokenizer.model import MergeVQ, TokenizerOutput
from mergevq.training.config import LossConfig
from mergevq.training.precision import autocast


class StepOutput(NamedTuple):
    """What one forward of a step gives."""

    losses: dict[str, Tensor]
    """Scalars with a weight of the same name in `LossWeights`."""
    metrics: dict[str, Tensor]
    """Scalars to look at, without gradient."""
    reconstruction: Tensor
    """Images [B, 3, H, W], empty where there are none."""


def reconstruction_terms(
    out: TokenizerOutput, images: Float[Tensor, "B 3 H W"], loss: LossConfig, perceptual: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the losses and the metrics that need nothing but the image: pixels, features, quantization, recovery.

    All are float32; call it outside autocast.

    Args:
        out: what the tokenizer made of the images.
        images: float in [-1, 1].
        loss: which terms, and of what kind.
        perceptual: frozen network that compares two batches of images; None leaves the term out.
    """
    weights, quantized = loss.weights, out.quantized
    drawn = out.reconstruction.float()
    losses = {
        "reconstruction": pixel_loss(loss.pixel, drawn, images),
        "commitment": quantized.commitment,
        "entropy": quantized.sample_entropy - quantized.codebook_entropy,
    }
    metrics = {"sample_entropy": quantized.sample_entropy, "codebook_entropy": quantized.codebook_entropy}
    if perceptual is not None:
        losses["perceptual"] = perceptual(drawn, images)
    if out.recovery_logits is not None and weights.recovery > 0:
        losses["recovery"], metrics["recovery_accuracy"] = recovery_loss(
            out.recovery_logits.float(), out.source, quantized.index
        )
    metrics = {name: value.detach() for name, value in metrics.items()}
    return {name: value for name, value in losses.items() if getattr(weights, name) != 0}, metrics


class AutoencoderStep(nn.Module):
    """Everything the autoencoder minimises, in one forward: reconstruction, alignment, the discriminator's opinion.

    Args:
        model: the tokenizer.
        loss: terms and weights.
        dtype: arithmetic of the tokenizer, the discriminator and the teacher; the perceptual network stays in float32.
        discriminator: asked, not trained, here; None without an adversarial term. Freeze it around the forward.
        perceptual: frozen network that compares two batches of images.
        teacher: frozen network that maps images to the alignment target; None when labels are the target, or the
            batches bring the target along.
    """

    def __init__(
        self,
        model: MergeVQ,
        loss: LossConfig,
        dtype: torch.dtype = torch.float32,
        discriminator: PatchDiscriminator | None = None,
        perceptual: nn.Module | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.dtype = dtype
        self.discriminator = discriminator
        self.perceptual = None if perceptual is None else perceptual.requires_grad_(False).eval()
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "AutoencoderStep":
        """Sets the mode of what is trained; outside networks stay in eval mode: some have dropout or BatchNorm."""
        super().train(mode)
        for frozen in (self.perceptual, self.teacher):
            if frozen is not None:
                frozen.eval()
        return self

    def forward(self, batch: Batch, num_tokens: int, adversarial: bool) -> StepOutput:
        """Returns the named losses.

        Args:
            batch: one micro-batch.
            num_tokens: K.
            adversarial: ask the discriminator.
        """
        images = batch["image"]
        with autocast(images.device, self.dtype):
            out: TokenizerOutput = self.model(images, num_tokens, self.loss.recovery_gradient)
        losses, metrics = reconstruction_terms(out, images, self.loss, self.perceptual)
        if self.loss.weights.alignment > 0:
            losses["alignment"] = self._alignment(batch, num_tokens)
        if adversarial and self.discriminator is not None:
            losses["adversarial"] = self._adversarial(out.reconstruction)
        return StepOutput(losses, metrics, out.reconstruction.detach().float())

    def _alignment(self, batch: Batch, num_tokens: int) -> Tensor:
        view = batch["view_student"]
        with autocast(view.device, self.dtype):
            student = self.model.forward_alignment(view, num_tokens)
            if "teacher" in batch:
                target = batch["teacher"]
            elif self.teacher is None:
                target = batch["label"]
            else:
                with torch.no_grad():
                    target = self.teacher(batch["view_teacher"]).float()
        return alignment_loss(student.float(), target, self.loss.alignment, self.loss.alignment_temperature)

    def _adversarial(self, drawn: Tensor) -> Tensor:
        assert self.discriminator is not None
        with autocast(drawn.device, self.dtype):
            logits = self.discriminator(drawn).float()
        return hinge_generator(logits) if self.loss.adversarial == "hinge" else non_saturating_generator(logits)


class DiscriminatorStep(nn.Module):
    """Everything the discriminator minimises, in one forward: its loss on real and drawn images, LeCam.

    Args:
        discriminator: what is trained.
        lecam: running logits, read here and moved once per optimizer step by `train_step`; None without the term.
        dtype: arithmetic of the discriminator.
        kind: of the loss.
    """

    def __init__(
        self,
        discriminator: PatchDiscriminator,
        lecam: LeCam | None,
        dtype: torch.dtype = torch.float32,
        kind: Literal["hinge", "vanilla"] = "hinge",
    ) -> None:
        super().__init__()
        self.loss = hinge_discriminator if kind == "hinge" else vanilla_discriminator
        self.dtype = dtype
        self.discriminator = discriminator
        self.lecam = lecam

    def forward(self, real: Float[Tensor, "B 3 H W"], drawn: Float[Tensor, "B 3 H W"]) -> StepOutput:
        """Returns the named losses and the mean logits.

        Args:
            real: images in [-1, 1].
            drawn: their reconstructions, detached.
        """
        # Two passes: BatchNorm must not see both kinds at once.
        with autocast(real.device, self.dtype):
            real_logits, drawn_logits = self.discriminator(real).float(), self.discriminator(drawn).float()
        losses = {"discriminator": self.loss(real_logits, drawn_logits)}
        if self.lecam is not None:
            losses["lecam"] = self.lecam.penalty(real_logits, drawn_logits)
        metrics = {"logits_real": real_logits.detach().mean(), "logits_fake": drawn_logits.detach().mean()}
        return StepOutput(losses, metrics, drawn[:0])


def weighted_sum(losses: dict[str, Tensor], weights: Any) -> Tensor:
    """Returns the sum of the losses times the weights of their names; the discriminator's has none and counts once."""
    return torch.stack([getattr(weights, name, 1.0) * value for name, value in losses.items()]).sum()
