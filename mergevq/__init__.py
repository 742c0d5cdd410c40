"""MergeVQ: an image tokenizer that merges similar patches, and what is built on its tokens.

The public names are loaded on first use, so that `import mergevq` and `mergevq --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "MergeVQ": "mergevq.tokenizer.model",
    "TokenizerConfig": "mergevq.tokenizer.config",
    "Classifier": "mergevq.tokenizer.classifier",
    "GeneratorConfig": "mergevq.generator.config",
    "MergeAR": "mergevq.generator.raster",
    "RandomAR": "mergevq.generator.random_order",
    "load_generator": "mergevq.generator.generate",
    "MergedTokens": "mergevq.tokens",
    "save_tokens": "mergevq.tokens",
    "load_tokens": "mergevq.tokens",
    "SourceMap": "mergevq.merging",
    "LFQ": "mergevq.quantize",
    "Quantized": "mergevq.quantize",
    "load_teacher": "mergevq.layers.teachers",
    "read_images": "mergevq.data.images",
    "write_images": "mergevq.data.images",
    "TokenCache": "mergevq.data.token_cache",
    "write_token_cache": "mergevq.data.cache_writer",
    "TeacherCache": "mergevq.data.teacher_cache",
    "write_teacher_cache": "mergevq.data.teacher_cache",
    "train_tokenizer": "mergevq.training.tokenizer",
    "train_generator": "mergevq.training.generator",
    "train_recovery": "mergevq.training.recovery",
    "finetune": "mergevq.training.finetune",
    "evaluate_reconstruction": "mergevq.evaluation.reconstruction",
    "evaluate_generation": "mergevq.evaluation.generation",
    "evaluate_representation": "mergevq.evaluation.representation",
    "evaluate_all": "mergevq.evaluation.overall",
    "MergeVQError": "mergevq.errors",
}
_SUBMODULES = ("presets", "convert", "errors")

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]

if TYPE_CHECKING:
    from mergevq import convert as convert
    from mergevq import errors as errors
    from mergevq import presets as presets
    from mergevq.data.cache_writer import write_token_cache as write_token_cache
    from mergevq.data.images import read_images as read_images
    from mergevq.data.images import write_images as write_images
    from mergevq.data.teacher_cache import TeacherCache as TeacherCache
    from mergevq.data.teacher_cache import write_teacher_cache as write_teacher_cache
    from mergevq.data.token_cache import TokenCache as TokenCache
    from mergevq.errors import MergeVQError as MergeVQError
    from mergevq.evaluation.generation import evaluate_generation as evaluate_generation
    from mergevq.evaluation.overall import evaluate_all as evaluate_all
    from mergevq.evaluation.reconstruction import evaluate_reconstruction as evaluate_reconstruction
    from mergevq.evaluation.representation import evaluate_representation as evaluate_representation
    from mergevq.generator.config import GeneratorConfig as GeneratorConfig
    from mergevq.generator.generate import load_generator as load_generator
    from mergevq.generator.random_order import RandomAR as RandomAR
    from mergevq.generator.raster import MergeAR as MergeAR
    from mergevq.layers.teachers import load_teacher as load_teacher
    from mergevq.merging import SourceMap as SourceMap
    from mergevq.quantize import LFQ as LFQ
    from mergevq.quantize import Quantized as Quantized
    from mergevq.tokenizer.classifier import Classifier as Classifier
    from mergevq.tokenizer.config import TokenizerConfig as TokenizerConfig
    from mergevq.tokenizer.model import MergeVQ as MergeVQ
    from mergevq.tokens import MergedTokens as MergedTokens
    from mergevq.tokens import load_tokens as load_tokens
    from mergevq.tokens import save_tokens as save_tokens
    from mergevq.training.finetune import finetune as finetune
    from mergevq.training.generator import train_generator as train_generator
    from mergevq.training.recovery import train_recovery as train_recovery
    from mergevq.training.tokenizer import train_tokenizer as train_tokenizer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _SUBMODULES:
        return import_module(f"mergevq.{name}")
    raise AttributeError(f"module 'mergevq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
