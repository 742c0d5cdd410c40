"""`mergevq eval representation`: how well features tell classes apart."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mergevq.cli.eval_generation import Count
from mergevq.cli.models import Tokenizer
from mergevq.cli.numbers import Floats, Integers
from mergevq.cli.options import Counts, Size, check_batch_size, choose_device, choose_size, progress
from mergevq.errors import ConfigError
from mergevq.metrics.probe_config import PROBES, LinearConfig, ProbeConfig

_JSON, _PAGE = "representation.json", "report.html"


def _default(what: str) -> Any:
    return tyro.conf.arg(help_behavior_hint=f"(default: {what})")


def eval_representation(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    model: Tokenizer,
    test: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: see there)")] = None,
    num_tokens: Annotated[Counts, _default("L and the model's")] = (),
    kinds: Annotated[str, tyro.conf.arg(metavar="KIND,...")] = "class,mean,class+mean",
    quantized: Literal["no", "yes", "both"] = "no",
    baselines: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = "pixels,random",
    teacher: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
    teacher_weights: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    pixel_side: int = 16,
    probes: Annotated[str, tyro.conf.arg(metavar="NAME,...")] = ",".join(PROBES),
    k: Annotated[Integers, _default("1,10,20,100,200 as far as there are images")] = (),
    temperature: float = ProbeConfig.temperature,
    optimizer: Literal["adamw", "lbfgs"] = "adamw",
    lr: Floats = LinearConfig.learning_rates,
    weight_decay: Annotated[Floats, _default("0; lbfgs: 1e-05 to 0.1")] = (),
    epochs: int = LinearConfig.epochs,
    probe_batch_size: int = LinearConfig.batch_size,
    shots: Annotated[Integers, _default("1,5,10 as far as there are images")] = (),
    draws: int = ProbeConfig.draws,
    held_out: float = ProbeConfig.held_out,
    test_fraction: float = 0.2,
    train_limit: Count = None,
    limit: Count = None,
    size: Size = None,
    features: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: DIR/features)")] = None,
    batch_size: int = 16,
    device: str = "auto",
    devices: int = 1,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Probe features for classes: prints a table, writes representation.json and report.html.

    There is a row for each kind of features at each K, and one for each baseline. The features of all images are stored
    first; an interrupted run with the same options goes on with them, and one with other probes reads them.

    Args:
        data: Images with a folder for each class: a folder, a .zip, a pattern that names several .zip files, or the
            word embedded.
        out: Folder for the results.
        model: The tokenizer.
        test: Images to test on, of the same classes. By default the part val (or validation, test) of DATA, or, where
            there is none, a share of DATA.
        num_tokens: Kept tokens; L, the number of patches, merges nothing.
        kinds: Of features: class token, mean of the tokens by size, or class+mean, both side by side.
        quantized: Take codes instead of semantic tokens for the mean; or both, in rows of their own.
        baselines: pixels, the images themselves; random, the same model before training; or none.
        teacher: Another network in the same table: lite0, lite1, or a timm model.
        teacher_weights: The timm model's .safetensors file, where it cannot be downloaded.
        pixel_side: Pixels are averaged down to this side.
        probes: knn, linear, few-shot.
        k: Of k-NN. The best is chosen on held-out training images.
        temperature: Of its votes.
        optimizer: Of the linear probe. lbfgs takes all images at once and has no learning rate.
        lr: Learning rates of the linear probe, all trained at once. The best is chosen on held-out training images.
        weight_decay: Likewise; each is tried with each rate.
        epochs: Of the linear probe.
        probe_batch_size: Features in a step of the linear probe.
        shots: Labelled images of each class, for few-shot.
        draws: Of these images.
        held_out: Share of the training images that k, rate and weight decay are chosen on.
        test_fraction: Share of DATA that is tested on if it has no other part; a hash of the names chooses it.
        train_limit: Take so many training images only, evenly spread.
        limit: Likewise of the test images.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        features: Folder that keeps the features.
        batch_size: Images at a time.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes, one a device, that share the work; the numbers do not depend on how many.
        seed: Of the random weights, the held-out images, the order of training and the draws.
        force: Write into a folder that holds files already; files of the same names are replaced, and features of
            another model, other images or other kinds are made anew.
    """
    from mergevq.evaluation.page import check_packages

    check_batch_size(batch_size)
    check_packages()
    _refuse_results(out, features, force)
    place = choose_device(device)
    if devices < 1:
        raise ConfigError(f"expected --devices to be at least 1, got {devices}")
    config = ProbeConfig(
        probes=_words(probes),
        ks=k,
        temperature=temperature,
        linear=LinearConfig(
            optimizer=optimizer,
            learning_rates=lr,
            weight_decays=weight_decay,
            epochs=epochs,
            batch_size=probe_batch_size,
        ),
        shots=shots,
        draws=draws,
        held_out=held_out,
        seed=seed,
    )
    images = {"test_fraction": test_fraction, "train_limit": train_limit, "test_limit": limit}
    options: dict[str, Any] = {
        "kinds": _words(kinds),
        "quantized": {"no": (False,), "yes": (True,), "both": (False, True)}[quantized],
        "baselines": () if baselines == "none" else _words(baselines),
        "pixel_side": pixel_side,
        "probes": config,
        "cache": out / "features" if features is None else features,
        "batch_size": batch_size,
        "seed": seed,
        "force": force,
    }
    if teacher is None and teacher_weights is not None:
        raise ConfigError("expected --teacher with --teacher-weights, got the weights alone: name the timm model")
    other = (teacher, teacher_weights)
    if devices == 1:
        _evaluate(None, place, data, test, images, model, other, num_tokens, size, out, options)
        return
    from mergevq.training.config import HardwareConfig
    from mergevq.training.processes import build_fabric

    hardware = HardwareConfig(accelerator="cuda" if place.startswith("cuda") else "cpu", devices=devices)
    build_fabric(hardware).launch(_evaluate, place, data, test, images, model, other, num_tokens, size, out, options)


def _evaluate(
    fabric: Any,
    device: str,
    data: str,
    test: str | None,
    images: dict[str, Any],
    model: str,
    teacher: tuple[str | None, Path | None],
    num_tokens: tuple[int, ...],
    size: int | None,
    out: Path,
    options: dict[str, Any],
) -> None:
    """Does the work of one process, and on the first writes the results."""
    from rich.console import Console

    from mergevq.evaluation.representation import evaluate_representation
    from mergevq.evaluation.representation_data import probe_images
    from mergevq.evaluation.representation_plan import choose_counts, choose_settings
    from mergevq.files import write_json
    from mergevq.layers.teachers import load_teacher
    from mergevq.tokenizer.model import MergeVQ

    place = device if fabric is None else fabric.device
    first = fabric is None or fabric.global_rank == 0
    share = 1 if fabric is None else fabric.world_size
    train_images, test_images = probe_images(data, test, **images)
    tok = MergeVQ.from_pretrained(model, device=place)
    other = None if teacher[0] is None else load_teacher(teacher[0], weights=teacher[1])
    side = choose_size(tok.config, size, num_tokens)
    counts = choose_counts(tok, num_tokens, side)
    named = {name: options[name] for name in ("kinds", "quantized", "baselines")}
    patches = (side // tok.config.downsampling) ** 2
    rows = len(choose_settings(counts, patches, **named, teacher=other is not None))
    total = len(train_images) + (1 + rows) * len(test_images)
    with progress("probe", total // share) if first else nullcontext() as advance:
        report = evaluate_representation(
            tok, train_images, test_images, num_tokens=counts, teacher=other, size=side, on_images=advance, **options
        )
    if not first:
        return
    write_json(out / _JSON, report.to_json())
    Console().print(report.table())
    report.write_html(out / _PAGE)
    print(f"{out / _JSON}, {out / _PAGE}")


def _refuse_results(out: Path, features: Path | None, force: bool) -> None:
    """Refuses a folder with anything but features of an interrupted run."""
    from mergevq.files import refuse_existing

    own = out / "features"
    if features is None and not force and own.is_dir() and [path.name for path in out.iterdir()] == ["features"]:
        return
    refuse_existing(out, force)


def _words(text: str) -> tuple[Any, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
