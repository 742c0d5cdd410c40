"""`mergevq generate`: images from nothing but classes and a seed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mergevq.cli.models import Generator, TokenizerOf
from mergevq.cli.numbers import GroupFloats, GroupIntegers, Interval
from mergevq.cli.options import check_batch_size, choose_device, counted, goes_on, progress, read_classes
from mergevq.configuration import check_seed
from mergevq.errors import ConfigError, OutputExistsError

_RECORD = "generate.json"
_PARTS = "parts"
_TOKENS = "tokens.mvq"
_SHEET_IMAGES = 100  # More would make a picture that nobody opens.


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are drawn. Each of the first four takes one value, or one for each bit group."""

    guidance: GroupFloats = (1.0,)
    """Classifier-free guidance scale; 1 is off, 0 ignores the classes. One value, or one for each bit group with commas
    between, the lowest bits first: 2,1. So for the next three."""
    temperature: GroupFloats = (1.0,)
    """0 always takes the most probable token."""
    top_k: GroupIntegers = (0,)
    """Draw from so many most probable values only; 0 is all."""
    top_p: GroupFloats = (1.0,)
    """Draw from the most probable values that have this probability together."""
    guidance_schedule: Literal["constant", "linear", "cosine", "power_cosine", "interval"] = "constant"
    """How the guidance scale moves over the tokens of an image."""
    guidance_power: float = 1.0
    """power_cosine: above 1 guides later."""
    guidance_interval: Interval = (0.0, 1.0)
    """interval: the part of the tokens that is guided."""


def generate(
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    generator: Generator,
    tokenizer: TokenizerOf,
    classes: Annotated[str, tyro.conf.arg(metavar="C,...")] = "",
    num_images: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: see there)")] = None,
    num_tokens: Annotated[int | None, tyro.conf.arg(metavar="K", help_behavior_hint="(default: the model's)")] = None,
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = SamplingFlags(),
    cache: Annotated[Literal["merge", "full"] | None, tyro.conf.arg(help_behavior_hint="(default: merge)")] = None,
    steps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: K)")] = None,
    seed: int = 0,
    batch_size: int = 16,
    compile: bool = False,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
) -> None:
    """Generate images: PNG files, their tokens (tokens.mvq) and one contact sheet (sheet.png).

    An image depends on its number, the seed and the options, not on the batch. After a kill, the same command with
    --resume makes the images that are missing, and the same ones.

    Args:
        out: Folder for the images.
        generator: What generates.
        tokenizer: What it was trained with.
        classes: Numbers or names with commas between, used in turn; empty takes all classes in turn.
        num_images: Images altogether; by default one for each class that is named, or 16 without classes.
        num_tokens: K that the generator is told; fewer tokens make simpler images. An instruction to a MergeAR, not a
            promise: it may draw more or fewer distinct tokens.
        cache: MergeAR: merge drops duplicate tokens from the attention's memory, full keeps them; same images.
        steps: RandomAR: parallel decoding steps, 1 to K.
        seed: Of everything random.
        batch_size: Images at a time.
        compile: Compile the step; pays off for many images.
        device: auto, cpu, cuda, cuda:1, ...
        resume: Go on with a killed run of the same options.
        force: Write into a folder that holds files already; files of the same names are replaced, what an interrupted
            run left to go on from is removed.
    """
    import torch
    from torch import Tensor

    from mergevq.data.images import write_images
    from mergevq.evaluation.generation_pass import warning_once
    from mergevq.evaluation.token_map import contact_sheet
    from mergevq.files import atomic_path, write_json
    from mergevq.generator.generate import check_pair, load_generator
    from mergevq.sampling import image_seeds
    from mergevq.tokenizer.model import MergeVQ
    from mergevq.tokens import MergedTokens, load_tokens, save_tokens

    check_batch_size(batch_size)
    check_seed(seed, "--seed")
    device = choose_device(device)
    gen = load_generator(generator, device=device)
    tok = MergeVQ.from_pretrained(tokenizer, device=device)
    check_pair(gen.config, grid=None, num_bits=tok.config.num_bits, tokenizer=tok.fingerprint())
    kept = _check_options(gen.config, num_tokens, steps, cache, sampling)
    if gen.config.order == "random" and tok.recovery is None and kept < gen.config.num_patches:
        raise ConfigError(
            f"expected a tokenizer that predicts where {kept} tokens go, this one has no recovery model: train it with "
            f"mergevq train recovery, or ask for --num-tokens {gen.config.num_patches}"
        )
    wanted = _classes(classes, gen.config, num_images)
    options: dict[str, Any] = {
        "num_tokens": num_tokens,
        "guidance": sampling.guidance,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "guidance_schedule": sampling.guidance_schedule,
        "guidance_power": sampling.guidance_power,
        "guidance_interval": sampling.guidance_interval,
        **({"cache": cache or "merge"} if gen.config.order == "raster" else {"steps": steps}),
    }
    record = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
        "classes": wanted,
        "images": len(wanted),
        "seed": seed,
        "batch_size": batch_size,
        "tokenizer": tok.fingerprint(),
        "generator": gen.fingerprint(),
    }
    _check_folder(out, record, resume, force)
    names = _names(wanted, gen.config)
    if resume and _is_finished(out, names):
        print(f"{out}: nothing to do, {counted(len(names), 'image')} there already")
        return
    if not resume:  # What another run left would be taken for this one's when it is gone on with.
        _remove_parts(out)
        (out / _TOKENS).unlink(missing_ok=True)
    write_json(out / _RECORD, record)
    seeds = image_seeds(torch.Generator().manual_seed(seed), len(wanted))
    parts: list[MergedTokens] = []
    shown: list[Tensor] = []
    again = "the same command with --resume" + (" in place of --force" if force else "")
    with goes_on(again), progress("generate", len(wanted)) as advance, warning_once():
        for start in range(0, len(wanted), batch_size):
            batch = slice(start, start + batch_size)
            file = out / _PARTS / f"{start:07d}.mvq"
            done = resume and file.is_file() and all((out / name).is_file() for name in names[batch])
            if done:
                tokens = load_tokens(file, expect_tokenizer=tok.fingerprint())
            else:
                given = None if gen.config.num_classes == 0 else wanted[batch]
                tokens = gen.generate(
                    given, num_images=len(names[batch]), seeds=seeds[batch], compile=compile, **options
                )
            if not done or len(shown) < _SHEET_IMAGES:
                images = tok.decode(tokens)
                shown += list(images[: max(0, _SHEET_IMAGES - len(shown))].cpu())
            if not done:
                write_images(out, images, names[batch], force=True)
                save_tokens(file, tokens, force=True)
            parts.append(tokens.to("cpu"))
            advance(len(tokens))
    tokens = MergedTokens.join(parts)
    columns = min(10, len(shown))
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
    with goes_on(again):
        save_tokens(out / _TOKENS, tokens, force=True)
        with atomic_path(out / "sheet.png") as temporary:
            contact_sheet(rows, cell=max(64, min(256, tok.config.image_size))).save(temporary)
    _remove_parts(out)
    low, high = (int(count) for count in tokens.num_tokens.aminmax())
    drew = f"{low}" if low == high else f"{low} to {high}"
    print(f"{out}: {counted(len(tokens), 'image')}, {out / 'sheet.png'}, {out / _TOKENS}")
    mean = f"{tokens.num_tokens.double().mean():.1f} on average"
    print(f"asked for K = {kept}, drew {drew} {'distinct ' if gen.config.order == 'raster' else ''}tokens, {mean}")


def _classes(words: str, config: Any, num_images: int | None) -> list[int]:
    """Returns the class number of every image; 0 for each where there are no classes."""
    from mergevq.generator.generate import resolve_classes

    if num_images is not None and num_images < 1:
        raise ConfigError(f"expected --num-images of at least 1, got {num_images}")
    if config.num_classes == 0:
        if words:
            raise ConfigError(f"expected no --classes, this generator knows none, got {words!r}")
        return [0] * (num_images or 16)
    given = read_classes(words)
    numbers = list(resolve_classes(given, config)) if given else list(range(config.num_classes))
    count = num_images or (len(numbers) if given else min(16, max(9, config.num_classes)))
    return [numbers[i % len(numbers)] for i in range(count)]


def _names(classes: list[int], config: Any) -> list[str]:
    digits = max(4, len(str(len(classes) - 1)))
    known = config.class_names or [f"class {i}" for i in range(config.num_classes)]
    words = [re.sub(r"\W+", "-", known[c]).strip("-").lower() if config.num_classes else "image" for c in classes]
    return [f"{i:0{digits}d}_{word}.png" for i, word in enumerate(words)]


def _check_options(
    config: Any, num_tokens: int | None, steps: int | None, cache: str | None, sampling: SamplingFlags
) -> int:
    """Checks how tokens are to be drawn, before anything is written; returns K."""
    from mergevq.generator.parallel import group_sizes
    from mergevq.sampling import SamplingOptions

    SamplingOptions(
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.guidance,
        sampling.guidance_schedule,
        sampling.guidance_power,
        sampling.guidance_interval,
    ).check(len(config.groups))
    kept: int = config.num_tokens if num_tokens is None else num_tokens
    if not 1 <= kept <= config.num_patches:
        raise ConfigError(f"expected num_tokens in 1..{config.num_patches}, got {kept}")
    if steps is not None and config.order == "raster":
        raise ConfigError("expected --steps for a generator in random order only, this one goes in raster order")
    if cache is not None and config.order == "random":
        raise ConfigError("expected --cache for a generator in raster order only: in random order nothing is dropped")
    if steps is not None:
        group_sizes(kept, steps)
    return kept


def _remove_parts(out: Path) -> None:
    """Removes the tokens of single batches, with which a killed run goes on."""
    for path in (out / _PARTS).glob("*.mvq"):
        path.unlink()
    if (out / _PARTS).is_dir() and not any((out / _PARTS).iterdir()):
        (out / _PARTS).rmdir()


def _is_finished(out: Path, names: list[str]) -> bool:
    """Whether a run came to its end: the tokens of single batches are removed after everything else."""
    return (out / _TOKENS).is_file() and not (out / _PARTS).exists() and all((out / name).is_file() for name in names)


def _check_folder(out: Path, record: dict[str, Any], resume: bool, force: bool) -> None:
    from mergevq.files import read_json, refuse_existing

    if resume and force:
        raise ConfigError("expected one of --resume (go on) and --force (start again), got both")
    if not resume:
        refuse_existing(out, force)
        return
    if not (out / _RECORD).is_file():
        raise OutputExistsError(f"expected {_RECORD} in {out}, found none: there is nothing to resume, drop --resume")
    before = read_json(out / _RECORD)
    known = before if isinstance(before, dict) else {}
    differing = [name for name in record if known.get(name) != record[name]]
    if differing:
        raise ConfigError(f"expected the options of the run in {out}, got other {', '.join(differing)}: use --force")
