"""The tokenizer as a user meets it: tokens are a value, K is an argument, bad input gets one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import CheckpointError, ConfigError, ShapeError, TokenFileError
from mergevq.files import load_tensors, read_header, save_tensors
from mergevq.layers.norm import GroupNorm
from mergevq.losses.alignment import alignment_loss
from mergevq.merging import SourceMap
from mergevq.tokenizer.config import (
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    MergingConfig,
    RecoveryConfig,
    TokenizerConfig,
)
from mergevq.tokenizer.fingerprint import _sample
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import load_tokens, save_tokens


def test_decode_depends_on_the_tokens_alone(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    tokens = tiny_tokenizer.encode(images[:1], 20)
    before = tiny_tokenizer.decode(tokens)
    tiny_tokenizer.encode(images[1:], 7)
    tiny_tokenizer.reconstruct(images[:2], 64)
    assert torch.equal(tiny_tokenizer.decode(tokens), before)


def test_reconstruct_is_decode_of_encode_and_of_forward(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    for k in (1, 13, 64):
        expected = tiny_tokenizer.decode(tiny_tokenizer.encode(images, k))
        assert torch.equal(tiny_tokenizer.reconstruct(images, k), expected)
        with torch.no_grad():
            torch.testing.assert_close(tiny_tokenizer(images, k).reconstruction, expected)


def test_every_k_is_met_exactly(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    for k in (1, 2, 3, 31, 32, 33, 63, 64):
        tokens = tiny_tokenizer.encode(images, k)
        assert tokens.index.shape == (3, k)
        assert tokens.source is not None
        sizes = tokens.source.sizes()
        assert (sizes >= 1).all()
        assert (sizes.sum(1) == 64).all()
        assert (tokens.source.first().diff(dim=1) > 0).all()


def test_several_k_at_once_equal_each_alone(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    stem, ran = tiny_tokenizer.encoder.stem, []
    stem.register_forward_hook(lambda *_: ran.append(1))
    for dtype in (None, torch.bfloat16):
        counts = (20, 64, 5, 20)
        expected = [tiny_tokenizer.encode(images, k, dtype) for k in counts]
        ran.clear()
        together = tiny_tokenizer.encode_each(images, counts, dtype)
        assert len(ran) == 1
        assert all(a.equal(b) for a, b in zip(together, expected, strict=True))
    for wrong in ((20, 65), (0,)):
        with pytest.raises(ShapeError, match=r"integer in 1\.\.64"):
            tiny_tokenizer.encode_each(images, wrong)


def test_pooled_at_several_k_equals_features_of_each_kind(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    embedded = tiny_tokenizer.embed(images)
    for k in (64, 20, 1):
        pooled = tiny_tokenizer.pool_embedded(embedded, k)
        assert torch.equal(pooled.class_token, tiny_tokenizer.features(images, k))
        assert torch.equal(pooled.mean, tiny_tokenizer.features(images, k, kind="mean"))
        assert torch.equal(pooled.codes, tiny_tokenizer.features(images, k, kind="mean", quantized=True))
    for call in (tiny_tokenizer.pool_embedded, tiny_tokenizer.encode_embedded):
        with pytest.raises(ShapeError, match=r"integer in 1\.\.64"):
            call(embedded, 65)
    with pytest.raises(ShapeError, match="finite"):
        tiny_tokenizer.embed(images * float("nan"))
    damaged = embedded._replace(tokens=embedded.tokens.clone().fill_(float("nan")))
    with pytest.raises(ShapeError, match="expected finite numbers in the features"):
        tiny_tokenizer.pool_embedded(damaged, 20)


def test_one_k_per_image_equals_each_image_alone(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    counts = [20, 5, 20]
    ran: list[int] = []
    with tiny_tokenizer.encoder.stem.register_forward_hook(lambda *_: ran.append(1)):
        together = tiny_tokenizer.encode(images, counts)
    assert len(ran) == 1
    assert together.num_tokens.tolist() == counts
    decoded = tiny_tokenizer.decode(together)
    for i, k in enumerate(counts):
        alone = tiny_tokenizer.encode(images[i : i + 1], k)
        assert torch.equal(together.index[i, :k], alone.index[0])
        assert (together.index[i, k:] == 0).all()
        torch.testing.assert_close(decoded[i : i + 1], tiny_tokenizer.decode(alone), atol=1e-5, rtol=1e-5)


def test_default_k_is_the_configured_one(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    assert tiny_tokenizer.encode(images).index.shape[1] == tiny_tokenizer.config.num_tokens
    # A smaller image has fewer patches than the default.
    assert tiny_tokenizer.encode(images[..., :8, :8]).index.shape[1] == 4


@pytest.mark.parametrize("size", [(32, 64), (16, 8), (4, 4), (44, 36)])
def test_other_sizes_that_the_downsampling_divides(tiny_tokenizer: MergeVQ, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size) * 2 - 1
    patches = size[0] * size[1] // 16
    tokens = tiny_tokenizer.encode(images, max(1, patches // 2))
    assert tokens.grid == (size[0] // 4, size[1] // 4)
    out = tiny_tokenizer.decode(tokens)
    assert out.shape == images.shape
    assert torch.isfinite(out).all()
    assert torch.isfinite(tiny_tokenizer.decode(tokens.without_source())).all()


def test_tokens_ignore_autocast(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    plain = tiny_tokenizer.encode(images, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tiny_tokenizer.encode(images, 20)
        assert torch.equal(tiny_tokenizer.decode(inside), tiny_tokenizer.decode(plain))
    assert torch.equal(plain.index, inside.index)
    assert tiny_tokenizer.encode(images, 20, dtype=torch.bfloat16).index.shape == plain.index.shape


def test_recovery_stands_in_for_a_missing_map(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    tokens = tiny_tokenizer.encode(images, [20, 64, 5])
    recovered = tiny_tokenizer.recover(tokens.without_source())
    assert recovered.source is not None
    assert torch.equal(tiny_tokenizer.decode(tokens.without_source()), tiny_tokenizer.decode(recovered))
    assert (recovered.source.index.max(1).values < tokens.num_tokens).all()
    # K = L needs no prediction.
    assert torch.equal(recovered.source.index[1], torch.arange(64))


def test_recovery_masks_padding(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    alone = tiny_tokenizer.recover(tiny_tokenizer.encode(images[:1], 5).without_source())
    padded = tiny_tokenizer.recover(tiny_tokenizer.encode(images, [5, 40, 20]).without_source())
    assert alone.source is not None and padded.source is not None
    assert torch.equal(alone.source.index[0], padded.source.index[0])


def test_without_recovery_a_missing_map_is_refused(tiny_config: TokenizerConfig, images: torch.Tensor) -> None:
    model = MergeVQ(replace(tiny_config, recovery=RecoveryConfig(enabled=False))).eval()
    tokens = model.encode(images, 20).without_source()
    with pytest.raises(CheckpointError, match=r"expected tokens with a source map.*recovery"):
        model.decode(tokens)
    full = model.encode(images, 64)
    assert torch.equal(model.decode(full.without_source()), model.decode(full))


def test_features_are_the_class_token(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    features = tiny_tokenizer.features(images)
    assert features.shape == (3, 16)
    with torch.no_grad():
        expected = tiny_tokenizer.encoder(images, (0, 0)).class_token
    torch.testing.assert_close(features, expected)
    assert not torch.allclose(features, tiny_tokenizer.features(images, 8))
    features.sum().backward()
    assert tiny_tokenizer.encoder.class_token.grad is not None


# 28 pixels are 49 of 64 patches: of 14 kept they keep 10.7; or they lose the same 50, which two layers do as 38 and 12,
# at most half each time.
@pytest.mark.parametrize(("view_tokens", "kept"), [("fraction", 11), ("all", 49), ("same_count", 49 - 24 - 12)])
def test_a_smaller_view_keeps_its_share(tiny_config: TokenizerConfig, view_tokens: str, kept: int) -> None:
    merging = MergingConfig(overflow="clip" if view_tokens == "same_count" else "carry")
    alignment = replace(tiny_config.alignment, view_tokens=view_tokens)
    without = RecoveryConfig(enabled=False)
    model = MergeVQ(replace(tiny_config, merging=merging, alignment=alignment, recovery=without))
    seen = []
    model.encoder.register_forward_hook(lambda _m, _i, out: seen.append(out.tokens.shape[1]))
    model.align(torch.zeros(1, 3, 28, 28), 14)
    assert seen == [kept]


@pytest.mark.parametrize("num_tokens", [None, 20, 1])
def test_alignment_teaches_the_encoder_merged_or_not(
    tiny_tokenizer: MergeVQ, images: torch.Tensor, num_tokens: int | None
) -> None:
    target = torch.randn(3, 10, generator=torch.Generator().manual_seed(4))
    view = images[..., :28, :28]
    predicted = tiny_tokenizer.align(view, num_tokens)
    kept = 49 if num_tokens is None else max(1, round(num_tokens * 49 / 64))
    with torch.no_grad():
        class_token = tiny_tokenizer.features(view, kept)
        assert tiny_tokenizer.alignment is not None
        torch.testing.assert_close(tiny_tokenizer.alignment(class_token[:, None]), predicted)
    alignment_loss(predicted, target).backward()
    reached = {name.split(".")[0] for name, p in tiny_tokenizer.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "alignment"}
    assert tiny_tokenizer.encoder.stem.conv_in.weight.grad.abs().sum() > 0


def test_groups_of_one_channel_do_for_one_token(tiny_config: TokenizerConfig, images: torch.Tensor) -> None:
    model = MergeVQ(
        replace(
            tiny_config,
            num_groups=8,
            encoder=replace(tiny_config.encoder, multipliers=(1, 1)),
            decoder=replace(tiny_config.decoder, multipliers=(1, 1)),
        )
    ).eval()
    alone = model.encode(images[:1], 1)
    assert torch.isfinite(model.decode(alone)).all()
    assert model.encode(images, [1, 64, 1])[0].equal(alone)
    assert model.reconstruct(images[:1, :, :4, :4]).shape == (1, 3, 4, 4)
    model.train()(images[:1], 1).reconstruction.sum().backward()


def test_group_norm_is_that_of_torch(images: torch.Tensor) -> None:
    x = images.repeat(1, 4, 1, 1).requires_grad_()
    ours, theirs = GroupNorm(4, 12, eps=1e-6), torch.nn.GroupNorm(4, 12, eps=1e-6)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            a, b = ours(x.to(dtype)), theirs(x.to(dtype))
        assert a.dtype == b.dtype and torch.equal(a, b)
        grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (a, b)]
        assert torch.equal(*grads)


def test_quantization_sees_normalised_numbers(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    tokens = tiny_tokenizer.encode(images, 20)
    with torch.no_grad():
        out = tiny_tokenizer(images, 20)
    assert torch.equal(out.quantized.index, tokens.index)
    assert set(out.quantized.codes.unique().tolist()) == {-1.0, 1.0}


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_loaded_model_decodes_loaded_tokens_to_the_same_bits(
    tiny_tokenizer: MergeVQ, images: torch.Tensor, tmp_path: Path
) -> None:
    expected = tiny_tokenizer.decode(tiny_tokenizer.encode(images, [20, 9, 64]))
    model_file = tiny_tokenizer.save_pretrained(tmp_path / "model", step=3)
    save_tokens(tmp_path / "x.mvq", tiny_tokenizer.encode(images, [20, 9, 64]))
    loaded = MergeVQ.from_pretrained(model_file)
    assert loaded.config == tiny_tokenizer.config
    assert loaded.fingerprint() == tiny_tokenizer.fingerprint()
    assert not loaded.training
    assert torch.equal(loaded.decode(load_tokens(tmp_path / "x.mvq")), expected)
    assert torch.equal(MergeVQ.from_pretrained(tmp_path / "model").decode(load_tokens(tmp_path / "x.mvq")), expected)


def test_the_fingerprint_is_of_what_makes_tokens(tiny_tokenizer: MergeVQ) -> None:
    before = tiny_tokenizer.fingerprint()
    with torch.no_grad():
        next(tiny_tokenizer.decoder.parameters()).add_(1)
        assert tiny_tokenizer.recovery is not None
        next(tiny_tokenizer.recovery.parameters()).add_(1)
    assert tiny_tokenizer.fingerprint() == before
    with torch.no_grad():
        tiny_tokenizer.encoder.class_token.add_(1e-3)
    assert tiny_tokenizer.fingerprint() != before


def test_the_fingerprint_sees_writes_that_torch_does_not_count(tiny_tokenizer: MergeVQ) -> None:
    seen = {tiny_tokenizer.fingerprint()}
    optimizer = torch.optim.AdamW(tiny_tokenizer.parameters(), lr=1e-3, fused=True)
    tiny_tokenizer(torch.zeros(1, 3, 32, 32), 20).reconstruction.sum().backward()
    optimizer.step()
    seen.add(tiny_tokenizer.fingerprint())
    tiny_tokenizer.encoder.code_out.weight.data.mul_(1.5)
    seen.add(tiny_tokenizer.fingerprint())
    assert len(seen) == 3


def test_the_fingerprint_looks_at_weights_without_copying_them(tiny_tokenizer: MergeVQ) -> None:
    before = tiny_tokenizer.fingerprint()
    tiny_tokenizer.to(memory_format=torch.channels_last)
    assert tiny_tokenizer.fingerprint() == before
    convolutions = [p.detach() for p in tiny_tokenizer.encoder.parameters() if p.ndim == 4]
    assert any(not weight.is_contiguous() for weight in convolutions)
    for weight in convolutions:
        assert _sample(weight).untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    tiny_tokenizer.encoder.stem.conv_in.weight.data.mul_(1.5)
    assert tiny_tokenizer.fingerprint() != before


def test_a_model_made_in_inference_mode_works(tiny_config: TokenizerConfig, images: torch.Tensor) -> None:
    with torch.inference_mode():
        model = MergeVQ(tiny_config).eval()
        assert torch.isfinite(model.decode(model.encode(images, 20))).all()


def test_images_come_to_the_model(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    expected = tiny_tokenizer.encode(images, 20)
    assert tiny_tokenizer.encode(images.double(), 20).equal(expected)
    assert torch.equal(tiny_tokenizer.features(images.double()), tiny_tokenizer.features(images))
    with torch.device("meta"):
        elsewhere = MergeVQ(tiny_tokenizer.config)
    # There are no values on the meta device: what fails is the first look at one, not two devices that meet.
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta tensors"):
        elsewhere.features(images)


def test_damaged_weights_are_noticed(tiny_tokenizer: MergeVQ, images: torch.Tensor) -> None:
    tokens = tiny_tokenizer.encode(images, 20)
    with torch.no_grad():
        tiny_tokenizer.decoder.norm_out.bias[0] = torch.nan
    with pytest.raises(ShapeError, match="decoder's output, got NaN"):
        tiny_tokenizer.decode(tokens)
    with torch.no_grad():
        tiny_tokenizer.encoder.class_token[..., 0] = torch.nan
    for call in (tiny_tokenizer.encode, tiny_tokenizer.features):
        with pytest.raises(ShapeError, match="got NaN"):
            call(images)


def test_tokens_of_another_tokenizer_are_refused(
    tiny_tokenizer: MergeVQ, tiny_config: TokenizerConfig, images: torch.Tensor
) -> None:
    tokens = tiny_tokenizer.encode(images, 20)
    torch.manual_seed(9)
    other, wider = MergeVQ(tiny_config), MergeVQ(replace(tiny_config, num_bits=8))
    for call, wide in ((other.decode, wider.decode), (other.recover, wider.recover)):
        for given in (tokens, tokens.without_source()):
            with pytest.raises(TokenFileError, match="expected tokens of tokenizer"):
                call(given)
            with pytest.raises(ShapeError, match="8 bits, got 6"):
                wide(replace(given, tokenizer=None))
    with pytest.raises(ShapeError, match="source map"):
        replace(tokens, tokenizer=None, source=SourceMap.identity(3, 64))


def test_damaged_or_foreign_model_files_are_refused(tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    path = tiny_tokenizer.save_pretrained(tmp_path / "m.safetensors")
    tensors, header = load_tensors(path)
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    dropped = dict(list(tensors.items())[1:])
    save_tensors(tmp_path / "missing.safetensors", dropped, header)
    save_tensors(tmp_path / "extra.safetensors", {**tensors, "foreign.weight": torch.zeros(1)}, header)
    save_tensors(tmp_path / "kind.safetensors", tensors, {**header, "mergevq": "generator/1"})
    save_tensors(tmp_path / "config.safetensors", tensors, {**header, "config": '{"colour": 3}'})
    save_tensors(tmp_path / "other.safetensors", tensors, {})
    for name, match in {
        "cut": "cut",
        "missing": "missing",
        "extra": "foreign.weight",
        "kind": "generator",
        "config": "colour",
        "other": "convert",
    }.items():
        with pytest.raises(CheckpointError, match=match) as caught:
            MergeVQ.from_pretrained(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(caught.value).strip() or name in ("missing", "extra")
    with pytest.raises(CheckpointError):
        MergeVQ.from_pretrained(tmp_path / "absent.safetensors")


def test_broken_weights_are_not_saved(tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_tokenizer.encoder.class_token.fill_(torch.nan)
    with pytest.raises(ShapeError, match=r"class_token.*nothing was saved"):
        tiny_tokenizer.save_pretrained(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: x.flip(1)[0], r"\[B, 3, H, W\]"),
        (lambda x: x[:, :2], r"\[B, 3, H, W\]"),
        (lambda x: x[:0], "B >= 1"),
        (lambda x: x[..., :30], "multiples of 4, got 32 x 30"),
        (lambda x: x[..., :2, :2], "multiples of 4, got 2 x 2"),
        (lambda x: x * 127.5 + 127.5, r"\[-1, 1\]"),
        (lambda x: x.mul(1.1).clamp(-1.05, 1.05), r"\[-1, 1\]"),
        (lambda x: x.masked_fill(x > 0.9, torch.nan), "nan"),
        (lambda x: x.masked_fill(x > 0.9, torch.inf), "inf"),
    ],
)
@pytest.mark.parametrize("call", ["encode", "features", "align", "reconstruct"])
@pytest.mark.usefixtures("unchecked")
def test_bad_images_are_refused(tiny_tokenizer: MergeVQ, images: torch.Tensor, make, match: str, call: str) -> None:
    with pytest.raises(ShapeError, match=match):
        getattr(tiny_tokenizer, call)(make(images))


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
@pytest.mark.usefixtures("unchecked")
def test_k_may_come_in_an_array(tiny_tokenizer: MergeVQ, images: torch.Tensor, make: Callable) -> None:
    assert tiny_tokenizer.encode(images, make([20, 5, 64])).equal(tiny_tokenizer.encode(images, [20, 5, 64]))
    with pytest.raises(ShapeError, match=r"one num_tokens per image \(3\)"):
        tiny_tokenizer.encode(images, make([20, 5]))
    for bad in ([[20], [5], [64]], [20.0, 5.0, 64.0], [True, True, True]):
        with pytest.raises(ShapeError, match="an integer in"):
            tiny_tokenizer.encode(images, make(bad))


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
@pytest.mark.usefixtures("unchecked")
def test_features_and_alignment_have_one_k(tiny_tokenizer: MergeVQ, images: torch.Tensor, make: Callable) -> None:
    for call in (tiny_tokenizer.features, tiny_tokenizer.align):
        with pytest.raises(ShapeError, match=r"an integer in 1\.\.64"):
            call(images, make([3, 4, 5]))
        assert torch.equal(call(images, np.int64(4)), call(images, 4))


@pytest.mark.parametrize("bad", [0, 65, -1])
def test_bad_k_is_refused(tiny_tokenizer: MergeVQ, images: torch.Tensor, bad: int) -> None:
    for call in (tiny_tokenizer.encode, tiny_tokenizer.features, tiny_tokenizer.align):
        with pytest.raises(ShapeError, match=r"1\.\.64"):
            call(images, bad)


def _encoder(**change: object) -> EncoderConfig:
    return replace(
        EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=2, heads=2), **change
    )


def _decoder(**change: object) -> DecoderConfig:
    return replace(
        DecoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), output_stride=2, depth=1, heads=2), **change
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"image_size": 30},
        lambda: {"num_tokens": 0},
        lambda: {"num_tokens": 65},
        lambda: {"num_bits": 0},
        lambda: {"num_groups": 3},
        lambda: {"num_groups": 0},
        lambda: {"num_bits": 6.0},
        lambda: {"layer_scale": float("nan")},
        lambda: {"merging": MergingConfig(schedule="lineer")},
        lambda: {"merging": MergingConfig(overflow="clip")},
        lambda: {"encoder": EncoderConfig(kind="hybird")},
        lambda: {"encoder": EncoderConfig(heads=0)},
        lambda: {"encoder": EncoderConfig(kind="vit", vit_width=18)},
        lambda: {"encoder": EncoderConfig(multipliers=[1, 2])},
        lambda: {
            "encoder": EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1,), stem_stride=2, depth=2, heads=2)
        },
        lambda: {"encoder": EncoderConfig(channels=8, multipliers=(1, 2, 2), blocks=(1, 1, 1), stem_stride=2, depth=2)},
        lambda: {
            "encoder": EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=2, heads=3)
        },
        lambda: {
            "encoder": EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=0, heads=2)
        },
        lambda: {"encoder": EncoderConfig(kind="vit", patch_size=4, vit_width=0, depth=1, heads=2)},
        lambda: {"encoder": EncoderConfig(kind="vit", patch_size=0, vit_width=16, depth=1, heads=2)},
        lambda: {"encoder": _encoder(channels=0)},
        lambda: {"encoder": _encoder(multipliers=(-1, 2))},
        lambda: {"encoder": _encoder(multipliers=(), blocks=())},
        lambda: {"encoder": _encoder(channels=6, multipliers=(2, 4))},
        lambda: {"decoder": _decoder(channels=0)},
        lambda: {"decoder": _decoder(multipliers=(-1, 2))},
        lambda: {"decoder": _decoder(multipliers=(), blocks=())},
        lambda: {"recovery": RecoveryConfig(width=0)},
        lambda: {"recovery": RecoveryConfig(width=-32, heads=2)},
        lambda: {"alignment": AlignmentConfig(teacher_dim=0)},
        lambda: {"alignment": AlignmentConfig(teacher_dim=10, blocks=-1)},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_configurations_are_refused(tiny_config: TokenizerConfig, change: Callable[[], dict]) -> None:
    with pytest.raises(ConfigError, match=r"must|need") as caught:
        replace(tiny_config, **change())
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_the_width_of_a_vit_is_refused_where_group_norm_would_be(tiny_config: TokenizerConfig) -> None:
    with pytest.raises(ConfigError, match="encoder widths must be multiples of num_groups 16, got 200"):
        replace(
            tiny_config,
            num_groups=16,
            encoder=EncoderConfig(kind="vit", patch_size=4, vit_width=200, depth=1, heads=4),
            decoder=replace(tiny_config.decoder, channels=16),
        )


@pytest.mark.usefixtures("unchecked")
def test_a_misspelt_word_gets_its_neighbour(tiny_config: TokenizerConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"encoder.kind must be one of hybrid, vit, got 'hybird': did you mean hybrid"
    ):
        replace(tiny_config, encoder=replace(tiny_config.encoder, kind="hybird"))


def test_configurations_survive_json(tiny_config: TokenizerConfig) -> None:
    assert config_from_dict(TokenizerConfig, config_to_dict(tiny_config)) == tiny_config
    with pytest.raises(ConfigError, match="no field colour"):
        config_from_dict(TokenizerConfig, {"colour": 1})


def test_half_precision_files_name_the_tokenizer_that_they_hold(tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    full = tiny_tokenizer.save_pretrained(tmp_path / "full.safetensors")
    half = tiny_tokenizer.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = MergeVQ.from_pretrained(half)
    assert read_header(half)["fingerprint"] == loaded.fingerprint() != tiny_tokenizer.fingerprint()
    for (name, ours), theirs in zip(loaded.state_dict().items(), tiny_tokenizer.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.half().float()), name
    assert next(tiny_tokenizer.parameters()).dtype == torch.float32
    large = MergeVQ(tiny_tokenizer.config)
    with torch.no_grad():
        next(large.parameters()).fill_(1e6)
    with pytest.raises(ShapeError, match="finite"):
        large.save_pretrained(tmp_path / "overflow.safetensors", dtype=torch.float16)
    assert not (tmp_path / "overflow.safetensors").exists()
