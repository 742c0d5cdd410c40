"""`mergevq convert`: a checkpoint of the authors' release to a model file."""

from pathlib import Path
from typing import Annotated, Literal

import tyro


def convert(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")],
    config: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT.safetensors")],
    source: Annotated[Literal["release"], tyro.conf.arg(name="from")] = "release",
    part: Literal["auto", "tokenizer", "generator"] = "auto",
    weights: Literal["auto", "ema", "raw"] = "auto",
    force: bool = False,
) -> None:
    """Convert a checkpoint of the authors' release, a tokenizer or a generator, to a model file.

    Args:
        checkpoint: Their .ckpt, or a .safetensors with their key names.
        config: Their YAML configuration, or a YAML or JSON file with its ddconfig or transformer_config.
        out: Model file to write.
        source: Where the checkpoint comes from.
        part: What to convert. A generator's checkpoint holds its tokenizer too; auto takes the generator.
        weights: Averaged weights (ema), the last ones (raw), or averaged ones where there are any (auto).
        force: Overwrite the output.
    """
    from mergevq.convert import read_release
    from mergevq.errors import ConfigError
    from mergevq.files import refuse_existing
    from mergevq.tokenizer.model import MergeVQ

    if out.suffix != ".safetensors":
        raise ConfigError(f"expected an output that ends in .safetensors, got {out}")
    refuse_existing(out, force)
    model = read_release(checkpoint, config, weights=weights, part=part)
    path = model.save_pretrained(out, force=force)
    kind = "tokenizer" if isinstance(model, MergeVQ) else "generator"
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters, {kind} {model.fingerprint()[:12]}")
