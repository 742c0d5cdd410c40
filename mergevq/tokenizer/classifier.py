"""A classifier: the encoder of a tokenizer, a norm, a linear head. `mergevq finetune` trains it."""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq import __version__
from mergevq.checksum import check_checksum, with_checksum
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ShapeError
from mergevq.files import check_format, load_strict, load_tensors, refuse_existing, save_tensors
from mergevq.merging import check_num_tokens, merge_schedule
from mergevq.model_files import find_model_file
from mergevq.tokenizer.classifier_config import ClassifierConfig
from mergevq.tokenizer.encoder import Encoder, EncoderOutput
from mergevq.tokenizer.features import choose_features
from mergevq.tokenizer.fingerprint import fingerprint
from mergevq.tokenizer.inputs import check_images
from mergevq.tokenizer.model_file import finite_weights

KIND = "classifier/1"


class Classifier(nn.Module):
    """The encoder of a tokenizer with a norm and a linear head on its features.

    The layers that make codes of tokens are there, so that the encoder is a whole one, but frozen: nothing here uses
    them, and fine-tuned features would make other tokens than the tokenizer's.

    Args:
        config: what to build.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.tokenizer)
        for part in (self.encoder.norm_out, self.encoder.code_out):
            part.requires_grad_(False)
        # A LayerNorm for each part: class token and mean come in sizes of their own.
        self.norm = nn.GroupNorm(config.width // config.tokenizer.encoder.width, config.width, eps=1e-6)
        self.head = nn.Linear(config.width, len(config.class_names))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        num_tokens: int,
        branch_scale: Float[Tensor, "depth 2 B"] | None = None,
    ) -> Float[Tensor, "B classes"]:
        """Returns the logits, in float32 also under autocast. Checks nothing; `finetune` calls it.

        Args:
            images: float in [-1, 1].
            num_tokens: K.
            branch_scale: for stochastic depth; see `Encoder.forward`.
        """
        step, merging = self.config.tokenizer.downsampling, self.config.tokenizer.merging
        grid = images.shape[-2] // step, images.shape[-1] // step
        schedule = merge_schedule(
            grid[0] * grid[1], num_tokens, self.config.tokenizer.encoder.depth, merging.schedule, merging.overflow
        )
        out: EncoderOutput = self.encoder(images, schedule, branch_scale)
        features = choose_features(self.config.features, out.class_token, out.tokens, out.source, grid)
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.head(self.norm(features.float()))
        return logits

    @torch.no_grad()
    def classify(self, images: Float[Tensor, "B 3 H W"], num_tokens: int | None = None) -> Float[Tensor, "B classes"]:
        """Returns the logits of images; their softmax are probabilities, `config.class_names` says of what.

        Args:
            images: float in [-1, 1], on any device; the downsampling divides H and W.
            num_tokens: K; None is the K of training (at most L).

        Raises:
            ShapeError: images or num_tokens are not as described, or the logits are not finite.
        """
        grid = check_images(images, self.config.tokenizer.downsampling)
        patches = grid[0] * grid[1]
        if num_tokens is None:
            # At another size of image, not merging remains not merging.
            merges = self.config.num_tokens < self.config.num_patches
            num_tokens = min(self.config.num_tokens, patches) if merges else patches
        check_num_tokens(num_tokens, images.shape[0], patches)
        device = self.head.weight.device
        with torch.autocast(device.type, enabled=False):
            logits: Tensor = self(images.to(device, torch.float32), num_tokens)
        if not bool(torch.isfinite(logits).all()):
            raise ShapeError("expected finite logits, got NaN or infinity: the classifier's weights are damaged")
        return logits

    def fingerprint(self) -> str:
        """Returns the SHA-256 that a tokenizer with this encoder would have: after training not `config.began_as`."""
        return fingerprint(self.config.tokenizer, self.encoder)

    def save_pretrained(self, path: str | Path, *, step: int = 0, force: bool = False) -> Path:
        """Writes weights and configuration to one `.safetensors` file, atomically; a folder gets `model.safetensors`.
        Returns the file.

        Args:
            path: file ending in .safetensors, or a folder.
            step: optimizer steps the model was trained for, kept in the header.
            force: replace an existing file.

        Raises:
            OutputExistsError: there is a file already.
            ShapeError: a weight is not finite.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / "model.safetensors"
        refuse_existing(path, force)
        tensors = finite_weights(self)
        header = {
            "mergevq": KIND,
            "version": __version__,
            "config": json.dumps(config_to_dict(self.config)),
            "step": str(step),
            "fingerprint": self.fingerprint(),
        }
        save_tensors(path, tensors, with_checksum(header, tensors))
        return path

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: torch.device | str = "cpu") -> "Classifier":
        """Returns the classifier in a file, a folder or a Hugging Face hub repository, in evaluation mode.

        Args:
            name: file ending in .safetensors, a folder with `model.safetensors`, or a hub id like `owner/model`.
            device: where to put it.

        Raises:
            CheckpointError: there is no such model, it is damaged or of another kind, or weights are missing,
                unexpected or misshaped.
        """
        path = find_model_file(name, role="classifier")
        tensors, header = load_tensors(path)
        config = read_config(header, path)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        load_strict(model, tensors, str(path))
        check_checksum(header, tensors, path)
        return model.to(device).eval()


def read_config(header: dict[str, str], path: Path) -> ClassifierConfig:
    """Returns the configuration in a classifier file's header.

    Raises:
        CheckpointError: it is missing or cannot be understood.
    """
    check_format(header, KIND, path)
    try:
        return config_from_dict(ClassifierConfig, json.loads(header["config"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a classifier configuration in the header, got one that is not: {error}"
        ) from error
