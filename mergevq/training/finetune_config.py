"""Everything fine-tuning depends on, as frozen dataclasses. No torch is imported here."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mergevq.errors import ConfigError
from mergevq.tokenizer.classifier_config import PooledFeatures
from mergevq.training.config import FREE_FIELDS, LoopConfig, OptimConfig, Run, check_run


@dataclass(frozen=True)
class FinetuneModelConfig:
    features: PooledFeatures = "class"
    """What is classified by: the class token, the mean of the semantic tokens by size, or both side by side."""
    num_tokens: int = 0
    """K, 1 .. L; 0 merges nothing (the paper)."""
    image_size: int = 0
    """Side of the images in pixels, a multiple of the tokenizer's downsampling; 0 takes the tokenizer's."""
    drop_path: float = 0.1
    """Share of images that the last attention block leaves out in training, in each of its two branches; falls linearly
    to 0 at the first block (stochastic depth).
    """
    class_names: tuple[str, ...] = ()
    """The classes, in the order of the logits; the training images decide."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer whose encoder it begins with; data.tokenizer decides."""


@dataclass(frozen=True)
class FinetuneLossConfig:
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over all classes; in training only."""
    mixup: float = 0.0
    """Both parameters of the Beta law that mixup draws its shares from; 0 is off."""
    cutmix: float = 0.0
    """The same of cutmix; 0 is off. With both on, each takes half of the micro-batches that are mixed."""
    mix_share: float = 1.0
    """Share of the micro-batches that are mixed."""


@dataclass(frozen=True)
class FinetuneDataConfig:
    tokenizer: str = ""
    """The tokenizer whose encoder is fine-tuned: a file, a run's folder, or a hub id. It stays as it is."""
    train: str = "embedded"
    """Folder of images in class subfolders, a .zip or a pattern of them (train-*.zip), or embedded."""
    val: str = ""
    """The same for held-out images; empty takes them from `train` (the embedded set has its own split)."""
    val_fraction: float = 0.02
    """Share of `train` held out when `val` is empty; decided by a hash of each file's name."""
    crop: Literal["part", "random", "center"] = "part"
    """Of a training image: a random part (8 % to 100 % of its area) made square, or a square cut at random or from the
    middle after the short side was resized.
    """
    flip: bool = True
    """Mirror half of the training images."""
    rand_augment: int = 0
    """Operations that RandAugment (magnitude 9) does to a training image; 0 is off."""
    workers: int = 2
    """Processes that read images, for each training process; 0 reads in the training process."""


@dataclass(frozen=True)
class FinetuneOptimConfig(OptimConfig):
    layer_decay: float = 0.65
    """Factor of the learning rate from each layer to the one before it. The head has optim.lr, the last attention block
    this share of it, and so on down to the stem and the class token.
    """


def _optim() -> FinetuneOptimConfig:
    return FinetuneOptimConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, clip_norm=5.0, schedule="cosine")


@dataclass(frozen=True)
class FinetuneRun(Run):
    """A complete description of fine-tuning; `finetune(run, out)` runs it.

    What tokenizer and images decide (size, K, classes) need not be said: `resolve` puts it in.
    """

    kind: ClassVar[str] = "finetune-run/1"
    free_fields: ClassVar[tuple[str, ...]] = (*FREE_FIELDS, "data.tokenizer")

    model: FinetuneModelConfig = field(default_factory=FinetuneModelConfig)
    loss: FinetuneLossConfig = field(default_factory=FinetuneLossConfig)
    data: FinetuneDataConfig = field(default_factory=FinetuneDataConfig)
    optim: FinetuneOptimConfig = field(default_factory=_optim)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_run(self)
        model, loss = self.model, self.loss
        for name, value in (("model.drop_path", model.drop_path), ("loss.label_smoothing", loss.label_smoothing)):
            if not 0 <= value < 1:
                raise ConfigError(f"{name} must lie in 0..1, below 1, got {value}")
        for name, least in (
            ("model.num_tokens", model.num_tokens),
            ("model.image_size", model.image_size),
            ("loss.mixup", loss.mixup),
            ("loss.cutmix", loss.cutmix),
            ("data.rand_augment", self.data.rand_augment),
        ):
            if least < 0:
                raise ConfigError(f"{name} must be at least 0, got {least}")
        if not 0 <= loss.mix_share <= 1:
            raise ConfigError(f"loss.mix_share must lie in 0..1, got {loss.mix_share}")
        if not 0 < self.optim.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay must lie in 0..1, above 0, got {self.optim.layer_decay}")
