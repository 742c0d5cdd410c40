"""A classifier: its features, its file, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.errors import CheckpointError, ConfigError, OutputExistsError, ShapeError
from mergevq.files import load_tensors, read_header, save_tensors
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.classifier_config import ClassifierConfig
from mergevq.tokenizer.model import MergeVQ

NAMES = ("cats", "dogs", "owls")


def build(tok: MergeVQ, **fields) -> Classifier:
    config = ClassifierConfig(tok.config, **{"image_size": 32, "num_tokens": 64, "class_names": NAMES, **fields})
    torch.manual_seed(1)
    classifier = Classifier(replace(config, began_as=tok.fingerprint()))
    classifier.encoder.load_state_dict(tok.encoder.state_dict())
    with torch.no_grad():
        for parameter in (*classifier.norm.parameters(), *classifier.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    return classifier.eval()


@pytest.mark.parametrize("num_tokens", [64, 20])
@pytest.mark.parametrize("features", ["class", "mean", "class+mean"])
def test_the_logits_are_a_linear_map_of_the_normed_features(tiny_tokenizer, images, features, num_tokens):
    classifier = build(tiny_tokenizer, features=features, num_tokens=num_tokens)
    seen = tiny_tokenizer.features(images, num_tokens, kind=features).detach()
    # Each part has a norm of its own.
    width = tiny_tokenizer.config.encoder.width
    parts = [part - part.mean(1, keepdim=True) for part in seen.split(width, 1)]
    normed = torch.cat([part / (part.square().mean(1, keepdim=True) + 1e-6).sqrt() for part in parts], 1)
    normed = normed * classifier.norm.weight + classifier.norm.bias
    expected = normed @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(classifier.classify(images), expected, rtol=1e-4, atol=1e-5)
    assert not classifier.classify(images).requires_grad


def test_branches_are_left_out_image_by_image(tiny_tokenizer, images):
    classifier = build(tiny_tokenizer)
    with torch.no_grad():
        plain = classifier(images, 20)
        ones = torch.ones(2, 2, 3)
        assert torch.equal(classifier(images, 20, ones), plain)
        some = ones.clone()
        some[1, 0, 2] = 0.0
        dropped = classifier(images, 20, some)
        torch.testing.assert_close(dropped[:2], plain[:2])
        assert not torch.allclose(dropped[2], plain[2], atol=1e-3)
        # Without the attention of the last block: as if its output were 0.
        block = classifier.encoder.blocks[1]
        block.ls1.zero_()
        torch.testing.assert_close(classifier(images, 20)[2], dropped[2])


def test_the_class_token_sees_nothing_if_all_is_left_out(tiny_tokenizer, images):
    classifier = build(tiny_tokenizer)
    logits = classifier(images, 64, torch.zeros(2, 2, 3)).detach()
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))


def test_other_sizes_and_other_numbers_of_tokens(tiny_tokenizer, images):
    whole, merged = build(tiny_tokenizer), build(tiny_tokenizer, num_tokens=20)
    smaller = images[..., :16, :16].contiguous()
    assert torch.equal(whole.classify(smaller), whole.classify(smaller, 16))
    assert torch.equal(merged.classify(smaller), merged.classify(smaller, 16))
    assert torch.equal(merged.classify(images), whole.classify(images, 20))
    assert not torch.equal(merged.classify(images), whole.classify(images))


def test_saved_and_loaded_it_is_the_same_and_never_a_tokenizer(tiny_tokenizer, images, tmp_path: Path):
    classifier = build(tiny_tokenizer, features="class+mean")
    path = classifier.save_pretrained(tmp_path / "c", step=7)
    header = read_header(path)
    assert (header["mergevq"], header["step"]) == ("classifier/1", "7")
    again = Classifier.from_pretrained(tmp_path / "c")
    assert again.config == classifier.config and not again.training
    assert torch.equal(again.classify(images), classifier.classify(images))
    # The very encoder of the tokenizer, until it is trained.
    assert header["fingerprint"] == again.fingerprint() == again.config.began_as == tiny_tokenizer.fingerprint()
    with torch.no_grad():
        again.encoder.class_token.add_(1e-3)
    assert again.fingerprint() != again.config.began_as
    assert not any(
        p.requires_grad for p in (*again.encoder.norm_out.parameters(), *again.encoder.code_out.parameters())
    )
    with pytest.raises(OutputExistsError):
        classifier.save_pretrained(path)
    with pytest.raises(CheckpointError, match="expected a tokenizer file, got a classifier file"):
        MergeVQ.from_pretrained(path)
    tiny_tokenizer.save_pretrained(tmp_path / "tok")
    with pytest.raises(CheckpointError, match="expected a classifier file, got a tokenizer file"):
        Classifier.from_pretrained(tmp_path / "tok")


def test_a_file_is_loaded_strictly(tiny_tokenizer, tmp_path: Path):
    path = build(tiny_tokenizer).save_pretrained(tmp_path / "c.safetensors")
    tensors, header = load_tensors(path)
    bias = tensors.pop("head.bias")
    save_tensors(path, {**tensors, "head.extra": bias}, header)
    with pytest.raises(CheckpointError, match=r"1 missing \(head.bias\), 1 unexpected \(head.extra\)"):
        Classifier.from_pretrained(path)
    tensors |= {"head.bias": torch.zeros(4)}
    save_tensors(path, tensors, header)
    with pytest.raises(CheckpointError, match=r"head.bias: expected float32\[3\], got float32\[4\]"):
        Classifier.from_pretrained(path)
    save_tensors(path, tensors, {**header, "config": json.dumps({"features": "everything"})})
    with pytest.raises(CheckpointError, match="expected a classifier configuration"):
        Classifier.from_pretrained(path)


def test_weights_that_are_not_finite_are_neither_saved_nor_used(tiny_tokenizer, images, tmp_path: Path):
    classifier = build(tiny_tokenizer)
    with torch.no_grad():
        classifier.head.bias[0] = float("inf")
    with pytest.raises(ShapeError, match=r"head.bias: nothing was saved"):
        classifier.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ShapeError, match="expected finite logits"):
        classifier.classify(images)


def test_bad_images_and_numbers_of_tokens_are_refused(tiny_tokenizer, images):
    classifier = build(tiny_tokenizer)
    with pytest.raises(ShapeError, match=r"in \[-1, 1\]"):
        classifier.classify(images * 3)
    with pytest.raises(ShapeError, match=r"1\.\.64"):
        classifier.classify(images, 65)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_tokens": 65}, r"num_tokens must lie in 1..64"),
        ({"num_tokens": 0}, r"num_tokens must lie in 1..64"),
        ({"image_size": 30}, "multiple of the tokenizer's downsampling 4"),
        ({"class_names": ("cats",)}, "at least two class_names, got 1"),
        ({"features": "patches"}, "features must be one of class, mean, class.mean"),
    ],
)
def test_a_configuration_checks_itself(tiny_config, fields, match, unchecked):
    with pytest.raises(ConfigError, match=match):
        ClassifierConfig(tiny_config, **{"image_size": 32, "num_tokens": 64, **fields})
