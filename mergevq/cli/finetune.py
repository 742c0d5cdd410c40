"""`mergevq finetune`: every field of a run is an option, a preset gives their defaults."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from mergevq import presets
from mergevq.cli.runs import base_run, parts, preset_help, tell
from mergevq.training.config import HardwareConfig, LoopConfig
from mergevq.training.finetune_config import (
    FinetuneDataConfig,
    FinetuneLossConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneRun,
)


@dataclass(frozen=True)
class _Model(FinetuneModelConfig):
    """What is classified by. The classes are those of the images."""

    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()
    tokenizer: tyro.conf.Suppress[str] = ""


def finetune(words: Sequence[str]) -> Callable[..., None]:
    """Returns the verb with the defaults of the preset that `words` name, or of the run that they resume.

    Raises:
        ConfigError: no preset is named, or one that does not exist.
        CheckpointError: there is no run to resume.
    """
    known = presets.finetune_names()
    name, base = base_run(words, FinetuneRun, presets.finetune, known)

    def train(
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=preset_help(known))] = name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        init: Annotated[str | None, tyro.conf.arg(metavar="C")] = None,
        force: tyro.conf.FlagCreatePairsOff[bool] = False,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
        hardware: Annotated[HardwareConfig, tyro.conf.arg(name="")] = HardwareConfig(),  # noqa: B008 - frozen
        model: _Model = parts(_Model, base.model),  # noqa: B008 - frozen
        loss: FinetuneLossConfig = base.loss,
        data: FinetuneDataConfig = base.data,
        optim: FinetuneOptimConfig = base.optim,
        loop: LoopConfig = base.loop,
    ) -> None:
        """Fine-tune a tokenizer's encoder to classify images; RUN/result.json tells how well it does on held-out ones.

        The encoder of the tokenizer (data.tokenizer), a norm and a linear head are trained together on labelled images
        (data.train). RUN/model.safetensors is the classifier, rewritten at each validation. A preset names a complete
        run, and every field of it is an option below; the defaults shown are those of the preset that is named, or of
        tiny.

        Args:
            out: Folder of the run.
            resume: Go on with the run in RUN; its configuration stays but for loop.steps, .minutes, .val_every,
                .val_images, .save_every, .log_every, data.workers, and data.tokenizer, .train and .val, which must be
                the same elsewhere.
            init: Start from this classifier, of the same classes and features, and not from the tokenizer: a file, a
                run's folder, or a Hugging Face hub id.
            force: Start anew in a folder that holds something; an earlier run's files are removed.
            dry_run: Print the resolved configuration, what differs from the preset and the parameter counts, and stop,
                after the checks of a start. With a tokenizer it is the configuration that it and the images decide.
        """
        run = FinetuneRun(parts(FinetuneModelConfig, model), loss, data, optim, loop)
        if dry_run:
            from mergevq.model_files import find_model_file
            from mergevq.training.dry_run import dry_run as describe
            from mergevq.training.finetune_inputs import classifier_config, open_inputs, resolve
            from mergevq.training.finetune_state import check_init
            from mergevq.training.loop import check_start

            if not data.tokenizer:
                check_start(out, run, resume=resume, init=init, force=force, check_init=find_model_file)
                print(describe(run, base))
                return
            inputs = open_inputs(run, out)
            run = resolve(run, inputs)
            fits = partial(check_init, classifier_config(run, inputs.tok.config))
            check_start(out, run, resume=resume, init=init, force=force, check_init=fits)
            print(describe(run, base, inputs.tok.config))
            return
        from mergevq.training.finetune import finetune as train_classifier

        tell(train_classifier(run, out, resume=resume, init=init, force=force, hardware=hardware))

    return train
