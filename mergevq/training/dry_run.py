"""What a run would do, without doing it."""

import torch
from torch import nn

from mergevq.losses.adversarial import PatchDiscriminator
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import TokenizerRun, flat_config
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import build_generator


def dry_run(run: TokenizerRun | GeneratorRun, preset: TokenizerRun | GeneratorRun | None = None) -> str:
    """Returns text: the resolved configuration, what differs from the preset, and the parameters of each part.

    Args:
        run: the run.
        preset: what the run was derived from; None leaves the comparison out.
    """
    resolved = flat_config(run)
    lines = [f"{name} = {value!r}" for name, value in resolved.items()]
    if preset is not None:
        before = flat_config(preset)
        changed = [
            f"{name} = {resolved[name]!r} (preset {before[name]!r})"
            for name in resolved
            if resolved[name] != before[name]
        ]
        lines += ["", "different from the preset:", *(changed or ["nothing"])]
    lines += ["", "parameters:"]
    counts = count_parameters(run)
    width = max(len(f"{count:,}") for count in counts.values())
    lines += [f"{count:>{width},}  {part}" for part, count in counts.items()]
    return "\n".join(lines)


def count_parameters(run: TokenizerRun | GeneratorRun) -> dict[str, int]:
    """Returns the number of trained parameters of each part that the run has. Allocates nothing."""
    with torch.device("meta"):
        parts = _tokenizer_parts(run) if isinstance(run, TokenizerRun) else _generator_parts(run)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}


def _tokenizer_parts(run: TokenizerRun) -> dict[str, nn.Module | None]:
    model = MergeVQ(run.model)
    parts: dict[str, nn.Module | None] = {
        "encoder": model.encoder,
        "decoder": model.decoder,
        "recovery": model.recovery,
        "alignment": model.alignment,
        "tokenizer": model,
    }
    if run.loss.weights.adversarial > 0:
        parts["discriminator"] = PatchDiscriminator(run.loss.disc_channels, run.loss.disc_layers)
    return parts


def _generator_parts(run: GeneratorRun) -> dict[str, nn.Module | None]:
    model = build_generator(run.model)
    transformer = model.transformer
    return {
        "embeddings": nn.ModuleList([transformer.embeddings, transformer.class_embedding]),
        "instructions": nn.ModuleList(part for name, part in model.named_modules() if name.endswith("instruction")),
        "blocks over positions": transformer.blocks,
        "blocks over bit groups": transformer.group_blocks,
        "heads": nn.ModuleList([transformer.norm, transformer.heads]),
        "generator": model,
    }
