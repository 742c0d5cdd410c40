import hashlib
import math
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError, ShapeError
from mergevq.metrics.codebook import CodebookUsage
from mergevq.metrics.distribution import FeatureSet, FeatureStatistics, FeatureStore, frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork, feature_network
from mergevq.metrics.image import psnr, ssim, to_uint8


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def gaussian(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ images


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-4.0, -1.0, -0.999, 0.0, 1 / 255, 1.0, 3.6])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 128, 255, 255]
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1).long(), every)


def test_psnr_of_known_errors():
    reference = torch.full((2, 3, 12, 12), 100, dtype=torch.uint8)
    other = reference.clone()
    other[0] += 10
    assert psnr(other, reference).tolist() == [pytest.approx(10 * math.log10(255**2 / 100)), math.inf]


def test_image_metrics_see_rounded_pixels_of_single_images():
    x, y = random(3, 3, 16, 16), random(3, 3, 16, 16, seed=1) * 1.2
    for metric in (psnr, ssim):
        together = metric(y, x)
        assert torch.equal(metric(to_uint8(y), to_uint8(x)), together)
        # Not the metric of the batch: each image alone gives the same.
        alone = torch.cat([metric(y[i : i + 1], x[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=0)
        torch.testing.assert_close(metric(x, y), together, rtol=1e-9, atol=0)
    torch.testing.assert_close(ssim(x, x), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_raise(bad):
    x = random(1, 3, 16, 16)
    x[0, 1, 2, 3] = bad
    for metric in (psnr, ssim):
        with pytest.raises(ShapeError, match="finite pixels"):
            metric(x, random(1, 3, 16, 16))
    features = gaussian(10, 4)
    features[3, 2] = bad
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ShapeError, match="finite features"):
            distance(gaussian(10, 4), features)


def test_ssim_needs_the_window():
    with pytest.raises(ShapeError, match=r"at least 11 x 11 pixels, got \(10, 16\)"):
        ssim(random(1, 3, 10, 16), random(1, 3, 10, 16))


# ----------------------------------------------------------------------------------------------------- distributions


def with_moments(mean, covariance, count=200):
    """Features whose mean and covariance are exactly these."""
    mean, covariance = mean.double(), covariance.double()
    x = gaussian(count, len(mean))
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    # For covariances that commute: sum of squared differences of means and of standard deviations.
    rotation, _ = torch.linalg.qr(gaussian(6, 6, seed=5))
    mean_a, mean_b = gaussian(2, 6, seed=6)
    std_a, std_b = gaussian(2, 6, seed=7).abs() + 0.1
    a = with_moments(mean_a, rotation @ torch.diag(std_a**2) @ rotation.T)
    b = with_moments(mean_b, rotation @ torch.diag(std_b**2) @ rotation.T, count=300)
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count", [20, 200])
def test_frechet_distance_to_itself_is_zero(count):
    # With 20 images the covariance of 50 features is singular.
    x = gaussian(count, 50) * 3 + 1
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[torch.randperm(count)]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances():
    # One set varies along two of three axes, another along one of them, the last not at all.
    two, one = (torch.zeros(200, 3, dtype=torch.float64) for _ in range(2))
    two[:, :2] = with_moments(torch.zeros(2), torch.diag(torch.tensor([4.0, 9.0])))
    one[:, :1] = with_moments(torch.zeros(2), torch.eye(2))[:, :1]
    constant = torch.full((5, 3), 2.0, dtype=torch.float64)
    assert frechet_distance(two, one) == pytest.approx((2 - 1) ** 2 + 9, rel=1e-9)
    assert frechet_distance(constant, one) == pytest.approx(1 + 3 * 2**2, rel=1e-9)
    assert frechet_distance(constant, constant) == 0


def test_kernel_distance_grows_with_the_shift():
    a, b = gaussian(100, 8), gaussian(80, 8, seed=1)
    distances = [kernel_distance(a, b + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert distances == sorted(distances) and distances[1] > 3 * abs(distances[0])


def test_kernel_distance_has_no_bias():
    values = [kernel_distance(gaussian(30, 8, seed=2 * i), gaussian(30, 8, seed=2 * i + 1)) for i in range(60)]
    mean, std = torch.tensor(values).mean(), torch.tensor(values).std()
    assert std > 0 and abs(mean) < 3 * std / math.sqrt(60)


def test_kernel_distance_of_pairs_has_no_bias_and_that_of_copies_is_zero():
    x = gaussian(30, 8)
    assert kernel_distance(x, x, paired=True) == 0 > kernel_distance(x, x)
    # Both sets have the same distribution, and a partner is nearly a copy: the truth is 0.
    values, unpaired = [], []
    for i in range(60):
        x, noise = gaussian(30, 8, seed=2 * i), gaussian(30, 8, seed=2 * i + 1)
        y = 0.9 * x + math.sqrt(1 - 0.9**2) * noise
        values.append(kernel_distance(x, y, paired=True))
        unpaired.append(kernel_distance(x, y))
    for estimates, unbiased in ((values, True), (unpaired, False)):
        mean, std = torch.tensor(estimates).mean(), torch.tensor(estimates).std()
        assert bool(abs(mean) < 3 * std / math.sqrt(60)) == unbiased


@pytest.mark.parametrize("block", [7, 20, 41, 2048])
def test_sums_of_the_kernel_are_those_of_the_whole_matrix(block):
    a, b = gaussian(41, 8).double(), gaussian(30, 8, seed=1).double() + 1
    kernel = {name: (x @ y.T / 8 + 1) ** 3 for name, x, y in (("aa", a, a), ("bb", b, b), ("ab", a, b))}
    within = [(kernel[name].sum() - kernel[name].trace()) / (n * (n - 1)) for name, n in (("aa", 41), ("bb", 30))]
    assert FeatureSet(a).within.item() == pytest.approx(41 * 40 * within[0].item(), rel=1e-12)
    expected = within[0] + within[1] - 2 * kernel["ab"].mean()
    before = a.clone()
    assert kernel_distance(a, b, block) == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(a, before)
    pairs = kernel["ab"][:30].sum() - kernel["ab"][:30].trace()
    inside = (kernel["aa"][:30, :30].sum() - kernel["aa"][:30, :30].trace()) / (30 * 29) + within[1]
    found = kernel_distance(a[:30], b, block, paired=True)
    assert found == pytest.approx((inside - 2 * pairs / (30 * 29)).item(), rel=1e-11)


def test_the_kernel_matrix_is_never_held_whole(monkeypatch):
    sizes, plain = [], torch.Tensor.__matmul__

    def watched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = plain(x, y)
        sizes.append(product.shape)
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    kernel_distance(gaussian(50, 4), gaussian(45, 4, seed=1), 10)
    # Five times five blocks between; of each symmetric matrix its diagonal and what is right of it.
    assert len(sizes) == 15 + 15 + 25
    assert all(max(size) <= 10 for size in sizes)


def test_a_set_compared_several_times_is_worked_on_once(monkeypatch):
    x, others = gaussian(40, 6), [gaussian(40, 6, seed=i) + i for i in (1, 2, 3)]
    expected = [(frechet_distance(x, y), kernel_distance(x, y), kernel_distance(x, y, paired=True)) for y in others]
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr("torch.linalg.eigh", lambda *args: calls.append(1) or eigh(*args))
    kept = FeatureSet(x)
    for y, values in zip(others, expected, strict=True):
        found = (frechet_distance(kept, y), kernel_distance(kept, y), kernel_distance(kept, FeatureSet(y), paired=True))
        assert found == pytest.approx(values, rel=1e-12)
    assert len(calls) == 1 + len(others)


@pytest.mark.parametrize("sizes", [(100,), (1, 99), (30, 50, 20)])
def test_one_and_several_batches_give_the_same(sizes):
    x, y = gaussian(100, 5) + 1000, gaussian(80, 5, seed=1) * 2 + 1001
    statistics, store = FeatureStatistics(), FeatureStore()
    for part in x.split(list(sizes)):
        statistics.update(part)
        store.update(part.float())
    torch.testing.assert_close(statistics.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics.covariance, x.T.cov(), rtol=1e-9, atol=1e-12)
    assert frechet_distance(statistics, y) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert torch.equal(store.features, x.float())


@pytest.mark.usefixtures("unchecked")
def test_too_few_images_or_other_widths():
    with pytest.raises(ShapeError, match="at least 2 images, got 1"):
        frechet_distance(gaussian(1, 3), gaussian(5, 3))
    with pytest.raises(ShapeError, match="at least 2 images on either side, got 5 and 1"):
        kernel_distance(gaussian(5, 3), gaussian(1, 3))
    with pytest.raises(ShapeError, match="either side of pairs, got 5 and 4"):
        kernel_distance(gaussian(5, 3), gaussian(4, 3), paired=True)
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ShapeError, match="of one width, got 3 and 4"):
            distance(gaussian(5, 3), gaussian(5, 4))
    for empty in (FeatureStatistics(), FeatureStore()):
        with pytest.raises(ShapeError, match=r"call update\(\) first"):
            _ = empty.mean if isinstance(empty, FeatureStatistics) else empty.features


# ------------------------------------------------------------------------------------------------- feature networks


class Pool(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale, scale, scale]))

    def forward(self, images):
        return images.mean((2, 3), keepdim=True) * self.scale[:, None, None]


def test_any_module_is_a_feature_network():
    network = feature_network(Pool(2.0)).train()
    images = to_uint8(random(2, 3, 8, 8))
    torch.testing.assert_close(network(images), 2 * (images / 127.5 - 1).mean((2, 3)))
    assert network.name == "Pool" and not network.network.training and feature_network(network) is network


def test_checksum_follows_the_weights():
    same, other = FeatureNetwork(Pool(2.0), "a"), FeatureNetwork(Pool(2.5), "a")
    assert FeatureNetwork(Pool(2.0), "b").checksum == same.checksum != other.checksum
    data = torch.tensor([2.0, 2.0, 2.0]).numpy().tobytes()
    assert same.checksum == hashlib.sha256(b"scale torch.float32 (3,)\n" + data).hexdigest()


def test_lite1_features():
    network = feature_network("lite1")
    images = to_uint8(random(1, 3, 64, 64))
    features = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(images), features)
    assert features.shape == (1, 1280) and features.std() > 0.01
    assert network.name == "lite1" and len(network.checksum) == 64


def test_unknown_network():
    with pytest.raises(ConfigError, match="network must be inception, lite1 or a module, got 'lite2'"):
        feature_network("lite2")


@pytest.mark.parametrize(
    "module, name",
    [("torch_fidelity.feature_extractor_inceptionv3", "inception"), ("efficientnet_lite_pytorch", "lite1")],
)
def test_missing_packages_name_the_extra(monkeypatch, module, name):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mergevq\[eval\]'"):
        feature_network(name)


@pytest.fixture
def hub_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def test_inception_offline_is_one_line(monkeypatch, hub_folder):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(CheckpointError, match=r"weights-inception-.*pth.*use network lite1") as caught:
        feature_network("inception")
    assert "\n" not in str(caught.value)


def test_inception_of_another_checksum_is_refused(hub_folder):
    hub_folder.mkdir()
    (hub_folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"expected SHA-256 6726825d\w{56}, got \w{64}: delete"):
        feature_network("inception")


def test_the_whole_checksum_of_inception_counts(monkeypatch, hub_folder):
    """A file made to have the digits that the name ends in would be unpickled."""
    hub_folder.mkdir()
    (hub_folder / "weights-inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    forged = SimpleNamespace(hexdigest=lambda: "6726825d" + 56 * "0")
    monkeypatch.setattr("mergevq.metrics.features.hashlib", SimpleNamespace(sha256=lambda *_: forged))
    with pytest.raises(CheckpointError, match="got 6726825d0000"):
        feature_network("inception")


def test_inception_gives_2048_features_of_bytes(monkeypatch, tmp_path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Random weights: the real ones cannot be had without a network.
    monkeypatch.setattr("mergevq.metrics.features._inception_weights", lambda: tmp_path)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.torch.load", lambda *a, **k: {})
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    network = feature_network("inception")
    images = to_uint8(random(1, 3, 32, 32))
    expected = network.network.network.network(images)[0]
    assert torch.equal(network(images), expected) and expected.shape == (1, 2048) and expected.std() > 0
    # The inception score is defined on its logits without bias.
    network.network.network.network.features_list = ["logits_unbiased"]
    torch.testing.assert_close(network.logits(expected), network(images))


# ---------------------------------------------------------------------------------------------------------- codebook


@pytest.mark.parametrize("parts", [1, 3])
def test_codebook_use(parts):
    usage = CodebookUsage(3)
    for part in torch.tensor([[1, 1, 1], [1, 6, 6], [7, 7, 1]]).chunk(parts):
        usage.update(part)
    assert (usage.total, usage.distinct, usage.usage) == (9, 3, 3 / 8)
    assert usage.bit_balance().tolist() == pytest.approx([7 / 9, 4 / 9, 4 / 9])
    entropy = -sum(p * math.log2(p) for p in (5 / 9, 2 / 9, 2 / 9))
    assert usage.entropy() == pytest.approx(entropy)
    assert usage.perplexity() == pytest.approx(2**entropy)


def test_an_evenly_used_codebook_and_a_collapsed_one():
    even, collapsed = CodebookUsage(5), CodebookUsage(30)
    even.update(torch.arange(32).repeat(3))
    collapsed.update(torch.full((4, 4), 2**30 - 1))
    assert even.entropy() == pytest.approx(5) and even.usage == 1 and (even.bit_balance() == 0.5).all()
    assert str(collapsed.entropy()) == "0.0" and collapsed.distinct == 1 and (collapsed.bit_balance() == 1).all()


def test_codebook_use_refuses_what_is_not_in_the_codebook():
    usage = CodebookUsage(3)
    with pytest.raises(ShapeError, match=r"indices in 0\.\.7, got 2\.\.8"):
        usage.update(torch.tensor([2, 8]))
    with pytest.raises(ShapeError, match=r"got -1\.\.3"):
        usage.update(torch.tensor([3, -1]))
    with pytest.raises(ShapeError, match="no tokens were counted"):
        usage.entropy()


def test_lite1_classifies_as_the_network_it_was_taken_from():
    from mergevq.layers.pretrained import _trained_network

    network = feature_network("lite1")
    images = to_uint8(random(2, 3, 240, 240))
    with torch.no_grad():
        expected = _trained_network(1).eval()((images.float() - 127) / 128)
    torch.testing.assert_close(network.logits(network(images)), expected, rtol=1e-3, atol=1e-3)
    assert len(network.classifier_checksum) == 64 != network.checksum


def test_a_network_without_a_classifier_says_so():
    network = feature_network(nn.Flatten())
    assert network.classifier is None and network.classifier_checksum is None
    with pytest.raises(ConfigError, match="Flatten has none"):
        network.logits(torch.zeros(1, 4))
    told = FeatureNetwork(nn.Flatten(), "flat", classifier=nn.Linear(4, 2))
    assert feature_network(told).logits(torch.zeros(3, 4)).shape == (3, 2)
