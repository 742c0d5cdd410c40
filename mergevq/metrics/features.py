"""The networks that turn images into features for distribution distances, each with a name and a checksum."""

import hashlib
import urllib.error
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.layers.pretrained import EfficientNetLite, Frozen, lite_classifier, resize, weights_checksum

# The Inception of the FID paper, converted from its TensorFlow weights by torch-fidelity, and the SHA-256 of the file:
# torch-fidelity unpickles it, so it has to be that very one.
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class FeatureNetwork(nn.Module):
    """A frozen network from images to features, with what identifies it in a result.

    Args:
        network: From images [B, 3, H, W] to features [B, D] or [B, D, 1, 1]. It resizes and normalises by itself.
        name: Under which results are reported.
        takes_bytes: Whether the network wants uint8; otherwise float in [-1, 1].
        classifier: From features [B, D] to logits of classes, for the inception score; None where there is none.
    """

    def __init__(
        self, network: nn.Module, name: str, takes_bytes: bool = False, classifier: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network = Frozen(network)
        self.name = name
        self.takes_bytes = takes_bytes
        self.checksum = weights_checksum(network)
        self.classifier = None if classifier is None else Frozen(classifier)
        self.classifier_checksum = None if classifier is None else weights_checksum(classifier)

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Features of images in bytes, in float32 whatever the autocast."""
        with torch.autocast(images.device.type, enabled=False):
            x = images if self.takes_bytes else images.float() / 127.5 - 1
            out: Tensor = self.network(x)
            return out.float().flatten(1)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """The classifier's answer to features of this network, in float32 whatever the autocast.

        Raises:
            ConfigError: This network has no classifier.
        """
        if self.classifier is None:
            raise ConfigError(f"expected a feature network with a classifier, {self.name} has none: use lite1")
        with torch.autocast(features.device.type, enabled=False):
            out: Tensor = self.classifier(features)
            return out.float()


def feature_network(network: str | nn.Module) -> FeatureNetwork:
    """The feature network of a metric.

    Args:
        network: inception, the one FID and KID are defined on (D = 2048, from torch-fidelity, downloaded once); lite1,
            EfficientNet-Lite1 from its package at 240 pixels (D = 1280, no download), whose distances are named
            FD-lite1 and KD-lite1, never FID; or any network from images in [-1, 1] to features, which resizes and
            normalises by itself and is reported under its class's name. The first two have a classifier: Inception's
            without its bias, as the inception score is computed, and lite1's of the 1,000 ImageNet classes.

    Raises:
        MissingDependencyError: A package is not installed.
        CheckpointError: The Inception weights are not on this machine and cannot be downloaded.
        ConfigError: There is no such network.
    """
    if isinstance(network, FeatureNetwork):
        return network
    if isinstance(network, nn.Module):
        return FeatureNetwork(network, type(network).__name__)
    if network == "lite1":
        return FeatureNetwork(_Resized(EfficientNetLite(1)), "lite1", classifier=lite_classifier(1))
    if network == "inception":
        inception = _Inception()
        return FeatureNetwork(inception, "inception", takes_bytes=True, classifier=inception.classifier())
    raise ConfigError(f"network must be inception, lite1 or a module, got {network!r}")


class _Resized(nn.Module):
    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.pooled(resize(images, self.network.image_size))


class _Inception(nn.Module):
    """torch-fidelity's Inception, which resizes as the original did."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingDependencyError(
                f"network inception needs torch-fidelity ({error}): pip install 'mergevq[eval]', or use network lite1"
            ) from error
        self.network: Any = FeatureExtractorInceptionV3("inception", ["2048"], str(_inception_weights()))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features

    def classifier(self) -> nn.Linear:
        """The last layer without its bias ("logits_unbiased"), which the inception score is defined on."""
        weight = self.network.fc.weight.detach()
        classifier = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        classifier.weight.data.copy_(weight)
        return classifier


def _inception_weights() -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
        except (OSError, urllib.error.URLError, RuntimeError) as error:  # RuntimeError: another checksum
            raise CheckpointError(
                f"network inception needs {path.name}, which is not on this machine and cannot be downloaded "
                f"({error}): connect once, or use network lite1"
            ) from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != INCEPTION_SHA256:
        raise CheckpointError(
            f"{path}: expected SHA-256 {INCEPTION_SHA256}, got {found}: delete the file and try again"
        )
    return path
