"""A patch discriminator, the losses of both sides, and LeCam regularization."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.errors import ConfigError


class PatchDiscriminator(nn.Module):
    """Says of each patch of an image how real it looks: images [B, 3, H, W] -> logits [B, 1, h, w].

    Convolutions of 4x4: `layers` of stride 2, each twice as wide up to 8 times `channels`, then two of stride 1.
    BatchNorm and LeakyReLU between them. It sees real and fake images as separate batches.

    Args:
        channels: Width after the first convolution.
        layers: Convolutions of stride 2; a 256-pixel image gives 30 x 30 logits with 3. Images have at least 3 *
            2^layers pixels a side.

    Reference:
        pix2pix (arXiv 1611.07004) section 3.2.2; layer names and initialisation as in the authors' release.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        if channels < 1 or layers < 1:
            raise ConfigError(f"a discriminator needs at least 1 channel and 1 layer, got {channels} and {layers}")
        main: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            before, width = width, channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            main += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        main.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*main)
        for module in main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                nn.init.zeros_(cast(nn.Parameter, module.bias))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 h w"]:
        """Logits of the patches of images in [-1, 1]; positive means real."""
        logits: Tensor = self.main(images)
        return logits


def hinge_discriminator(real: Float[Tensor, "*real"], fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """What the discriminator minimises, from its logits: real above 1, fake below -1, nothing gained beyond."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def vanilla_discriminator(real: Float[Tensor, "*real"], fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """The original GAN loss of the discriminator: cross-entropy of its logits."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def non_saturating_generator(fake: Float[Tensor, "B *patches"]) -> Float[Tensor, ""]:
    """What the autoencoder minimises: softplus of minus an image's mean logit, averaged over images.

    As in the authors' release, logits are averaged over the patches of an image before the softplus, not after.
    """
    return F.softplus(-fake.float().flatten(1).mean(1)).mean()


def hinge_generator(fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
    """What the autoencoder minimises: minus the mean logit."""
    return -fake.float().mean()


class LeCam(nn.Module):
    """Keeps the discriminator's logits near running means of the other side's, which steadies training on little data.

    Call `update` once per optimizer step and never in validation; the authors' release does so right before `penalty`.
    The running means are part of the state_dict.

    Args:
        decay: Of the running means, which begin at 0.

    Reference:
        Tseng et al., Regularizing generative adversarial networks under limited data (arXiv 2104.03310), equation 5.
    """

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"decay of LeCam must lie in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    @torch.no_grad()
    def update(self, real: float, fake: float) -> None:
        """Moves the running means towards the mean logits of this step.

        Args:
            real: Mean logit of real images, over all processes: every one of them has to give the same.
            fake: Likewise of reconstructions.
        """
        self.real.add_((real - self.real) * (1 - self.decay))
        self.fake.add_((fake - self.fake) * (1 - self.decay))

    def penalty(self, real: Float[Tensor, "*real"], fake: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
        """Squared excess of real logits over the running fake mean, and of the running real mean over fake logits."""
        over = F.relu(real.float() - self.fake).square().mean()
        under = F.relu(self.real - fake.float()).square().mean()
        return over + under
