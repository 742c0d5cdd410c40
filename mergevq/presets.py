"""Complete training runs by name: `{g,gr,r}_{resolution}[_{width}]` for tokenizers, `{s,b,l,xl}_{resolution}[_random]`
for generators, and for both `tiny` and `emoji_64`; `emoji_64` and `256` for recovery; `tiny` and `imagenet_256` for
fine-tuning.

What is in them is in mergevq/training/tokenizer_presets.py, generator_presets.py, recovery_presets.py and
finetune_presets.py.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import TypeVar

from mergevq.errors import ConfigError
from mergevq.training.config import TokenizerRun
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.finetune_presets import FINETUNINGS
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_presets import GENERATORS
from mergevq.training.recovery_config import RecoveryRun
from mergevq.training.recovery_presets import RECOVERIES
from mergevq.training.tokenizer_presets import TOKENIZERS

R = TypeVar("R")


def tokenizer(name: str) -> TokenizerRun:
    """Returns the complete run of a tokenizer preset; `run.model` is its `TokenizerConfig`.

    Raises:
        ConfigError: there is no such preset; the message lists the nearest names.
    """
    return _look_up(TOKENIZERS, name, "tokenizer")


def generator(name: str) -> GeneratorRun:
    """Returns the complete run of a generator preset; `run.model` is its `GeneratorConfig`.

    Grid, bits, classes and numbers of kept tokens are those of ImageNet or of the embedded images, and become those of
    the tokens that it is trained on.

    Raises:
        ConfigError: there is no such preset; the message lists the nearest names.
    """
    return _look_up(GENERATORS, name, "generator")


def recovery(name: str) -> RecoveryRun:
    """Returns the complete run of a preset that trains recovery on the tokens of a frozen tokenizer.

    Raises:
        ConfigError: there is no such preset; the message lists the nearest names.
    """
    return _look_up(RECOVERIES, name, "recovery")


def finetune(name: str) -> FinetuneRun:
    """Returns the complete run of a preset that fine-tunes a tokenizer's encoder to classify images.

    Raises:
        ConfigError: there is no such preset; the message lists the nearest names.
    """
    return _look_up(FINETUNINGS, name, "fine-tuning")


def tokenizer_names() -> tuple[str, ...]:
    """Returns the names that `tokenizer` knows."""
    return tuple(TOKENIZERS)


def generator_names() -> tuple[str, ...]:
    """Returns the names that `generator` knows."""
    return tuple(GENERATORS)


def recovery_names() -> tuple[str, ...]:
    """Returns the names that `recovery` knows."""
    return tuple(RECOVERIES)


def finetune_names() -> tuple[str, ...]:
    """Returns the names that `finetune` knows."""
    return tuple(FINETUNINGS)


def tiny() -> TokenizerRun:
    """Returns the run of the demo: 64 pixels, 256 patches, 12 bits, minutes on two CPU cores, no weights or downloads
    needed but EfficientNet-Lite0's.
    """
    return tokenizer("tiny")


def _look_up(presets: Mapping[str, Callable[[], R]], name: str, kind: str) -> R:
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(presets)}"
        raise ConfigError(f"expected the name of a {kind} preset, got {name!r}: {hint}")
    return presets[name]()
