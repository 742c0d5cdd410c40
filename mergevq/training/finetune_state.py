"""Everything fine-tuning changes, in one value; and which learning rate each layer has."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from mergevq.errors import ConfigError
from mergevq.files import load_strict, read_header
from mergevq.model_files import find_model_file
from mergevq.tokenizer.classifier import Classifier, read_config
from mergevq.tokenizer.classifier_config import ClassifierConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import flat_config
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.finetune_inputs import classifier_config
from mergevq.training.optim import average_weights, build_adamw
from mergevq.training.precision import autocast, choose_dtype


class ClassifierLoss(NamedTuple):
    loss: Float[Tensor, ""]
    """Cross-entropy with the smoothed targets, in nats an image."""
    accuracy: Float[Tensor, ""]
    """Share of images whose largest logit is that of the class with the largest share in the image."""


class FinetuneStep(nn.Module):
    """Everything fine-tuning minimises, in one forward of one wrapped module.

    Args:
        classifier: what is trained.
        num_tokens: K.
        label_smoothing: share of the target that is spread evenly over all classes.
        dtype: arithmetic of the encoder; head and loss are float32.
    """

    def __init__(
        self, classifier: Classifier, num_tokens: int, label_smoothing: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_tokens, self.label_smoothing, self.dtype = num_tokens, label_smoothing, dtype

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        targets: Float[Tensor, "B classes"],
        branch_scale: Float[Tensor, "depth 2 B"] | None,
    ) -> ClassifierLoss:
        """Returns the loss of one micro-batch, whose `targets` are the shares of the classes in each image."""
        with autocast(images.device, self.dtype):
            logits: Tensor = self.classifier(images, self.num_tokens, branch_scale)
        loss = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return ClassifierLoss(loss, (logits.argmax(1) == targets.argmax(1)).float().mean())


@dataclass
class FinetuneState:
    """A fine-tuning between two optimizer steps. `save_state` writes all of it but what can be built again."""

    fabric: Any
    """The lightning.Fabric that wrapped the module."""
    model: Classifier
    """The weights being trained."""
    ema: AveragedModel
    """Their average; `ema.module` is what is validated and published."""
    wrapped: nn.Module
    """The wrapped `FinetuneStep` around `model`."""
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    """Seeds the noise of each optimizer step; on the CPU, and the same on all processes."""
    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Micro-batches that each process has taken from its data since the beginning."""
    elapsed: float = 0.0
    """Seconds spent in training steps, the same on all processes; validating and saving do not count."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns everything with weights that change, by the name it has in the file."""
        return {"model": self.model, "ema": self.ema}

    def optimizers(self) -> dict[str, tuple[Any, nn.Module]]:
        """Returns the optimizer with the module whose parameters it moves."""
        return {"optimizer": (self.optimizer, self.model)}


def build_state(fabric: Any, run: FinetuneRun, tok: MergeVQ) -> FinetuneState:
    """Returns a training at step 0: the tokenizer's encoder, and a head that depends on `run.loop.seed`.

    Args:
        fabric: a launched lightning.Fabric.
        run: what to build, as `resolve` returns it.
        tok: not changed.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs too, which fork_rng does not put back here.
        torch.default_generator.manual_seed(run.loop.seed)
        model = Classifier(classifier_config(run, tok.config))
    model.encoder.load_state_dict(tok.encoder.state_dict())
    dtype, _ = choose_dtype(run.loop.precision, fabric.device)
    step = FinetuneStep(model, run.model.num_tokens, run.loss.label_smoothing, dtype)
    fabric.to_device(step)
    ema = average_weights(model, run.optim.ema_decay)
    scale = partial(lr_scale, depth=tok.config.encoder.depth, decay=run.optim.layer_decay)
    wrapped, optimizer = fabric.setup(step, build_adamw(model, run.optim.lr, run.optim, scale))
    return FinetuneState(fabric, model, ema, wrapped, optimizer, torch.Generator().manual_seed(run.loop.seed))


def lr_scale(name: str, *, depth: int, decay: float) -> float:
    """Returns the share of the learning rate that a parameter of a classifier gets: `decay` to the number of layers
    above its own.

    Layer 0 is the stem with the class token, layers 1 to `depth` are the attention blocks, the last layer is the norm
    with the head.

    Args:
        name: of the parameter in the classifier.
        depth: attention blocks.
        decay: from each layer to the one before it.

    Reference: Clark et al., ELECTRA (arXiv 2003.10555); BEiT (arXiv 2106.08254) for vision transformers.
    """
    part, _, rest = name.partition(".")
    if part != "encoder":
        layer = depth + 1
    elif rest.startswith("blocks."):
        layer = 1 + int(rest.split(".")[1])
    else:
        layer = 0
    return decay ** (depth + 1 - layer)


# Fields of a classifier's configuration that change nothing for weights trained before.
_INDIFFERENT = ("image_size", "num_tokens", "began_as")
_SHAPING = ("tokenizer.encoder.", "tokenizer.num_groups", "tokenizer.num_bits")


def check_init(wanted: ClassifierConfig, name: str | Path) -> None:
    """Checks that a run may start from the weights of a classifier. Reads the header of its file only.

    Raises:
        CheckpointError: there is no such classifier.
        ConfigError: it has other features, classes or another encoder than `wanted`.
    """
    path = find_model_file(name, role="classifier")
    before, now = flat_config(read_config(read_header(path), path)), flat_config(wanted)
    differing = [
        f"{field} ({before[field]!r} there, {now[field]!r} here)"
        for field in now
        if before[field] != now[field]
        and field not in _INDIFFERENT
        and (field.startswith(_SHAPING) or not field.startswith("tokenizer."))
    ]
    if differing:
        raise ConfigError(f"expected the classifier of this run in {name}, got other {', '.join(differing)}")


def start_from(state: FinetuneState, name: str | Path) -> None:
    """Gives the model and its average the weights of a classifier.

    Raises:
        CheckpointError: there is no such classifier, or its weights have other shapes.
        ConfigError: it has other features, classes or another encoder.
    """
    check_init(state.model.config, name)
    given = Classifier.from_pretrained(name)
    for model in (state.model, state.ema.module):
        load_strict(model, given.state_dict(), str(name))
