"""The authors' checkpoints, read into our models: by explicit tables from their key names to ours, strict both ways.

The tables, and what the authors' options are in ours, are in mergevq.tokenizer.release and mergevq.generator.release.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.files import load_strict
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.generator.release import generator_config_from_release, generator_release_keys, is_release_cache
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.release import config_from_release, release_keys

# Networks that the authors' training state also holds and that are no part of the tokenizer: discriminator and LPIPS,
# the DINOv2 teacher, averaged copies (read apart), and a recovery model that no optimizer of theirs trains.
_NOT_TOKENIZER = ("loss.", "dist_model.", "model_ema.", "recovery.", "quantize.")
# What the training state of a generator holds besides it, under a prefix that only then stands before its own names.
_GENERATOR, _FIRST_STAGE = "transformer.", "first_stage_model."
_NOT_GENERATOR = (_FIRST_STAGE, "cond_stage_model.", "permuter.", "loss.", "model_ema.")

Weights = Literal["auto", "ema", "raw"]


def tokenizer_from_release(
    state_dict: Mapping[str, Tensor], ddconfig: Mapping[str, Any], *, weights: Weights = "auto"
) -> MergeVQ:
    """Returns our tokenizer with the weights of the authors' code.

    Args:
        state_dict: their tensors by their names (`encoder.…`, `decoder.…`); other networks of a training state are
            recognised and left out.
        ddconfig: their network options, as in the `ddconfig` of their configuration files.
        weights: take the averaged weights (`model_ema.…`), the last ones, or the averaged ones where there are any. The
            authors evaluate averaged ones.

    Raises:
        ConfigError: an option is missing or impossible.
        CheckpointError: a tensor is missing, unexpected or misshaped.
    """
    config = config_from_release(ddconfig)
    model = MergeVQ(config)
    table = {ours: (theirs,) for ours, theirs in release_keys(config).items()}
    tensors = _translate(state_dict, table, weights, lambda name: name.startswith(_NOT_TOKENIZER))
    # Their 1x1 convolution to the codes is our linear layer.
    tensors["encoder.code_out.weight"] = tensors["encoder.code_out.weight"].flatten(1)
    load_strict(model, tensors, "the checkpoint")
    return model.eval()


def generator_from_release(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | GeneratorConfig, *, weights: Weights = "auto"
) -> MergeAR:
    """Returns our generator with the weights of the authors' second stage.

    It computes what theirs does: raster order, causal attention without any merging, no instruction, and a class slot
    whose queries and keys are zero. It does not know which tokenizer it belongs to.

    Args:
        state_dict: their tensors by their names (`spatial_blocks.…`), all with or all without `transformer.` before.
            The tokenizer of a training state (`first_stage_model.…`) and key-value caches left by sampling are left
            out.
        config: their options, as in the `transformer_config` of their configuration files, or the whole content of such
            a file; or a configuration of ours. See `mergevq.generator.release.generator_config_from_release`.
        weights: as of `tokenizer_from_release`.

    Raises:
        ConfigError: an option is missing, impossible, or not what the tensors say.
        CheckpointError: a tensor is missing, unexpected or misshaped.
    """
    if not isinstance(config, GeneratorConfig):
        config = _inside(config, "model", "init_args", "transformer_config", "params")
    prefix = _GENERATOR if any(name.startswith(_GENERATOR) for name in state_dict) else ""
    own = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
    ours = generator_config_from_release(own, config)
    table = {name: tuple(prefix + t for t in theirs) for name, theirs in generator_release_keys(ours).items()}
    tensors = _translate(
        state_dict, table, weights, lambda name: name.startswith(_NOT_GENERATOR) or is_release_cache(name)
    )
    with torch.device("meta"):
        model = MergeAR(ours)
    model.to_empty(device="cpu")
    model.transformer.fill_rotations()
    load_strict(model, tensors, "the checkpoint")
    return model.eval()


def read_release(
    checkpoint: str | Path,
    config: str | Path,
    *,
    weights: Weights = "auto",
    part: Literal["auto", "tokenizer", "generator"] = "auto",
) -> MergeVQ | MergeAR:
    """Returns our tokenizer or generator from the authors' files.

    Args:
        checkpoint: their `.ckpt`, or a `.safetensors` with their key names.
        config: their YAML configuration, or a JSON or YAML file with the `ddconfig`, for generators the
            `transformer_config`, alone.
        weights: see `tokenizer_from_release`. The tokenizer in a generator's checkpoint is the one that it was trained
            with, which auto takes as it is.
        part: what to read; auto is the generator where there is one. The checkpoint of a generator holds its tokenizer
            too.

    Raises:
        ConfigError: the configuration cannot be read.
        CheckpointError: the checkpoint cannot be read, or does not fit.
    """
    tensors, content = _read_checkpoint(Path(checkpoint)), _read_config(Path(config))
    if part == "auto":
        marks = (_GENERATOR, "spatial_blocks.")
        part = "generator" if any(name.startswith(marks) for name in tensors) else "tokenizer"
    if part == "generator":
        return generator_from_release(tensors, content, weights=weights)
    first = {n.removeprefix(_FIRST_STAGE): t for n, t in tensors.items() if n.startswith(_FIRST_STAGE)}
    if first and weights == "auto":
        weights = "raw"
    ddconfig = _inside(content, "model", "init_args", "first_stage_config", "params", "ddconfig")
    return tokenizer_from_release(first or tensors, ddconfig, weights=weights)


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"expected a checkpoint file, {path} is not there")
    if path.suffix == ".safetensors":
        from mergevq.files import load_tensors

        return load_tensors(path)[0]
    try:
        # The one place where a pickle is read, and only by the restricted reader that builds nothing but tensors and
        # plain containers.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} holds more than tensors or is damaged, and is not unpickled: if you trust it, read it in an "
            "environment of its own with torch.load and weights_only switched off, and save its state_dict with "
            "safetensors.torch.save_file({k: t.contiguous() for k, t in state_dict.items()}, 'x.safetensors')"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise CheckpointError(f"expected a checkpoint with a state_dict of tensors in {path}")
    return content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"expected the configuration file of the checkpoint, {path} is not there")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            try:
                import yaml
            except ImportError as error:
                raise MissingDependencyError("reading YAML needs: pip install 'mergevq[convert]'") from error
            content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"expected YAML or JSON in {path}, got {type(error).__name__}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"expected YAML in {path}: it cannot be parsed") from error
        raise
    if not isinstance(content, dict):
        raise ConfigError(f"expected YAML or JSON with options by name in {path}, got {type(content).__name__}")
    return content


def _inside(content: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """Returns what is under these names, one in the other, those that are there."""
    for name in names:
        inner = content.get(name, content)
        if not isinstance(inner, Mapping):
            raise ConfigError(f"expected options by name under {name}, got {inner!r}")
        content = inner
    return content


def _translate(
    state_dict: Mapping[str, Tensor],
    table: Mapping[str, tuple[str, ...]],
    weights: Weights,
    is_other: Callable[[str], bool],
) -> dict[str, Tensor]:
    """Returns the authors' tensors in float32 by our names, of theirs exactly those in the table.

    Args:
        state_dict: theirs.
        table: our names to theirs; several of theirs become one of ours, one above the other.
        weights: averaged ones or not.
        is_other: says which names belong to other networks.
    """
    expected = [name for theirs in table.values() for name in theirs]
    stored = {name: "model_ema." + name.replace(".", "") for name in expected}
    averaged = any(name in state_dict for name in stored.values())
    if weights == "ema" and not averaged:
        raise CheckpointError(
            "expected averaged weights (model_ema.…) in the checkpoint, found none: ask for weights='raw'"
        )
    if not averaged or weights == "raw":
        stored = {name: name for name in expected}
    missing = [name for name in stored.values() if name not in state_dict]
    unexpected = [name for name in state_dict if name not in stored and not is_other(name)]
    if missing or unexpected:
        raise CheckpointError(
            "the checkpoint does not fit its configuration: "
            f"{len(missing)} tensors missing ({', '.join(missing[:10])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:10])})"
        )
    parts = {ours: [state_dict[stored[name]].float() for name in theirs] for ours, theirs in table.items()}
    try:
        return {ours: torch.cat(p) if len(p) > 1 else p[0] for ours, p in parts.items()}
    except RuntimeError as error:
        raise CheckpointError(f"expected tensors that fit one above the other: {error}") from error
