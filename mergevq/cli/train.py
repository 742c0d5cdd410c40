"""`mergevq train tokenizer`, `train generator` and `train recovery`: every field of a run is an option, a preset gives
their defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from mergevq import presets
from mergevq.cli.models import model_help
from mergevq.cli.options import check_source
from mergevq.cli.runs import base_run, parts, preset_help, tell, value_of
from mergevq.errors import ConfigError
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.tokenizer.config import RecoveryConfig, TokenizerConfig
from mergevq.training.config import (
    DataConfig,
    HardwareConfig,
    LossConfig,
    OptimConfig,
    TokenizerLoopConfig,
    TokenizerOptimConfig,
    TokenizerRun,
)
from mergevq.training.generator_config import GeneratorLoopConfig, GeneratorLossConfig, GeneratorRun, TokenDataConfig
from mergevq.training.recovery_config import RecoveryDataConfig, RecoveryLoopConfig, RecoveryRun

_INIT_TOKENIZER = model_help("tokenizer", first="Start from the weights of this tokenizer: file")
_INIT_GENERATOR = model_help("merge_ar", first="Start from the weights of this generator: file")
_INIT_RECOVERY = model_help(
    "tokenizer", first="Start from the recovery of this tokenizer, which must have the run's shape: file"
)
_FP16 = ("fp16", "float16", "16", "16-mixed", "half")


# ----------------------------------------------------------------------------------------------------------- tokenizers


@dataclass(frozen=True)
class _Tokenizer(TokenizerConfig):
    """A complete description of a tokenizer; `MergeVQ(config)` builds it."""

    def __post_init__(self) -> None:
        """Checks nothing: what is wrong with a model is told in our one line, not in the parser's words."""


def train_tokenizer(words: Sequence[str]) -> Callable[..., None]:
    """Returns the verb with the defaults of the preset that `words` name, or of the run that they resume.

    Raises:
        ConfigError: no preset is named, or one that does not exist.
        CheckpointError: there is no run to resume.
    """
    known = presets.tokenizer_names()
    name, base = base_run(words, TokenizerRun, presets.tokenizer, known)
    if (value_of(words, "--loop.precision") or "").lower() in _FP16:
        raise ConfigError(
            "expected --loop.precision float32 or bf16, got fp16: it needs a gradient scaler, which is missing here"
        )

    def train(
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=preset_help(known))] = name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        init: Annotated[str | None, tyro.conf.arg(metavar="M", help=_INIT_TOKENIZER)] = None,
        force: tyro.conf.FlagCreatePairsOff[bool] = False,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
        hardware: Annotated[HardwareConfig, tyro.conf.arg(name="")] = HardwareConfig(),  # noqa: B008 - frozen
        model: _Tokenizer = parts(_Tokenizer, base.model),  # noqa: B008 - frozen
        loss: LossConfig = base.loss,
        data: DataConfig = base.data,
        optim: TokenizerOptimConfig = base.optim,
        loop: TokenizerLoopConfig = base.loop,
    ) -> None:
        """Train a tokenizer; RUN/model.safetensors is the result, rewritten at each validation.

        A preset names a complete run, and every field of it is an option below; the defaults shown are those of the
        preset that is named, or of tiny.

        Args:
            out: Folder of the run.
            resume: Go on with the run in RUN; its configuration stays but for loop.steps, .minutes, .val_num_tokens,
                .val_every, .val_images, .save_every, .log_every, data.workers, and data.train, data.val and
                data.teacher_cache, which must be the same elsewhere.
            init: Start from the weights of this tokenizer.
            force: Start anew in a folder that holds something; an earlier run's files are removed.
            dry_run: Print the resolved configuration, what differs from the preset and the parameter counts, and stop,
                after the checks of a start.
        """
        # A preset may name images that are elsewhere when it is only looked at.
        named = not dry_run or data.train != base.data.train
        if named:
            check_source(data.train)
        run = TokenizerRun(parts(TokenizerConfig, model), loss, data, optim, loop)
        if dry_run:
            from mergevq.training.dry_run import dry_run as describe
            from mergevq.training.inputs import open_images
            from mergevq.training.loop import check_start
            from mergevq.training.state import check_init

            fits = partial(check_init, run.model)
            check_start(out, run, resume=resume, init=init, force=force, check_init=fits)
            if named:
                open_images(run)
            print(describe(run, base))
            return
        from mergevq.training.tokenizer import train_tokenizer

        tell(train_tokenizer(run, out, resume=resume, init=init, force=force, hardware=hardware))

    return train


# ----------------------------------------------------------------------------------------------------------- generators


@dataclass(frozen=True)
class _Mask(MaskConfig):
    """Raster order only."""

    def __post_init__(self) -> None:
        """Checks nothing, as above."""


@dataclass(frozen=True)
class _Generator(GeneratorConfig):
    """A complete description of a generator. Grid, bits, classes and tokenizer are those of the tokens."""

    grid: tyro.conf.Suppress[tuple[int, int]] = (16, 16)
    num_bits: tyro.conf.Suppress[int] = 18
    num_classes: tyro.conf.Suppress[int] = 1000
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()
    trained_num_tokens: tyro.conf.Suppress[tuple[int, int]] = (1, 1_000_000)
    tokenizer: tyro.conf.Suppress[str | None] = None
    mask: _Mask = field(default_factory=_Mask)
    """Which earlier tokens the row of a token sees, in raster order."""

    def __post_init__(self) -> None:
        """Checks nothing, as above."""


def train_generator(words: Sequence[str]) -> Callable[..., None]:
    """Returns the verb with the defaults of the preset that `words` name, or of the run that they resume.

    Raises:
        ConfigError: no preset is named, or one that does not exist.
        CheckpointError: there is no run to resume.
    """
    known = presets.generator_names()
    name, base = base_run(words, GeneratorRun, presets.generator, known)
    start = parts(_Generator, base.model, mask=parts(_Mask, base.model.mask))

    def train(
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=preset_help(known))] = name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        init: Annotated[str | None, tyro.conf.arg(metavar="G", help=_INIT_GENERATOR)] = None,
        force: tyro.conf.FlagCreatePairsOff[bool] = False,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
        hardware: Annotated[HardwareConfig, tyro.conf.arg(name="")] = HardwareConfig(),  # noqa: B008 - frozen
        model: _Generator = start,
        loss: GeneratorLossConfig = base.loss,
        data: TokenDataConfig = base.data,
        optim: OptimConfig = base.optim,
        loop: GeneratorLoopConfig = base.loop,
    ) -> None:
        """Train a generator on a tokenizer's tokens; RUN/model.safetensors is the result, rewritten at each validation.

        The tokens come from caches that `mergevq cache-tokens` wrote (data.tokens and data.val_tokens), or from images
        that are encoded as they come (data.train and data.tokenizer). They decide the model's grid, bits, classes, and
        which numbers of kept tokens it learns. A preset names a complete run, and every field of it is an option
        below; the defaults shown are those of the preset that is named, or of tiny.

        Args:
            out: Folder of the run.
            resume: Go on with the run in RUN; its configuration stays but for loop.steps, .minutes, .val_num_tokens,
                .val_every, .val_images, .save_every, .log_every, .sample_classes, .sample_images, .sample_guidance,
                data.workers, and data.tokens, .val_tokens, .tokenizer, .train and .val, which must be the same
                elsewhere.
            init: Start from the weights of this generator.
            force: Start anew in a folder that holds something; an earlier run's files are removed.
            dry_run: Print the resolved configuration, what differs from the preset and the parameter counts, and stop,
                after the checks of a start. With tokens it is the configuration that they decide.
        """
        # Groups of one's own are for tokens of as many bits.
        mask, bits = parts(MaskConfig, model.mask), sum(model.groups)
        run = GeneratorRun(parts(GeneratorConfig, model, mask=mask, num_bits=bits), loss, data, optim, loop)
        if dry_run:
            from mergevq.training.dry_run import dry_run as describe
            from mergevq.training.generator_state import check_init, read_given
            from mergevq.training.loop import check_start
            from mergevq.training.token_inputs import open_tokens

            known = bool(data.tokens or data.train)
            run = open_tokens(run)[0] if known else run
            # Without tokens nobody knows the rest of the model.
            fits = partial(check_init if known else read_given, run.model)
            check_start(out, run, resume=resume, init=init, force=force, check_init=fits)
            print(describe(run, base))
            return
        from mergevq.training.generator import train_generator

        tell(train_generator(run, out, resume=resume, init=init, force=force, hardware=hardware))

    return train


# ------------------------------------------------------------------------------------------------------------- recovery


@dataclass(frozen=True)
class _Recovery(RecoveryConfig):
    """Shape of a new recovery; one that the tokenizer has keeps its own, unless --no-fine-tune."""

    enabled: tyro.conf.Suppress[bool] = True


def train_recovery(words: Sequence[str]) -> Callable[..., None]:
    """Returns the verb with the defaults of the preset that `words` name, or of the run that they resume.

    Raises:
        ConfigError: no preset is named, or one that does not exist.
        CheckpointError: there is no run to resume.
    """
    known = presets.recovery_names()
    name, base = base_run(words, RecoveryRun, presets.recovery, known)
    shape = parts(_Recovery, base.recovery)

    def train(
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=preset_help(known))] = name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        init: Annotated[str | None, tyro.conf.arg(metavar="M", help=_INIT_RECOVERY)] = None,
        force: tyro.conf.FlagCreatePairsOff[bool] = False,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
        hardware: Annotated[HardwareConfig, tyro.conf.arg(name="")] = HardwareConfig(),  # noqa: B008 - frozen
        fine_tune: bool = base.fine_tune,
        recovery: _Recovery = shape,
        data: RecoveryDataConfig = base.data,
        optim: OptimConfig = base.optim,
        loop: RecoveryLoopConfig = base.loop,
    ) -> None:
        """Train a tokenizer's recovery, which predicts source maps; RUN/model.safetensors is the tokenizer with it.

        Nothing else of the tokenizer (data.tokenizer) changes, and its tokens stay valid. It learns from caches that
        `mergevq cache-tokens` wrote with that tokenizer (data.tokens and data.val_tokens). A preset names a complete
        run, and every field of it is an option below; the defaults shown are those of the preset that is named, or of
        emoji_64.

        Args:
            out: Folder of the run.
            resume: Go on with the run in RUN; its configuration stays but for loop.steps, .minutes, .val_num_tokens,
                .val_every, .val_images, .save_every, .log_every, and data.tokenizer, .tokens and .val_tokens, which
                must be the same elsewhere.
            init: Start from the recovery of this tokenizer, which must have the run's shape.
            force: Start anew in a folder that holds something; an earlier run's files are removed.
            dry_run: Print the resolved configuration, what differs from the preset and the parameter counts, and stop,
                after the checks of a start. With a tokenizer and its tokens it is the configuration that they decide.
            fine_tune: Go on from the recovery that the tokenizer has, if it has one, whatever its shape; without, train
                a new one instead.
        """
        run = RecoveryRun(fine_tune, parts(RecoveryConfig, recovery), data, optim, loop)
        if dry_run:
            from mergevq.model_files import find_model_file
            from mergevq.training.dry_run import dry_run as describe
            from mergevq.training.loop import check_start
            from mergevq.training.recovery import check_init
            from mergevq.training.recovery_inputs import open_inputs, resolve

            if not (data.tokenizer or data.tokens or data.val_tokens):
                check_start(out, run, resume=resume, init=init, force=force, check_init=find_model_file)
                print(describe(run, base))
                return
            inputs = open_inputs(run, out)
            run = resolve(run, inputs)
            fits = partial(check_init, run.recovery)
            check_start(out, run, resume=resume, init=init, force=force, check_init=fits)
            print(describe(run, base, inputs.tok.config))
            return
        from mergevq.training.recovery import train_recovery

        tell(train_recovery(run, out, resume=resume, init=init, force=force, hardware=hardware))

    return train
