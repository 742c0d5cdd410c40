"""Tokens are defined in float32: global settings that round it to fewer bits end at encode and decode."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mergevq.evaluation.correspondence import correspond
from mergevq.evaluation.feature_sources import FeatureSetting, TokenizerFeatures
from mergevq.evaluation.protocol import precision
from mergevq.tokenizer.arithmetic import unrounded
from mergevq.tokenizer.class_attention import class_attention
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ

CUDA = torch.device("cuda")


@pytest.fixture
def rounding() -> Iterator[None]:
    """Asks torch for every rounding that it has."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


def settings() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.mark.usefixtures("rounding")
def test_nothing_rounds_inside_and_all_is_put_back() -> None:
    flags = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with unrounded(CUDA):
        assert settings() == (False, "highest")
        assert flags == (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        )
    assert settings() == (True, "medium")
    with pytest.raises(KeyError), unrounded(CUDA):
        raise KeyError
    assert settings() == (True, "medium")


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch 2.9 has settings for each operation")
def test_settings_for_each_operation_are_put_back_too() -> None:
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    try:
        convolutions.fp32_precision, products.fp32_precision = "ieee", "tf32"
        with unrounded(CUDA):
            assert (convolutions.fp32_precision, products.fp32_precision) == ("ieee", "ieee")
        assert (convolutions.fp32_precision, products.fp32_precision) == ("ieee", "tf32")
    finally:
        convolutions.fp32_precision, products.fp32_precision = before


@pytest.mark.usefixtures("rounding")
def test_tokens_are_made_and_drawn_without_rounding(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    seen: list[str] = []
    for part in (tiny_tokenizer.encoder.stem, tiny_tokenizer.decoder, tiny_tokenizer.recovery):
        part.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    tokens = tiny_tokenizer.encode(images, 20)
    tiny_tokenizer.decode(tiny_tokenizer.recover(tokens.without_source()))
    assert seen == ["highest"] * 3
    tiny_tokenizer.encode(images, 20, dtype=torch.bfloat16)
    assert seen[3:] == ["medium"], "who asks for another arithmetic gets it as it is"


@pytest.mark.usefixtures("rounding")
def test_features_and_pictures_belong_to_the_tokens(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    seen: list[str] = []
    tiny_tokenizer.encoder.stem.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    tiny_tokenizer.encoder.blocks[0].norm1.register_forward_hook(
        lambda *_: seen.append(torch.get_float32_matmul_precision())
    )
    setting = FeatureSetting("tokenizer", "mean", 20, True)
    for look in (
        lambda: TokenizerFeatures(tiny_tokenizer, [setting])(images),
        lambda: class_attention(tiny_tokenizer, images, 20),
        lambda: correspond(tiny_tokenizer, images[:2], 20),
    ):
        seen.clear()
        look()
        assert len(seen) >= 2 and set(seen) == {"highest"}


@pytest.mark.usefixtures("rounding")
def test_results_say_what_is_rounded() -> None:
    told = "float32; outside of encode, decode and the tokenizer's features {} with fewer bits (TF32 or bf16)"
    assert precision(CUDA) == told.format("matrix products and convolutions")
    assert precision(torch.device("cpu")) == told.format("matrix products")
    plain = "float32; matrix products with fewer bits (TF32 or bf16)"
    assert precision(torch.device("cpu"), tokenizer=False) == plain
    with unrounded(CUDA):
        assert precision(CUDA) == "float32"


@pytest.mark.gpu
def test_a_gpu_makes_the_same_tokens_whatever_it_may_round(tiny_config: TokenizerConfig, images: torch.Tensor) -> None:
    # Wide enough for kernels that round.
    encoder, decoder = replace(tiny_config.encoder, channels=64), replace(tiny_config.decoder, channels=64)
    torch.manual_seed(0)
    tok = MergeVQ(replace(tiny_config, encoder=encoder, decoder=decoder)).eval().to(CUDA)
    made, before = [], settings()
    try:
        for allowed, products in ((False, "highest"), (True, "high")):
            torch.backends.cudnn.allow_tf32 = allowed
            torch.set_float32_matmul_precision(products)
            tokens = tok.encode(images, [64, 20, 5])
            with torch.no_grad():
                made.append((tok.encoder.stem(images.to(CUDA)), tokens, tok.decode(tokens)))
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
    (plain, tokens, drawn), (rounded, again, redrawn) = made
    if torch.cuda.get_device_capability() >= (8, 0):
        assert not torch.equal(plain, rounded), "the settings do something outside"
    assert tokens.equal(again) and torch.equal(drawn, redrawn)
