"""`mergevq eval generation`: how good generated images are, over guidance scales."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mergevq.cli.models import Generator, TokenizerOf
from mergevq.cli.numbers import Floats, Integers, Interval, several
from mergevq.cli.options import Counts, check_batch_size, choose_device, progress, read_classes
from mergevq.errors import ConfigError

Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")]


def eval_generation(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    generator: Generator,
    tokenizer: TokenizerOf,
    num_images: int,
    guidance: Floats = (1.0,),
    num_tokens: Counts = (),
    cache: Literal["merge", "full", "both"] = "merge",
    steps: Annotated[tuple[int, ...], several(int, "INT,..."), tyro.conf.arg(help_behavior_hint="(default: K)")] = (),
    classes: Annotated[str, tyro.conf.arg(metavar="C,...")] = "balanced",
    temperature: Floats = (1.0,),
    top_k: Integers = (0,),
    top_p: Floats = (1.0,),
    guidance_schedule: Literal["constant", "linear", "cosine", "power_cosine", "interval"] = "constant",
    guidance_power: float = 1.0,
    guidance_interval: Interval = (0.0, 1.0),
    network: Literal["lite1", "inception", "none"] = "lite1",
    reference: Literal["held-out", "train", "all"] = "held-out",
    neighbours: Annotated[str | None, tyro.conf.arg(metavar="DATA", help_behavior_hint="(default: see there)")] = None,
    limit: Count = None,
    neighbour_limit: Count = None,
    batch_size: int = 16,
    samples: int = 16,
    compile: bool = False,
    device: str = "auto",
    devices: int = 1,
    seed: int = 0,
    force: bool = False,
) -> None:
    """Measure generated images against real ones: prints a table, writes generation.json and report.html.

    There is a column for each combination of guidance scale, K, cache and steps; all have the same classes and seeds.

    Args:
        data: The real images: a folder, a .zip, a pattern that names several .zip files, or the word embedded.
        out: Folder for the results.
        generator: What generates.
        tokenizer: What it was trained with.
        num_images: Images generated in each column. Compare results of equal numbers only.
        guidance: Guidance scales, one column each; 1 is off. The best by Fréchet distance is named.
        num_tokens: K that the generator is told.
        cache: MergeAR: merge drops duplicate tokens from the attention's memory, full keeps them.
        steps: RandomAR: parallel decoding steps, 1 to K.
        classes: balanced takes all in turn, reference takes those of the real images, none takes no class; or numbers
            or names with commas between, taken in turn.
        temperature: Divides the logits; one value, or one for each bit group, lowest bits first. So for the next two.
        top_k: Draw from so many most probable values only; 0 is all.
        top_p: Draw from the most probable values that make up this probability; 1 is all.
        guidance_schedule: How the guidance scale moves over the tokens of an image.
        guidance_power: Of schedule power_cosine.
        guidance_interval: Of schedule interval: the part of the tokens that is guided.
        network: Features for all distances. inception gives gFID and is downloaded; lite1 gives other numbers, from a
            package.
        reference: Which part of DATA generated images are compared with.
        neighbours: The images that the generator was trained on, in which close ones are looked for; by default the
            part train of DATA, or all of DATA if it has no parts.
        limit: Look at so many reference images only, evenly spread.
        neighbour_limit: Likewise of the training images; 0 looks for no close ones.
        batch_size: Images at a time.
        samples: Images of each column in the report.
        compile: Compile the step; pays off for many images.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes, one a device, that share the work; the images do not depend on their number.
        seed: Of everything random.
        force: Write into a folder that holds files already; files of the same names are replaced.
    """
    from mergevq.evaluation.page import check_packages
    from mergevq.files import refuse_existing

    check_batch_size(batch_size)
    check_packages()
    refuse_existing(out, force)
    place = choose_device(device)
    options: dict[str, Any] = {
        "num_images": num_images,
        "guidance": guidance,
        "num_tokens": num_tokens or None,
        "cache": ("merge", "full") if cache == "both" else cache,
        "steps": steps or None,
        "classes": _classes(classes),
        "network": None if network == "none" else network,
        "limit": limit,
        "neighbour_limit": neighbour_limit,
        "batch_size": batch_size,
        "shown": samples,
        "compile": compile,
        "seed": seed,
    }
    how = {
        "temperature": temperature[0] if len(temperature) == 1 else temperature,
        "top_k": top_k[0] if len(top_k) == 1 else top_k,
        "top_p": top_p[0] if len(top_p) == 1 else top_p,
        "schedule": guidance_schedule,
        "power": guidance_power,
        "interval": guidance_interval,
    }
    if devices < 1:
        raise ConfigError(f"expected --devices to be at least 1, got {devices}")
    if devices == 1:
        _evaluate(None, place, data, reference, neighbours, generator, tokenizer, out, how, options)
        return
    from mergevq.training.config import HardwareConfig
    from mergevq.training.processes import build_fabric

    hardware = HardwareConfig(accelerator="cuda" if place.startswith("cuda") else "cpu", devices=devices)
    fabric = build_fabric(hardware)
    fabric.launch(_evaluate, place, data, reference, neighbours, generator, tokenizer, out, how, options)


def _evaluate(
    fabric: Any,
    device: str,
    data: str,
    part: str,
    neighbours: str | None,
    generator: str,
    tokenizer: str,
    out: Path,
    how: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Does the work of one process, and on the first writes the results."""
    from rich.console import Console

    from mergevq.data.sources import evaluation_images, images_of_split, training_images
    from mergevq.evaluation.generation import check_models, evaluate_generation
    from mergevq.evaluation.generation_plan import all_settings, are_the_same, looked_at
    from mergevq.files import write_json
    from mergevq.generator.generate import load_generator
    from mergevq.sampling import SamplingOptions
    from mergevq.tokenizer.model import MergeVQ

    place = device if fabric is None else fabric.device
    first = fabric is None or fabric.global_rank == 0
    share = 1 if fabric is None else fabric.world_size
    if part == "all":
        real = images_of_split(data, "all")
    else:
        real = evaluation_images(data) if part == "held-out" else training_images(data)
    known = training_images(data if neighbours is None else neighbours)
    gen = load_generator(generator, device=place)
    tok = MergeVQ.from_pretrained(tokenizer, device=place)
    check_models(gen, tok)
    asked = (options[name] for name in ("guidance", "num_tokens", "cache", "steps"))
    total = options["num_images"] * len(all_settings(gen.config, *asked)) + looked_at(real, options["limit"])
    if not are_the_same(real, options["limit"], known, options["neighbour_limit"]):
        total += looked_at(known, options["neighbour_limit"])
    with progress("evaluate", total // share) if first else nullcontext() as advance:
        report = evaluate_generation(
            gen, tok, real, neighbours=known, sampling=SamplingOptions(**how), on_images=advance, **options
        )
    if not first:
        return
    write_json(out / "generation.json", report.to_json())
    Console().print(report.table())
    report.write_html(out / "report.html")
    print(f"{out / 'generation.json'}, {out / 'report.html'}")


def _classes(words: str) -> Any:
    """What `evaluate_generation` takes."""
    if words in ("balanced", "reference"):
        return words
    return None if words == "none" else read_classes(words)
