"""What both generators share: a transformer, its configuration, and the file that holds both."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
from torch import nn

from mergevq import __version__
from mergevq.checksum import check_checksum, with_checksum
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ConfigError, ShapeError
from mergevq.files import check_format, load_strict, load_tensors, refuse_existing, save_tensors
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import check_pair
from mergevq.generator.transformer import Transformer
from mergevq.model_files import find_model_file

KIND = "generator/1"
_CLASSES = {"raster": "MergeAR", "random": "RandomAR"}
_ROLES = {"raster": "merge_ar", "random": "random_ar"}

AnyGenerator = TypeVar("AnyGenerator", bound="Generator")


class Generator(nn.Module):
    """A transformer that generates tokens; `MergeAR` and `RandomAR` say in which order.

    Args:
        config: what to build; see `mergevq.presets.generator`.

    Raises:
        ConfigError: the configuration is of the other order.
    """

    order: ClassVar[Literal["raster", "random"]]

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        if config.order != self.order:
            raise ConfigError(f"expected order {self.order}, got {config.order}: build {_CLASSES[config.order]} of it")
        self.config = config
        self.transformer = Transformer(config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.norm.weight.device

    def check_tokens_of(self, *, grid: tuple[int, int] | None, num_bits: int, tokenizer: str | None) -> None:
        """Checks that a tokenizer, or a cache of its tokens, belongs to this generator.

        Args:
            grid: rows and columns of its patches; None if images of several sizes are encoded.
            num_bits: bits of its indices.
            tokenizer: its fingerprint; None if nobody knows.

        Raises:
            CheckpointError: it has another grid or other bits, or the generator was trained on another one's tokens.
        """
        check_pair(self.config, grid=grid, num_bits=num_bits, tokenizer=tokenizer)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of weights and configuration, in hex: with the request, all that samples depend on."""
        digest = hashlib.sha256(json.dumps(config_to_dict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @contextmanager
    def sampling_mode(self, dtype: torch.dtype | None) -> Iterator[Transformer]:
        """Gives the transformer without gradients and dropout, in float32 or under autocast to `dtype`, whatever
        surrounds it.
        """
        training, device = self.training, self.device.type
        lower = dtype is not None and dtype != torch.float32
        self.eval()
        try:
            with torch.no_grad(), torch.autocast(device, dtype=dtype if lower else torch.bfloat16, enabled=lower):
                yield _lowered(self.transformer, dtype) if dtype is not None and lower else self.transformer
        finally:
            self.train(training)

    def save_pretrained(
        self, path: str | Path, *, step: int = 0, force: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Writes weights and configuration to one `.safetensors` file, atomically; a folder gets `model.safetensors`.
        Returns the file.

        Args:
            path: file ending in .safetensors, or a folder.
            step: optimizer steps the model was trained for, kept in the header.
            force: replace an existing file.
            dtype: of the weights in the file, such as torch.float16 for half the size; None keeps them as they are.

        Raises:
            OutputExistsError: there is a file already.
            ShapeError: a weight is not finite, or is not in `dtype`.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / "model.safetensors"
        refuse_existing(path, force)
        model = self if dtype is None else copy.deepcopy(self).to(dtype)
        tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
        broken = [name for name, good in zip(tensors, finite, strict=True) if not good]
        if broken:
            raise ShapeError(
                f"expected finite weights, got NaN or infinity in {', '.join(broken[:3])}: nothing was saved"
            )
        config = json.dumps(config_to_dict(self.config))
        header = {"mergevq": KIND, "version": __version__, "config": config, "step": str(step)}
        save_tensors(path, tensors, with_checksum(header, tensors))
        return path

    @classmethod
    def from_pretrained(
        cls: type[AnyGenerator], name: str | Path, *, device: torch.device | str = "cpu"
    ) -> AnyGenerator:
        """Returns the generator in a file, a folder or a Hugging Face hub repository, in evaluation mode.

        Args:
            name: file ending in .safetensors, a folder with `model.safetensors`, "emoji_64" for the generators
                that come with the package, or a hub id like `owner/model`.
            device: where to put it.

        Raises:
            CheckpointError: there is no such model, it is damaged, of another kind or of the other order, or weights
                are missing, unexpected or misshaped.
        """
        path = find_model_file(name, role=_ROLES[cls.order])
        tensors, header = load_tensors(path)
        config = read_config(header, path)
        if config.order != cls.order:
            raise CheckpointError(
                f"{path}: expected a generator of order {cls.order}, got one of order {config.order}: "
                f"load it with {_CLASSES[config.order]}"
            )
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        model.transformer.fill_rotations()
        load_strict(model, tensors, str(path))
        check_checksum(header, tensors, path)
        return model.to(device).eval()


def _lowered(transformer: Transformer, dtype: torch.dtype) -> Transformer:
    """Returns the transformer with the weights of linear layers in another type, as autocast would convert them in
    every step; the others are shared.
    """
    with torch.device("meta"):
        copy = Transformer(transformer.config)
    linear = {f"{name}.weight" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    weights = {name: w.to(dtype) if name in linear else w for name, w in transformer.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    copy.rotation, copy.group_rotation = transformer.rotation, transformer.group_rotation
    return copy.eval()


def read_config(header: dict[str, str], path: Path) -> GeneratorConfig:
    """Returns the configuration in a generator file's header.

    Raises:
        CheckpointError: it is of another kind, missing, or cannot be understood.
    """
    check_format(header, KIND, path)
    try:
        return config_from_dict(GeneratorConfig, json.loads(header["config"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a generator configuration in the header, got one that is not: {error}"
        ) from error
