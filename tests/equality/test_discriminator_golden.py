"""Discriminator, adversarial losses and LeCam against what the authors' release computes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergevq.losses.adversarial import (
    LeCam,
    PatchDiscriminator,
    hinge_discriminator,
    hinge_generator,
    non_saturating_generator,
    vanilla_discriminator,
)

FOLDER = Path(__file__).parents[1] / "data" / "golden"
GOLDEN = load_file(FOLDER / "disc_losses.safetensors")


@pytest.fixture
def discriminator():
    network = PatchDiscriminator(channels=16)
    weights = load_file(FOLDER / "disc_ndf16.weights.safetensors")
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return network


def close(ours, name, **tolerance):
    torch.testing.assert_close(ours, GOLDEN[name], **(tolerance or {"rtol": 1e-4, "atol": 1e-4}))


def test_logits_and_statistics(discriminator):
    close(discriminator(GOLDEN["real"]), "train.logits_real")
    close(discriminator(GOLDEN["fake"]), "train.logits_fake")
    for name, value in discriminator.state_dict().items():
        if "running" in name:
            close(value, f"after_train.{name}", rtol=1e-4, atol=1e-6)
    discriminator.eval()
    close(discriminator(GOLDEN["real"]), "eval.logits_real")
    close(discriminator(GOLDEN["fake"]), "eval.logits_fake")


@pytest.mark.parametrize(
    "name, loss",
    [
        ("hinge_d", lambda real, fake: hinge_discriminator(real, fake)),
        ("vanilla_d", lambda real, fake: vanilla_discriminator(real, fake)),
        ("nonsat_g", lambda real, fake: non_saturating_generator(fake)),
        ("hinge_g", lambda real, fake: hinge_generator(fake)),
    ],
)
def test_losses(name, loss):
    ours = loss(GOLDEN["train.logits_real"], GOLDEN["train.logits_fake"])
    assert ours.item() == pytest.approx(GOLDEN[name].item(), rel=1e-5)


def test_lecam_sequence():
    lecam = LeCam(decay=0.999)
    for real, fake, expected in zip(
        GOLDEN["lecam.logits_real"], GOLDEN["lecam.logits_fake"], GOLDEN["lecam.seq"], strict=True
    ):
        lecam.update(real.mean().item(), fake.mean().item())
        ours = torch.stack([lecam.real, lecam.fake, lecam.penalty(real, fake)])
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
