import math

import pytest
import torch
import torch.nn.functional as F

from mergevq.errors import ConfigError
from mergevq.losses.adversarial import LeCam, PatchDiscriminator, hinge_discriminator
from mergevq.losses.alignment import alignment_loss
from mergevq.losses.reconstruction import pixel_loss
from mergevq.losses.recovery import recovery_loss


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pixel_loss():
    x, y = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert pixel_loss("l1", x, y).item() == pytest.approx(sum(abs(x - y).flatten().tolist()) / 96, rel=1e-5)
    assert pixel_loss("l2", x, y).item() == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-6)
    assert pixel_loss("l1", x.bfloat16(), y).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ adversarial


def test_discriminator_has_the_releases_size_and_initialisation():
    network = PatchDiscriminator(channels=64, layers=3)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    weights = dict(network.named_parameters())
    assert weights["main.8.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["main.9.weight"].mean().item() == pytest.approx(1, abs=0.01)
    assert all((p == 0).all() for name, p in weights.items() if name.endswith("bias"))
    assert [name for name in weights if name.startswith(("main.0", "main.11"))] == [
        "main.0.weight",
        "main.0.bias",
        "main.11.weight",
        "main.11.bias",
    ]
    assert network.eval()(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("layers, side", [(1, 62), (2, 30), (4, 6)])
def test_discriminators_of_other_depths(layers, side):
    assert PatchDiscriminator(8, layers).eval()(torch.zeros(1, 3, 128, 128)).shape == (1, 1, side, side)


def test_lecam_moves_on_update_alone_and_is_saved():
    lecam = LeCam(decay=0.9)
    real, fake = random(2, 1, 3, 3) + 1, random(2, 1, 3, 3, seed=1) - 1
    assert lecam.penalty(real, fake) == F.relu(real).square().mean() + F.relu(-fake).square().mean()
    assert lecam.real == 0 and lecam.fake == 0
    lecam.update(real.mean().item(), fake.mean().item())
    assert lecam.real.item() == pytest.approx(0.1 * real.mean().item(), rel=1e-5)
    assert lecam.fake.item() == pytest.approx(0.1 * fake.mean().item(), rel=1e-5)
    before = lecam.penalty(real, fake)
    assert lecam.penalty(real, fake) == before
    other = LeCam(decay=0.9)
    other.load_state_dict(lecam.state_dict())
    assert other.penalty(real, fake) == before != LeCam().penalty(real, fake)


def test_lecam_gradient_goes_to_the_logits():
    lecam = LeCam()
    real, fake = (random(4, seed=s).requires_grad_() for s in (0, 1))
    lecam.update(real.mean().item(), fake.mean().item())
    lecam.penalty(real, fake).backward()
    torch.testing.assert_close(real.grad, 2 * F.relu(real.detach() - lecam.fake) / 4)
    torch.testing.assert_close(fake.grad, -2 * F.relu(lecam.real - fake.detach()) / 4)


# -------------------------------------------------------------------------------------------------------- alignment


def test_alignment_kl_is_the_divergence_times_temperature_squared():
    s, t = random(3, 8), random(3, 8, seed=1) * 3
    p, q = (t / 4).softmax(-1), (s / 4).softmax(-1)
    expected = 16 * (p * (p.log() - q.log())).sum(-1).mean()
    assert alignment_loss(s, t, "kl", 4.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert alignment_loss(t, t, "kl").item() == pytest.approx(0, abs=1e-6)


def test_alignment_cosine():
    s = random(3, 8)
    assert alignment_loss(s, 5 * s, "cosine").item() == pytest.approx(0, abs=1e-6)
    assert alignment_loss(s, -s, "cosine").item() == pytest.approx(2, rel=1e-6)


def test_alignment_with_labels_smooths_them():
    s, labels = random(3, 5), torch.tensor([0, 4, 2])
    target = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = -(target * s.log_softmax(-1)).sum(-1).mean()
    assert alignment_loss(s, labels, "labels").item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_unknown_kinds():
    with pytest.raises(ConfigError, match="alignment must be kl, cosine or labels, got 'mse'"):
        alignment_loss(random(2, 3), random(2, 3), "mse")
    with pytest.raises(ConfigError, match="pixel loss must be l1 or l2, got 'l3'"):
        pixel_loss("l3", random(1, 3, 2, 2), random(1, 3, 2, 2))
    with pytest.raises(ConfigError, match="at least 1 channel and 1 layer, got 0 and 3"):
        PatchDiscriminator(0)
    with pytest.raises(ConfigError, match=r"decay of LeCam must lie in \[0, 1\), got 1.0"):
        LeCam(1.0)


# --------------------------------------------------------------------------------------------------------- recovery


def test_recovery_without_equal_indices_is_cross_entropy():
    logits, source = random(2, 6, 4), torch.tensor([[0, 0, 1, 2, 3, 1], [3, 2, 1, 0, 0, 0]])
    out = recovery_loss(logits, source, torch.tensor([[9, 7, 5, 3], [1, 2, 3, 4]]))
    assert out.loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), source.flatten()).item(), rel=1e-5)
    assert out.accuracy.item() == pytest.approx((logits.argmax(-1) == source).float().mean().item())


def test_kept_tokens_of_equal_index_are_one_class():
    logits = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 3.0, 1.0]]]).requires_grad_()
    out = recovery_loss(logits, torch.tensor([[2, 2]]), torch.tensor([[8, 5, 8]]))
    p = logits.detach().softmax(-1)[0]
    expected = -(math.log(p[0, 0] + p[0, 2]) + math.log(p[1, 0] + p[1, 2])) / 2
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    # The first patch's best token is 0, whose index is that of the true token 2.
    assert out.accuracy.item() == 0.5
    out.loss.backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0] < 0 and logits.grad[0, 0, 2] < 0 < logits.grad[0, 0, 1]


def test_recovery_is_computed_in_float32():
    logits, source, index = random(1, 5, 3).bfloat16(), torch.tensor([[0, 1, 2, 1, 0]]), torch.tensor([[1, 2, 3]])
    assert recovery_loss(logits, source, index).loss == recovery_loss(logits.float(), source, index).loss


def test_discriminator_learns_two_batches_apart():
    torch.manual_seed(0)
    network = PatchDiscriminator(8, 2)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    real, fake = 0.5 + 0.3 * random(4, 3, 32, 32), 0.3 * random(4, 3, 32, 32, seed=1)
    losses = []
    for _ in range(12):
        loss = hinge_discriminator(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.3
