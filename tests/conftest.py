"""Small models that every part of the test suite uses."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# Before any hub client is imported: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# The models here are tiny, and several tests start processes of their own: one thread each is the fastest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

from mergevq.tokenizer.config import (  # noqa: E402
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    QuantizerConfig,
    RecoveryConfig,
    TokenizerConfig,
)
from mergevq.tokenizer.model import MergeVQ  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs unless tests for them are asked for: the others compare bits and fork processes."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_config() -> TokenizerConfig:
    """32 pixels, downsampling 4, 64 patches, every module on."""
    return TokenizerConfig(
        image_size=32,
        num_bits=6,
        num_tokens=20,
        num_groups=4,
        layer_scale=0.1,
        encoder=EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=2, heads=2),
        quantizer=QuantizerConfig(norm="layer", temperature=1.0, groups=(3, 3)),
        decoder=DecoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), output_stride=2, depth=1, heads=2),
        recovery=RecoveryConfig(width=16, heads=2, cross_depth=1, self_depth=1),
        alignment=AlignmentConfig(head="two", teacher_dim=10),
    )


@pytest.fixture
def tiny_tokenizer(tiny_config: TokenizerConfig) -> MergeVQ:
    """A tokenizer of `tiny_config` with every parameter drawn at random, in evaluation mode."""
    torch.manual_seed(0)
    model = MergeVQ(tiny_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def images() -> torch.Tensor:
    """Three images [3, 3, 32, 32] in [-1, 1]."""
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns the shape-checking hook off, so that our own message for a wrong shape is what comes."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
