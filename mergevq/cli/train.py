"""`mergevq train tokenizer`: every field of a run is an option, and a preset gives their defaults."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from mergevq import presets
from mergevq.cli.options import read_numbers
from mergevq.errors import ConfigError
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.training.config import (
    DataConfig,
    HardwareConfig,
    LossConfig,
    TokenizerLoopConfig,
    TokenizerOptimConfig,
    TokenizerRun,
)

M = TypeVar("M", bound=TokenizerConfig)

_EXAMPLE = "tiny"  # Whose defaults --help shows when no preset is named.


@dataclass(frozen=True)
class _Unchecked(TokenizerConfig):
    """A complete description of a tokenizer; `MergeVQ(config)` builds it."""

    def __post_init__(self) -> None:
        """Checks nothing: what is wrong with a model is told in our one line, not in the parser's words."""


def train_tokenizer(words: Sequence[str]) -> Callable[..., None]:
    """Returns the verb with the defaults of the preset that `words` name, or of the run that they resume.

    Raises:
        ConfigError: no preset is named, or one that does not exist.
        CheckpointError: there is no run to resume.
    """
    name, folder = _value(words, "--preset"), _value(words, "--out", "-o")
    asked_help = any(word in ("-h", "--help") for word in words)
    if name is None and folder is not None and "--resume" in words and not asked_help:
        from mergevq.training.run_folder import load_run

        base = load_run(Path(folder), TokenizerRun)
    elif name is None and not asked_help:
        raise ConfigError(f"expected --preset and one of {', '.join(presets.tokenizer_names())}, got none")
    else:
        base = presets.tokenizer(name or _EXAMPLE)
    if (_value(words, "--loop.precision") or "").lower() in ("fp16", "float16", "16", "16-mixed", "half"):
        raise ConfigError(
            "expected --loop.precision float32 or bf16, got fp16: its one gradient scaler cannot serve two optimizers"
        )

    names = f"One of {', '.join(presets.tokenizer_names())}. Not needed with --resume."

    def train(
        out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="RUN")],
        preset: Annotated[str | None, tyro.conf.arg(metavar="NAME", help=names)] = name,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        init: Annotated[str | None, tyro.conf.arg(metavar="M")] = None,
        force: tyro.conf.FlagCreatePairsOff[bool] = False,
        dry_run: tyro.conf.FlagCreatePairsOff[bool] = False,
        hardware: Annotated[HardwareConfig, tyro.conf.arg(name="")] = HardwareConfig(),  # noqa: B008 - frozen
        model: _Unchecked = _parts(_Unchecked, base.model),  # noqa: B008 - frozen
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
                .val_every, .val_images, .save_every, .log_every, data.workers, and data.train and data.val, which must
                be the same images elsewhere.
            init: Start from the weights of this tokenizer: a file, a run's folder, or a Hugging Face hub id.
            force: Start anew in a folder that holds something; an earlier run's files are removed.
            dry_run: Print the resolved configuration, what differs from the preset and the parameter counts, and stop.
        """
        run = TokenizerRun(_parts(TokenizerConfig, model), loss, data, optim, loop)
        _train(out, base, run, hardware, resume=resume, init=init, force=force, show_only=dry_run)

    return train


def number_lists() -> tyro.constructors.ConstructorRegistry:
    """Returns what lets lists of K be written 144,64 as with the other verbs, or 144 64."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def numbers(
        info: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[tuple[int, ...]] | None:
        if info.type != tuple[int, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="INT,...",
            instance_from_str=read_numbers,
            is_instance=lambda value: isinstance(value, tuple) and all(isinstance(k, int) for k in value),
            str_from_instance=lambda value: [",".join(map(str, value))],
        )

    return registry


def _train(
    out: Path,
    base: TokenizerRun,
    run: TokenizerRun,
    hardware: HardwareConfig,
    *,
    resume: bool,
    init: str | None,
    force: bool,
    show_only: bool,
) -> None:
    if show_only:
        from mergevq.training.dry_run import dry_run

        print(dry_run(run, base))
        return
    from mergevq.training.tokenizer import train_tokenizer

    path = train_tokenizer(run, out, resume=resume, init=init, force=force, hardware=hardware)
    if os.environ.get("RANK", "0") == "0":  # Processes that torchrun started all end here.
        print(path)


def _parts(cls: type[M], model: TokenizerConfig) -> M:
    return cls(**{field.name: getattr(model, field.name) for field in fields(TokenizerConfig)})


def _value(words: Sequence[str], *names: str) -> str | None:
    """Returns the value of an option, the last if it is repeated; None if it is not there."""
    found = None
    for word, after in zip(words, [*words[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names and (equals or after is not None):
            found = value if equals else after
    return found
