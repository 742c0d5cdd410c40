"""The file of a tokenizer: weights, and a header that says how to build it and what tokens it makes."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergevq import __version__
from mergevq.checksum import with_checksum
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ShapeError
from mergevq.files import check_format, refuse_existing, save_tensors
from mergevq.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    from mergevq.tokenizer.model import MergeVQ

KIND = "tokenizer/1"


def write_model(tok: "MergeVQ", path: Path, step: int, force: bool, dtype: torch.dtype | None) -> Path:
    """Writes a tokenizer's file and returns its path; see `MergeVQ.save_pretrained`.

    Raises:
        OutputExistsError: there is a file already.
        ShapeError: a weight is not finite, or is not in `dtype`.
    """
    if path.suffix != ".safetensors":
        path = path / "model.safetensors"
    refuse_existing(path, force)
    model = tok if dtype is None else copy.deepcopy(tok).to(dtype)
    tensors = finite_weights(model)
    header = {
        "mergevq": KIND,
        "version": __version__,
        "config": json.dumps(config_to_dict(tok.config)),
        "step": str(step),
        "fingerprint": model.float().fingerprint() if model is not tok else tok.fingerprint(),
    }
    save_tensors(path, tensors, with_checksum(header, tensors))
    return path


def finite_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the entries of a model's state_dict.

    Raises:
        ShapeError: one is not finite.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    broken = [name for name, good in zip(tensors, finite, strict=True) if not good]
    if broken:
        raise ShapeError(f"expected finite weights, got NaN or infinity in {', '.join(broken[:3])}: nothing was saved")
    return tensors


def read_config(header: dict[str, str], path: Path) -> TokenizerConfig:
    """Returns the configuration in a model file's header.

    Raises:
        CheckpointError: it is missing or cannot be understood.
    """
    check_format(header, KIND, path)
    try:
        return config_from_dict(TokenizerConfig, json.loads(header["config"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: expected a tokenizer configuration in the header, got one that is not: {error}"
        ) from error
