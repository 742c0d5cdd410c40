"""`mergevq eval all`: everything about a tokenizer at once."""

import inspect
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mergevq.cli.eval_generation import Count
from mergevq.cli.models import Tokenizer, model_help
from mergevq.cli.numbers import Floats
from mergevq.cli.options import Counts, Size, check_batch_size, choose_device, choose_size, progress
from mergevq.errors import ConfigError

_GENERATOR = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="G",
        help=model_help("merge_ar", "random_ar", first="A generator that was trained with the tokenizer: file"),
        help_behavior_hint="(default: none)",
    ),
]
_OUT = "results"  # Where a command that is told writes to.


def eval_all(
    tokenizer: Tokenizer,
    data: Annotated[str, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    generator: _GENERATOR = None,
    train: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: see there)")] = None,
    parts: Annotated[str, tyro.conf.arg(metavar="NAME,...", help_behavior_hint="(default: all)")] = "",
    num_tokens: Annotated[Counts, tyro.conf.arg(help_behavior_hint="(default: L, the model's, L/4)")] = (),
    num_images: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: see there)")] = None,
    guidance: Floats = (1.0,),
    network: Literal["lite1", "inception", "none"] = "lite1",
    perceptual: Literal["lite0", "lpips", "none"] = "lite0",
    predict_source: bool = False,
    teacher: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: none)")] = None,
    teacher_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None,
    size: Size = None,
    limit: Count = None,
    train_limit: Count = None,
    batch_size: int = 16,
    examples: int = 8,
    samples: int = 16,
    device: str = "auto",
    devices: int = 1,
    seed: int = 0,
    force: bool = False,
) -> None:
    """How good is a tokenizer? Reconstruction, generation and representation under one protocol.

    Prints one table and writes evaluation.json, report.html and card.md, a fragment for a model card. What is not
    possible (generation without --generator, representation of images without classes) is left out, and the result
    says so. An interrupted evaluation goes on when it is started again.

    Args:
        tokenizer: What is measured.
        data: Images to measure on: a folder, a .zip, a pattern that names several .zip files, or the word embedded. Of
            a source with parts, the held-out part.
        out: Folder for the results, the finished parts and the features.
        generator: A generator that was trained with the tokenizer.
        train: Images to train probes on, and in which those closest to generated ones are looked for. By default the
            part train of DATA; without parts all of DATA, a fifth of which probes are tested on.
        parts: Of reconstruction, generation, representation and sanity. By default all that are possible.
        num_tokens: Kept tokens, a column for each K.
        num_images: Images generated for each guidance scale; by default as many as held-out images, at most 5,000.
        guidance: Guidance scales of the generator; 1 is off.
        network: Features for all distances. inception gives FID and is downloaded; lite1 gives other numbers, from a
            package.
        perceptual: Network of the perceptual distance; lpips is downloaded.
        predict_source: Also decode without the source maps, with those that the model's recovery predicts.
        teacher: Another network beside the tokenizer's features: lite0, lite1, or a timm model.
        teacher_weights: The timm model's .safetensors file, where it cannot be downloaded.
        size: Side in pixels of the images that are encoded.
        limit: Look at so many held-out images only, evenly spread.
        train_limit: Likewise of the training images.
        batch_size: Images at a time.
        examples: Images with their reconstructions in the report, at most 64.
        samples: Generated images in the report, of each guidance scale.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes, one a device, that share generation and representation; the numbers do not depend on how
            many.
        seed: Of everything random.
        force: Begin anew in a folder that holds something; earlier results are replaced.
    """
    given = dict(locals())
    from mergevq.evaluation.page import check_packages

    check_batch_size(batch_size)
    check_packages()
    if devices < 1:
        raise ConfigError(f"expected --devices to be at least 1, got {devices}")
    if teacher is None and teacher_weights is not None:
        raise ConfigError("expected --teacher with --teacher-weights, got the weights alone: name the timm model")
    options: dict[str, Any] = {
        "train": train,
        "out": out,
        "parts": tuple(word.strip() for word in parts.split(",") if word.strip()),
        "num_tokens": num_tokens,
        "num_images": num_images,
        "guidance": guidance,
        "network": None if network == "none" else network,
        "perceptual": None if perceptual == "none" else perceptual,
        "predict_source": predict_source,
        "teacher": teacher,
        "teacher_weights": teacher_weights,
        "limit": limit,
        "train_limit": train_limit,
        "batch_size": batch_size,
        "examples": examples,
        "shown": samples,
        "seed": seed,
        "force": force,
        "name": tokenizer,
        "command": command_of(given),
    }
    place = choose_device(device)
    if devices == 1:
        _evaluate(None, place, tokenizer, generator, data, size, options)
        return
    from mergevq.training.config import HardwareConfig
    from mergevq.training.processes import build_fabric

    hardware = HardwareConfig(accelerator="cuda" if place.startswith("cuda") else "cpu", devices=devices)
    build_fabric(hardware).launch(_evaluate, place, tokenizer, generator, data, size, options)


def command_of(given: dict[str, Any]) -> str:
    """Returns the command that gives these results again: all options that are not the default, and another folder.

    Args:
        given: the value of every option.
    """
    words = ["mergevq", "eval", "all"]
    for name, parameter in inspect.signature(eval_all).parameters.items():
        value = _OUT if name == "out" else given[name]
        if name == "force" or value == parameter.default:
            continue
        text = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [text])]
    return shlex.join(words)


def _evaluate(
    fabric: Any,
    device: str,
    tokenizer: str,
    generator: str | None,
    data: str,
    size: int | None,
    options: dict[str, Any],
) -> None:
    """Does the work of one process, and on the first writes the results."""
    from rich.console import Console

    from mergevq.evaluation.overall import evaluate_all
    from mergevq.generator.generate import load_generator
    from mergevq.tokenizer.model import MergeVQ

    place = device if fabric is None else fabric.device
    first = fabric is None or fabric.global_rank == 0
    tok = MergeVQ.from_pretrained(tokenizer, device=place)
    gen = None if generator is None else load_generator(generator, device=place)
    side = choose_size(tok.config, size, options["num_tokens"])
    report = evaluate_all(tok, gen, data, size=side, progress=progress if first else None, **options)
    if first:
        Console().print(report.table())
        print(", ".join(map(str, report.write(options["out"]))))
