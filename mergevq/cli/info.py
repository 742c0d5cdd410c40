"""`mergevq info`: what is in a model, a token file, a cache of tokens or of a teacher's features, or a result."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro


def info(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]) -> None:
    """Print what a model, a token file, a cache or a result holds. Reads all of it and checks it.

    Args:
        file: Model file, folder of a training run, token file (.mvq), folder of a token or teacher cache, or the JSON
            of an evaluation.
    """
    from mergevq.errors import CheckpointError
    from mergevq.files import read_header, read_json
    from mergevq.model_files import find_model_file

    if (file / "manifest.json").is_file():
        cached = read_json(file / "manifest.json")
        of_teacher = isinstance(cached, dict) and str(cached.get("mergevq")).startswith("teacher-cache/")
        _print(_describe_teacher_cache(file) if of_teacher else _describe_cache(file))
        return
    if file.suffix == ".json":
        from mergevq.evaluation.read_back import read_report

        print(read_report(file))
        return
    if file.is_dir() and not (file / "model.safetensors").is_file():
        raise CheckpointError(
            f"{file}: expected a folder with a model.safetensors (a training run) or a manifest.json (a cache of "
            "tokens or of a teacher), or a file: a model, tokens (.mvq), the .json of an evaluation; got another folder"
        )
    path = find_model_file(file)
    header = read_header(path)
    kind = header.get("mergevq", "")
    if kind.startswith("tokenizer/"):
        lines = _describe_model(path)
    elif kind.startswith("generator/"):
        lines = _describe_generator(path)
    elif kind.startswith("classifier/"):
        lines = _describe_classifier(path)
    elif kind.startswith("tokens/"):
        lines = _describe_tokens(path)
    else:
        raise CheckpointError(
            f"{path}: expected a tokenizer, a generator, a classifier or a token file, "
            f"got {kind or 'a safetensors file of another origin'}: "
            "checkpoints of the release need `mergevq convert`"
        )
    size = f"{path.stat().st_size:,} bytes"
    _print({"file": f"{path}, {size}", "kind": kind, "mergevq": header.get("version", "unknown"), **lines})


def _print(lines: dict[str, str]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def _describe_model(path: Path) -> dict[str, str]:
    from mergevq.errors import CheckpointError
    from mergevq.files import read_header
    from mergevq.tokenizer.model import MergeVQ

    tok, header = MergeVQ.from_pretrained(path), read_header(path)
    if header.get("fingerprint", tok.fingerprint()) != tok.fingerprint():  # All that the first files have.
        raise CheckpointError(
            f"{path}: expected the weights that were saved, their fingerprint differs: the file is damaged, "
            "copy it again"
        )
    config, enc, dec = tok.config, tok.config.encoder, tok.config.decoder
    side, step = config.image_size, config.downsampling
    parts = {"encoder": tok.encoder, "decoder": tok.decoder, "recovery": tok.recovery, "alignment": tok.alignment}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
    return {
        "fingerprint": tok.fingerprint(),
        "trained": f"{json.loads(header.get('step', '0')):,} steps",
        "images": f"{side} x {side} pixels, {side // step} x {side // step} patches of {step} x {step}",
        "tokens": f"{config.num_tokens} of {config.num_patches} unless asked otherwise, {config.num_bits} bits each",
        "encoder": f"{enc.kind}, {enc.depth} attention blocks of width {enc.width}",
        "decoder": f"{dec.depth} attention blocks of width {dec.width}",
        "merging": f"{config.merging.schedule}, {config.merging.overflow}, {config.merging.order} order",
        "parameters": ", ".join(f"{name} {count:,}" for name, count in counts.items()),
    }


def _describe_generator(path: Path) -> dict[str, str]:
    from mergevq.files import read_header
    from mergevq.generator.generate import load_generator

    gen = load_generator(path)
    config, mask = gen.config, gen.config.mask
    order = "random order of the kept tokens"
    if config.order == "raster":
        seen = f"merge mask of {mask.recent} recent, {mask.keep} of each kind" if mask.recent else "plain causal mask"
        order = f"raster order, {seen}"
    low, high = config.trained_num_tokens
    names = f": {', '.join(config.class_names[:10])}" if config.class_names else ""
    return {
        "fingerprint": gen.fingerprint(),
        "trained": f"{json.loads(read_header(path).get('step', '0')):,} steps",
        "order": order,
        "tokenizer": config.tokenizer or "unknown",
        "tokens": f"{config.num_bits} bits in groups of {', '.join(map(str, config.groups))}, "
        f"{config.grid[0]} x {config.grid[1]} patches",
        "kept tokens": f"{config.num_tokens} unless asked otherwise, "
        f"trained on {low} to {min(high, config.num_patches)}",
        "classes": f"{config.num_classes or 'none'}{names}{', ...' if len(config.class_names) > 10 else ''}",
        "network": f"{config.depth} + {config.group_depth} blocks of width {config.width}, {config.heads} heads",
        "parameters": f"{sum(p.numel() for p in gen.parameters()):,}",
    }


def _describe_classifier(path: Path) -> dict[str, str]:
    from mergevq.files import read_header
    from mergevq.tokenizer.classifier import Classifier

    classifier = Classifier.from_pretrained(path)
    config, enc = classifier.config, classifier.config.tokenizer.encoder
    names = ", ".join(config.class_names[:10])
    merged = "" if config.num_tokens < config.num_patches else ", nothing merged"
    return {
        "fingerprint": f"{classifier.fingerprint()}, of the encoder",
        "began as": f"tokenizer {config.began_as or 'unknown'}",
        "trained": f"{json.loads(read_header(path).get('step', '0')):,} steps",
        "images": f"{config.image_size} x {config.image_size} pixels",
        "features": f"{config.features}, {config.num_tokens} of {config.num_patches} tokens{merged}",
        "classes": f"{len(config.class_names)}: {names}{', ...' if len(config.class_names) > 10 else ''}",
        "encoder": f"{enc.kind}, {enc.depth} attention blocks of width {enc.width}",
        "parameters": f"{sum(p.numel() for p in classifier.parameters()):,}",
    }


def _describe_tokens(path: Path) -> dict[str, str]:
    from mergevq.tokens import load_tokens

    tokens = load_tokens(path)
    bits = tokens.bits_per_image()
    counts = sorted(set(tokens.num_tokens.tolist()), reverse=True)
    rows, columns = tokens.grid
    total, index, source = (f"{float(part.double().mean()):,.0f}" for part in (bits.total, bits.index, bits.source))
    return {
        "tokenizer": tokens.tokenizer or "unknown",
        "images": f"{len(tokens)}, {rows} x {columns} patches",
        "tokens": f"{', '.join(map(str, counts))} an image, {tokens.num_bits} bits each",
        "bits per image": f"{total} = {index} index + {source} source map{' (means)' if len(counts) > 1 else ''}",
        "source map": "stored" if tokens.source is not None else "none; the recovery model predicts it",
    }


def _describe_cache(folder: Path) -> dict[str, str]:
    from mergevq.data.cache_format import token_folder
    from mergevq.data.token_cache import TokenCache

    manifest = token_folder(folder).read_manifest()
    cache = TokenCache(folder)
    cache.verify()
    rows, columns = cache.grid
    return {
        "folder": _sizes(folder, manifest),
        "kind": manifest["mergevq"],
        "mergevq": str(manifest.get("version", "unknown")),
        "tokenizer": cache.tokenizer,
        "data": cache.data,
        "images": f"{len(cache):,} of {cache.image_size} x {cache.image_size} pixels, {rows} x {columns} patches, "
        f"{len(cache.unreadable)} unreadable left out",
        "classes": f"{cache.num_classes}" if cache.num_classes else "none",
        "tokens": f"{', '.join(map(str, cache.num_tokens))} an image, {cache.num_bits} bits each",
        "views": ", ".join(cache.views),
    }


def _describe_teacher_cache(folder: Path) -> dict[str, str]:
    from mergevq.data.teacher_cache import TeacherCache, teacher_folder

    manifest = teacher_folder(folder).read_manifest()
    cache = TeacherCache(folder)
    cache.verify()
    held = cache.settings
    return {
        "folder": _sizes(folder, manifest),
        "kind": manifest["mergevq"],
        "mergevq": str(manifest.get("version", "unknown")),
        "teacher": f"{held.teacher}, {held.width} numbers an image",
        "weights": held.checksum,
        "images to it": held.preprocessing,
        "data": held.data,
        "images": f"{len(cache):,} of {held.image_size} x {held.image_size} pixels, {len(cache.unreadable)} unreadable "
        "left out",
    }


def _sizes(folder: Path, manifest: dict[str, Any]) -> str:
    size = (folder / "manifest.json").stat().st_size + sum(int(shard["bytes"]) for shard in manifest["shards"])
    return f"{folder}, {size:,} bytes in {len(manifest['shards'])} shards"
