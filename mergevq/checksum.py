"""The SHA-256 in the header of our files: a flipped bit of weights, tokens or header is noticed."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from mergevq.errors import CheckpointError


def with_checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the header with the checksum under `sha256`."""
    return {**header, "sha256": checksum(header, tensors)}


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256, in hex, of the header's other strings, and of each tensor's name, type, shape and bytes."""
    strings = {name: text for name, text in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(strings, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor], path: object) -> None:
    """Checks a file that has a checksum; the first model files have none.

    Raises:
        CheckpointError: the file is not the one that was saved.
    """
    if "sha256" in header and header["sha256"] != checksum(header, tensors):
        raise CheckpointError(
            f"{path}: expected the weights that were saved, the checksum differs: the file is damaged, copy it again"
        )
