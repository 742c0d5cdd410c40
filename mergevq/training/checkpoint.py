"""The training state on disk, without pickle.

`state.json` names the tensor file that belongs to it and is replaced last, so that whenever the process dies the folder
holds one whole state: the new one, or the one before.
"""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mergevq import __version__
from mergevq.errors import CheckpointError
from mergevq.files import check_fields, check_format, load_strict, load_tensors, read_json, save_tensors, write_json

KIND = "training-state/1"
FILES = ("state.json", "tensors-*.safetensors", ".state.*.tmp.json", ".tensors-*.tmp.safetensors")
"""Patterns of what may lie in the folder of a state; the hidden ones are left behind by a killed process."""


@runtime_checkable
class SavedState(Protocol):
    """What a training's state has, whatever is trained."""

    fabric: Any
    """The lightning.Fabric that wrapped the modules."""
    rng: torch.Generator
    """On the CPU, and the same on all processes."""
    step: int
    """Optimizer steps done."""
    position: int
    """Micro-batches that each process has taken from its data since the beginning."""
    elapsed: float
    """Seconds spent in training steps, the same on all processes; validating and saving do not count."""

    @property
    def model(self) -> nn.Module:
        """The weights being trained."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Returns everything with weights that change, by the name it has in the file."""
        ...

    def optimizers(self) -> dict[str, tuple[Any, nn.Module]]:
        """Returns every optimizer, by its name in the file, with the module whose parameters it moves."""
        ...


def has_state(folder: Path) -> bool:
    """Whether `folder` holds a training state."""
    return (folder / "state.json").is_file()


def save_state(folder: Path, state: SavedState) -> None:
    """Writes the state to `folder`, replacing the one there; only the first process of a run should.

    Raises:
        WriteError: the disk is full or the folder forbids it; the state that was there remains.
    """
    for leftover in folder.glob(".tensors-*.tmp.safetensors"):  # A killed process could not remove its own.
        leftover.unlink(missing_ok=True)
    tensors = {
        f"{part}.{name}": tensor for part, module in state.modules().items() for name, tensor in _named(module).items()
    }
    for part, (optimizer, module) in state.optimizers().items():
        for name, parameter in module.named_parameters():
            for key, tensor in optimizer.state[parameter].items():
                tensors[f"{part}.{key}.{name}"] = tensor
    tensors["rng.run"] = state.rng.get_state()
    tensors["rng.cpu"] = torch.get_rng_state()
    if state.fabric.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(state.fabric.device)
    name = f"tensors-{state.step:09d}.safetensors"
    save_tensors(folder / name, tensors, {"mergevq": KIND, "version": __version__, "step": str(state.step)})
    record = {
        "mergevq": KIND,
        "version": __version__,
        "tensors": name,
        "step": state.step,
        "position": state.position,
        "elapsed": state.elapsed,
        "processes": state.fabric.world_size,
    }
    write_json(folder / "state.json", record)
    for other in folder.glob("tensors-*.safetensors"):
        if other.name != name:
            other.unlink(missing_ok=True)


def load_state(folder: Path, state: SavedState) -> None:
    """Puts the state in `folder` into `state`, which was built from the same run; sets torch's global rng states.

    Raises:
        CheckpointError: there is no state, it is damaged, or it does not fit the run.
    """
    if not has_state(folder):
        raise CheckpointError(f"expected a training state in {folder}, found none: start again with --force")
    record = read_json(folder / "state.json")
    check_format(record, KIND, folder / "state.json")
    check_fields(record, ("tensors", "step", "position", "elapsed", "processes"), folder / "state.json")
    if record["processes"] != state.fabric.world_size:
        raise CheckpointError(
            f"expected {record['processes']} processes, as when {folder} was saved, got {state.fabric.world_size}: "
            "resume with as many devices, or start a new run from this one's model with --init"
        )
    path = folder / record["tensors"]
    tensors, header = load_tensors(path)
    check_format(header, KIND, path)
    check_fields(tensors, ("rng.run", "rng.cpu"), path)
    for part, module in state.modules().items():
        load_strict(module, _part(tensors, part), f"{path} ({part})")
    for part, (optimizer, module) in state.optimizers().items():
        _load_moments(optimizer, module, _part(tensors, part), f"{path} ({part})")
    state.rng.set_state(tensors["rng.run"])
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and state.fabric.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], state.fabric.device)
    state.step, state.position, state.elapsed = record["step"], record["position"], record["elapsed"]


def _named(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = module.state_dict()
    return tensors


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}


def _load_moments(optimizer: Any, module: nn.Module, moments: dict[str, Tensor], what: str) -> None:
    # Not optimizer.load_state_dict: that numbers the parameters instead of naming them, and forgets their memory order.
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # A discriminator that has not started has none.
    known = {key_and_name.partition(".")[2] for key_and_name in moments}
    if known and known != set(parameters):
        name = min(known ^ set(parameters))
        raise CheckpointError(f"{what}: {name} does not fit the model: resume with the config it was saved with")
    for key_and_name, tensor in moments.items():
        key, _, name = key_and_name.partition(".")
        parameter = parameters[name]
        if tensor.ndim > 0 and tensor.shape != parameter.shape:
            raise CheckpointError(f"{what}: {name} does not fit the model: resume with the config it was saved with")
        like = torch.empty_like(parameter, requires_grad=False) if tensor.ndim > 0 else torch.empty_like(tensor)
        if tensor.ndim == 0 and optimizer.param_groups[0]["fused"]:
            like = like.to(parameter.device)
        optimizer.state[parameter][key] = like.copy_(tensor)
