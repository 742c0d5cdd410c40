"""`mergevq eval reconstruction`: what encoding and decoding loses."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mergevq.cli.models import Tokenizer
from mergevq.cli.options import (
    Counts,
    Size,
    check_at_least_one,
    check_batch_size,
    check_source,
    choose_device,
    choose_size,
    progress,
)


def eval_reconstruction(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    model: Tokenizer,
    num_tokens: Counts = (),
    network: Literal["lite1", "inception", "none"] = "lite1",
    perceptual: Literal["lite0", "lpips", "none"] = "lite0",
    predict_source: bool = False,
    size: Size = None,
    limit: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: all)")] = None,
    batch_size: int = 16,
    examples: int = 8,
    device: str = "auto",
    seed: int = 0,
    force: bool = False,
) -> None:
    """Measure what encoding and decoding loses at each K: prints a table, writes reconstruction.json and report.html.

    Args:
        data: Folder of images, a .zip, a pattern that names several .zip files, or the word embedded.
        out: Folder for the results.
        model: The tokenizer.
        num_tokens: Kept tokens, one row for each K.
        network: Features for the distance between originals and reconstructions. inception gives rFID and is
            downloaded; lite1 gives another number, from a package.
        perceptual: Network of the perceptual distance; lpips is downloaded.
        predict_source: Also decode without the source maps, with those that the model's recovery predicts.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        limit: Look at so many images only, evenly spread over the data.
        batch_size: Images at a time.
        examples: Images in the report, at most 64.
        device: auto, cpu, cuda, cuda:1, ...
        seed: Of the two halves of the originals whose distance is given for reference.
        force: Write into a folder that holds files already; files of the same names are replaced.
    """
    check_source(data)
    check_batch_size(batch_size)
    check_at_least_one("--num-tokens", *num_tokens)
    check_at_least_one("--limit", limit)

    from rich.console import Console

    from mergevq.data.sources import evaluation_images
    from mergevq.evaluation.page import check_packages
    from mergevq.evaluation.reconstruction import evaluate_reconstruction
    from mergevq.files import refuse_existing, write_json
    from mergevq.tokenizer.model import MergeVQ

    check_packages()
    refuse_existing(out, force)
    images = evaluation_images(data)
    tok = MergeVQ.from_pretrained(model, device=choose_device(device))
    counts = num_tokens or (tok.config.num_tokens,)
    side = choose_size(tok.config, size, counts)
    with progress("evaluate", min(len(images), limit or len(images))) as advance:
        report = evaluate_reconstruction(
            tok,
            images,
            counts,
            network=None if network == "none" else network,
            perceptual=None if perceptual == "none" else perceptual,
            predict_source=predict_source,
            size=side,
            limit=limit,
            batch_size=batch_size,
            examples=examples,
            seed=seed,
            on_images=advance,
        )
    write_json(out / "reconstruction.json", report.to_json())
    Console().print(report.table())
    report.write_html(out / "report.html")
    print(f"{out / 'reconstruction.json'}, {out / 'report.html'}")
