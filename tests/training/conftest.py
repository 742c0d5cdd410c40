"""A run that trains a tokenizer of a few thousand weights in a second, with every loss on, and images for it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from mergevq.data.cache_writer import write_token_cache
from mergevq.data.folder import ImageFolder
from mergevq.data.token_cache import TokenCache
from mergevq.generator.config import GeneratorConfig
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import (
    DataConfig,
    LossConfig,
    LossWeights,
    OptimConfig,
    TokenizerLoopConfig,
    TokenizerOptimConfig,
    TokenizerRun,
)
from mergevq.training.generator_config import (
    GeneratorLoopConfig,
    GeneratorLossConfig,
    GeneratorRun,
    TokenDataConfig,
    fit_model,
)

NUM_IMAGES = 13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost tiny networks more than they give, and OpenMP's do not survive the fork of a two-process test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Perceptual(nn.Module):
    """A small random network that compares images, with a dropout that must stay off."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(7)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return (self.layers(reconstruction) - self.layers(image)).square().mean()


class Teacher(nn.Module):
    """A small random network with ten outputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(8)
            self.layers = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10))

    def forward(self, images: Tensor) -> Tensor:
        return 4 * self.layers(images)


@pytest.fixture
def perceptual() -> nn.Module:
    return Perceptual()


@pytest.fixture
def teacher() -> nn.Module:
    return Teacher()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen smooth images in two class folders, of several sizes."""
    folder = tmp_path_factory.mktemp("images")
    rng = torch.Generator().manual_seed(3)
    for i in range(NUM_IMAGES):
        coarse = torch.randint(0, 256, (4, 4, 3), generator=rng, dtype=torch.uint8)
        image = Image.fromarray(coarse.numpy()).resize((36 + i, 48 - i), Image.Resampling.BICUBIC)
        path = folder / ("cats" if i % 3 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture
def tiny_run(tiny_config: TokenizerConfig, image_folder: Path) -> TokenizerRun:
    """Every loss on, two micro-batches of two, saved every three of six steps."""
    return TokenizerRun(
        model=tiny_config,
        loss=LossConfig(weights=LossWeights(lecam=0.1), disc_channels=4, disc_layers=2, lecam_decay=0.5),
        data=DataConfig(train=str(image_folder), val_fraction=0.3, flip=True, workers=0),
        optim=TokenizerOptimConfig(
            lr=1e-3, disc_lr=1e-3, warmup_steps=2, schedule="cosine", clip_norm=1.0, ema_decay=0.5
        ),
        loop=TokenizerLoopConfig(
            steps=6,
            batch_size=2,
            accumulate=2,
            num_tokens=(64, 40, 20),
            val_num_tokens=(64, 20),
            val_every=1000,
            val_images=3,
            save_every=3,
            log_every=1,
        ),
    )


class Caches(NamedTuple):
    """Tokens of images that a generator trains on, of others, and the tokenizer that made them."""

    train: Path
    val: Path
    tokenizer: Path


@pytest.fixture(scope="session")
def caches(tiny_config: TokenizerConfig, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    """Nine images of two classes at K = 40, 20 and 10 in two views, and four others at the same K."""
    folder = tmp_path_factory.mktemp("tokens")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        tok = MergeVQ(tiny_config).eval()
    tok.save_pretrained(folder / "tokenizer.safetensors")
    images = ImageFolder(image_folder)
    for name, numbers, views in (("train", range(9), ("crop", "flip")), ("val", range(9, 13), ("crop",))):
        write_token_cache(
            tok, images.select(numbers), folder / name, num_tokens=(40, 20, 10), views=views, shard_size=4, workers=0
        )
    return Caches(folder / "train", folder / "val", folder / "tokenizer.safetensors")


@pytest.fixture
def generator_run(caches: Caches) -> GeneratorRun:
    """A few thousand weights, two micro-batches of two, saved every three of six steps; fitted to `caches`."""
    run = GeneratorRun(
        model=GeneratorConfig(
            groups=(3, 3), num_bits=6, grid=(8, 8), width=16, depth=2, group_depth=1, heads=2, ffn_multiple=16,
            num_tokens=20,
        ),
        loss=GeneratorLossConfig(label_smoothing=0.1),
        data=TokenDataConfig(tokens=str(caches.train), val_tokens=str(caches.val), tokenizer=str(caches.tokenizer)),
        optim=OptimConfig(
            lr=1e-2, betas=(0.9, 0.95), weight_decay=0.05, warmup_steps=2, schedule="cosine", clip_norm=1.0,
            ema_decay=0.5,
        ),
        loop=GeneratorLoopConfig(
            steps=6, batch_size=2, accumulate=2, val_every=1000, val_images=3, save_every=3, log_every=1,
            sample_classes=0,
        ),
    )  # fmt: skip
    return fit_model(run, TokenCache(caches.train))


@pytest.fixture(params=["raster", "random"])
def either_run(generator_run: GeneratorRun, request: pytest.FixtureRequest) -> GeneratorRun:
    """The same in raster and in random order."""
    return replace(generator_run, model=replace(generator_run.model, order=request.param))


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def batch() -> list[dict[str, Tensor]]:
    """Two micro-batches of two images, with the views that alignment needs."""
    rng = torch.Generator().manual_seed(5)

    def draw(side: int) -> Tensor:
        return torch.rand(2, 3, side, side, generator=rng) * 2 - 1

    return [{"image": draw(32), "view_student": draw(28), "view_teacher": draw(32)} for _ in range(2)]
