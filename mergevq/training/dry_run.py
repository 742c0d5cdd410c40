"""What a run would do, without doing it."""

from dataclasses import replace

import torch
from torch import nn

from mergevq.losses.adversarial import PatchDiscriminator
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.recovery import SourceRecovery
from mergevq.training.config import TokenizerRun, flat_config
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.finetune_inputs import classifier_config
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import build_generator
from mergevq.training.recovery_config import RecoveryRun

AnyRun = TokenizerRun | GeneratorRun | RecoveryRun | FinetuneRun


def dry_run(run: AnyRun, preset: AnyRun | None = None, tokenizer: TokenizerConfig | None = None) -> str:
    """Returns text: the resolved configuration, what differs from the preset, and the parameters of each part.

    Args:
        run: the run.
        preset: what the run was derived from; None leaves the comparison out.
        tokenizer: whose recovery or encoder it trains; None leaves out the parameters of these, which depend on it.
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
    if isinstance(run, RecoveryRun | FinetuneRun) and tokenizer is None:
        return "\n".join([*lines, "", "parameters: depend on data.tokenizer"])
    lines += ["", "parameters:"]
    counts = count_parameters(run, tokenizer)
    width = max(len(f"{count:,}") for count in counts.values())
    lines += [f"{count:>{width},}  {part}" for part, count in counts.items()]
    return "\n".join(lines)


def count_parameters(run: AnyRun, tokenizer: TokenizerConfig | None = None) -> dict[str, int]:
    """Returns the number of trained parameters of each part that the run has. Allocates nothing.

    Args:
        run: the run.
        tokenizer: whose recovery or encoder is trained; only with a RecoveryRun or a FinetuneRun.
    """
    with torch.device("meta"):
        if isinstance(run, TokenizerRun):
            parts = _tokenizer_parts(run)
        elif isinstance(run, GeneratorRun):
            parts = _generator_parts(run)
        elif isinstance(run, RecoveryRun):
            assert tokenizer is not None
            parts = _recovery_parts(SourceRecovery(replace(tokenizer, recovery=run.recovery)))
        else:
            assert tokenizer is not None
            parts = _classifier_parts(Classifier(classifier_config(run, tokenizer)))
    return {
        name: sum(p.numel() for p in part.parameters() if p.requires_grad)
        for name, part in parts.items()
        if part is not None
    }


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


def _recovery_parts(recovery: SourceRecovery) -> dict[str, nn.Module | None]:
    return {
        "blocks over codes": recovery.cross_blocks,
        "blocks over patches": recovery.self_blocks,
        "recovery": recovery,
    }


def _classifier_parts(classifier: Classifier) -> dict[str, nn.Module | None]:
    return {
        "stem": classifier.encoder.stem,
        "attention blocks": classifier.encoder.blocks,
        "norm and head": nn.ModuleList([classifier.norm, classifier.head]),
        "classifier": classifier,
    }
