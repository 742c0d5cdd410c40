"""What is easily given by mistake in Python gets one line that says what to give."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mergevq
from mergevq import presets
from mergevq.data.images import write_images
from mergevq.errors import CheckpointError, ConfigError, MergeVQError, ShapeError
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_num_tokens_may_be_an_array(kind, tiny_tokenizer, images, unchecked):
    tokens = tiny_tokenizer.encode(images, num_tokens=kind([20, 64, 7]))
    assert tokens.num_tokens.tolist() == [20, 64, 7]
    assert tiny_tokenizer.encode(images, num_tokens=kind(9)).num_tokens.tolist() == [9, 9, 9]
    for wrong in (kind([20, 64]), kind([20.0, 64.0, 7.0]), kind([0, 1, 2])):
        with pytest.raises(ShapeError, match="num_tokens"):
            tiny_tokenizer.encode(images, num_tokens=wrong)


def test_wrong_arguments_say_what_to_give(tiny_tokenizer, images, tmp_path: Path, unchecked):
    tokens = tiny_tokenizer.encode(images)
    gen = MergeAR(GeneratorConfig(grid=(8, 8), num_tokens=20, num_bits=6, groups=(6,), width=32, depth=1, heads=2))
    calls = {
        "expected a TokenizerConfig, got 'tiny': presets.tokenizer(name).model": lambda: mergevq.MergeVQ("tiny"),
        "expected a TokenizerConfig, got a TokenizerRun: presets": lambda: mergevq.MergeVQ(presets.tiny()),
        "expected a TokenizerRun, got 'tiny'": lambda: mergevq.train_tokenizer("tiny", tmp_path / "run"),
        "expected a GeneratorRun, got None": lambda: mergevq.train_generator(None, tmp_path / "run"),
        "expected a RecoveryRun, got a TokenizerRun": lambda: mergevq.train_recovery(presets.tiny(), tmp_path / "run"),
        "expected a FinetuneRun, got 'tiny'": lambda: mergevq.finetune("tiny", tmp_path / "run"),
        "expected a MergedTokens, got a Tensor: encode": lambda: tiny_tokenizer.decode(images),
        "expected a MergedTokens, got 'x.mvq': save_tokens(path": lambda: mergevq.save_tokens(tokens, "x.mvq"),
        "expected a Generator, got 0: torch.Generator().manual_seed(0)": lambda: gen.generate([1], rng=0),
    }
    for said, call in calls.items():
        with pytest.raises(ConfigError) as caught:
            call()
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"expected the name of a model, .* got None"):
        mergevq.MergeVQ.from_pretrained(None)
    assert issubclass(MergeVQError, Exception) and list(tmp_path.iterdir()) == []


def test_a_cache_is_written_of_a_folder_by_its_name(tiny_tokenizer, images, tmp_path: Path):
    write_images(tmp_path / "photos", images)
    cache = mergevq.write_token_cache(tiny_tokenizer, str(tmp_path / "photos"), tmp_path / "cache", workers=0)
    assert len(cache) == 3
