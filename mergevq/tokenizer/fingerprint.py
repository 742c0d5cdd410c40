"""The identity of a tokenizer: what its tokens depend on, hashed."""

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from mergevq.configuration import config_to_dict
from mergevq.tokenizer.config import TokenizerConfig

# Hashing takes a moment at real sizes, and every encode and decode asks. A known hash is used again as long as the
# weights look unchanged, so a model keeps no state of its own.
_SAMPLED = 256
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def fingerprint(config: TokenizerConfig, encoder: nn.Module) -> str:
    """Returns the SHA-256 of the encoder's weights and of the parts of the configuration that shape codes, in hex."""
    tensors = encoder.state_dict()
    key = _look(tensors)
    known = _KNOWN.get(encoder)
    if known is None or known[0] != key:
        known = (key, _hash(config, tensors))
        _KNOWN[encoder] = known
    return known[1]


def _look(tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Returns what differs if weights were written to: their places, how often that was counted, and a sample of them.

    Counting alone misses fused optimizers and writes through `.data`; a sample alone misses an edit of single weights.
    """
    counted = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors.values())
    sample = torch.cat([_sample(t.detach()).float() for t in tensors.values()])
    return counted, sample.cpu().numpy().tobytes()


def _sample(tensor: Tensor) -> Tensor:
    """Returns a few hundred numbers of a tensor, evenly spread over its memory."""
    # In the order of the memory: flattening a tensor in another one copies all of it.
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.flatten()[:: max(1, tensor.numel() // _SAMPLED)]


def _hash(config: TokenizerConfig, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    shape = {
        "num_bits": config.num_bits,
        "num_groups": config.num_groups,
        "encoder": config_to_dict(config.encoder),
        "merging": config_to_dict(config.merging),
        "norm": config.quantizer.norm,
    }
    digest.update(json.dumps(shape, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        # The same numbers give the same identity on every device and in every memory layout.
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
