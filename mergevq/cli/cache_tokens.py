"""`mergevq cache-tokens`: a data set to a token cache."""

from pathlib import Path
from typing import Annotated, Any, Literal

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
    counted,
    goes_on,
    progress,
)


def _read_words(words: list[str]) -> tuple[str, ...]:
    return tuple(words[0].split(","))


def _is_words(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(word, str) for word in value)


def _write_words(words: tuple[str, ...]) -> list[str]:
    return [",".join(words)]


Words = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="VIEW,...",
        instance_from_str=_read_words,
        is_instance=_is_words,
        str_from_instance=_write_words,
    ),
]


def cache_tokens(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    model: Tokenizer,
    num_tokens: Counts = (),
    views: Words = ("crop",),
    split: Literal["train", "val", "all"] = "train",
    val_fraction: float = 0.02,
    labels: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None,
    size: Size = None,
    shard_size: int = 4096,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Encode a data set once, for training generators: a folder of shards with tokens, source maps and labels.

    Run again with the same options after an interruption, it goes on with the missing shards.

    Args:
        data: Folder of images, a .zip, a pattern that names several .zip files, or the word embedded.
        out: Folder to write.
        model: The tokenizer.
        num_tokens: Kept tokens; every image is encoded at each K.
        views: crop (the middle of the image), flip (the same mirrored), or crop,flip.
        split: What training on the data trains on, what it holds out, or all of it.
        val_fraction: Share held out of data without held-out images of their own.
        labels: CSV with name,label in each line, or JSON with names as keys, instead of the class folders.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        shard_size: Images in a file; an interruption loses no more than one file's.
        batch_size: Images at a time.
        workers: Processes that read images.
        device: auto, cpu, cuda, cuda:1, ...
        force: Start anew, and remove the files of a cache that is in the folder.
    """
    from mergevq.data.cache_format import check_views, token_folder
    from mergevq.data.cache_writer import write_token_cache
    from mergevq.data.labels import label_images
    from mergevq.data.shard_writer import check_free
    from mergevq.data.sources import images_of_split
    from mergevq.tokenizer.model import MergeVQ

    check_source(data)
    check_batch_size(batch_size)
    check_at_least_one("--num-tokens", *num_tokens)
    seen = check_views(views)
    check_free(token_folder(out), force)
    images = images_of_split(data, split, val_fraction)
    if labels is not None:
        everything = images if split == "all" else images_of_split(data, "all")
        images = label_images(images, labels, known=[everything.name(i) for i in range(len(everything))])
    tok = MergeVQ.from_pretrained(model, device=choose_device(device))
    counts = num_tokens or (tok.config.num_tokens,)
    side = choose_size(tok.config, size, counts)
    with goes_on("the same command without --force"), progress("encode", len(images)) as advance:
        cache = write_token_cache(
            tok,
            images,
            out,
            num_tokens=counts,
            views=seen,
            size=side,
            shard_size=shard_size,
            batch_size=batch_size,
            workers=workers,
            force=force,
            on_images=advance,
        )
    left_out = f", {len(cache.unreadable)} unreadable left out" if cache.unreadable else ""
    classes = f"{cache.num_classes} classes" if cache.num_classes else "no classes"
    kept = ", ".join(map(str, cache.num_tokens))
    size_in_bytes = sum(path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".json"))
    print(f"{out}: {counted(len(cache), 'image')} of {side} x {side} pixels{left_out}, {classes}")
    print(f"{kept} of {cache.grid[0] * cache.grid[1]} tokens an image, {cache.num_bits} bits a token")
    print(f"{' and '.join(cache.views)}, {size_in_bytes:,} bytes, tokenizer {cache.tokenizer[:12]}")
