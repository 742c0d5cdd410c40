"""A run that cannot work is refused before anything is touched."""

import re
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import mergevq
from mergevq import presets
from mergevq.configuration import config_from_dict, config_to_dict
from mergevq.errors import ConfigError
from mergevq.losses.adversarial import PatchDiscriminator
from mergevq.training.config import LossConfig, LossWeights
from mergevq.training.generator_config import GeneratorRun, TokenFacts, fit_model, usual_groups


def test_a_loss_of_weight_0_takes_its_module_away() -> None:
    run = presets.tokenizer("gr_64")
    weights = replace(run.loss.weights, recovery=0.0, alignment=0.0)
    model = replace(run, loss=replace(run.loss, weights=weights)).model
    assert not model.recovery.enabled
    assert not model.alignment.enabled
    with pytest.raises(ConfigError, match=r"loss.weights.recovery is 0.5 but model.recovery.enabled is false"):
        replace(presets.tiny(), loss=LossConfig(weights=LossWeights(alignment=0.0)))


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("data", {"workers": -1}, "data.workers must be at least 0"),
        ("data", {"val_fraction": 1.5}, "0..1"),
        ("optim", {"lr": float("nan")}, "optim.lr must be a finite number"),
        ("optim", {"lr": -1.0}, "optim.lr must be at least 0"),
        ("optim", {"betas": (0.9, 1.0)}, "optim.betas"),
        ("optim", {"schedule": "cosin"}, "did you mean cosine"),
        ("optim", {"ema_decay": 1.5}, "optim.ema_decay"),
        ("loss", {"lecam_decay": 1.0}, "loss.lecam_decay must lie in 0..1, below 1, got 1.0"),
        ("loop", {"steps": 0}, "loop.steps must be at least 1"),
        ("loop", {"seed": 2**64}, "loop.seed of at most 64 bits"),
        ("loop", {"minutes": -1.0}, "loop.minutes must be at least 0"),
        ("loop", {"num_tokens": (300,)}, "1..256"),
        ("loop", {"num_tokens": ()}, "at least one entry"),
        ("loop", {"num_tokens_probs": (0.5,)}, "5 entries"),
        ("loop", {"precision": "fp16"}, "gradient scaler"),
        ("loss", {"adversarial": "hing"}, "did you mean hinge"),
        ("loss", {"weights": LossWeights(perceptual=-1.0, recovery=0.0, alignment=0.0)}, "at least 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_runs_are_refused(part: str, change: dict, match: str) -> None:
    run = presets.tiny()

    with pytest.raises(ConfigError, match=match):
        replace(run, **{part: replace(getattr(run, part), **change)})


# ----------------------------------------------------------------------------------------------------------- generators


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("loss", {"label_smoothing": 1.0}, "loss.label_smoothing must lie in 0..1"),
        ("data", {"tokens": "a", "train": "b"}, "got both"),
        ("data", {"workers": -1}, "data.workers must be at least 0"),
        ("optim", {"lr": -1.0}, "optim.lr must be at least 0"),
        ("optim", {"weight_decay": -0.1}, "optim.weight_decay"),
        ("loop", {"accumulate": 0}, "loop.accumulate must be at least 1"),
        ("loop", {"precision": "fp16"}, "use bf16"),
        ("loop", {"sample_classes": -1}, "loop.sample_classes must be at least 0"),
        ("loop", {"num_tokens_probs": (0.5,)}, "0 entries"),
        ("loop", {"num_tokens": (4, 9), "num_tokens_probs": (0.0, 0.0)}, "not all 0"),
        ("loop", {"sample_guidance": "much"}, "loop.sample_guidance must be a finite number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_impossible_runs_of_generators_are_refused(part: str, change: dict, match: str) -> None:
    run = presets.generator("tiny")
    with pytest.raises(ConfigError, match=match):
        replace(run, **{part: replace(getattr(run, part), **change)})


@pytest.mark.parametrize("name", presets.generator_names())
def test_a_generators_run_survives_json(name: str) -> None:
    run = presets.generator(name)
    assert config_from_dict(GeneratorRun, config_to_dict(run)) == run
    assert run.model.order == ("random" if name.endswith("_random") else "raster")


def facts(num_bits: int, num_tokens: tuple[int, ...] = (64, 144, 256)) -> TokenFacts:
    return TokenFacts((16, 16), num_bits, 3, ("a", "b", "c"), "0" * 64, num_tokens)


@pytest.mark.parametrize(
    ("num_bits", "groups"), [(12, (6, 6)), (14, (7, 7)), (16, (8, 8)), (18, (6, 12)), (1, (1,)), (5, (2, 3))]
)
def test_groups_follow_the_tokens_unless_they_are_ones_own(num_bits: int, groups: tuple[int, ...]) -> None:
    assert usual_groups(num_bits) == groups
    for name in ("l_256", "emoji_64"):
        fitted = fit_model(presets.generator(name), facts(num_bits)).model
        assert (fitted.num_bits, fitted.groups) == (num_bits, groups)
    run = presets.generator("emoji_64")
    own = replace(run, model=replace(run.model, num_bits=12, groups=(3, 9)))
    assert fit_model(own, facts(12)).model.groups == (3, 9)
    if num_bits != 12:
        with pytest.raises(ConfigError, match=rf"sum to the tokens' {num_bits} bits, got \(3, 9\)"):
            fit_model(own, facts(num_bits))


def test_the_asked_k_is_one_that_is_trained() -> None:
    run = presets.generator("emoji_64")
    assert run.model.num_tokens == 144
    for counts, own in (
        ((64, 144, 256), 144),
        ((64, 256), 64),
        ((100, 256), 100),
        ((100, 188), 100),
        ((16, 36, 64), 36),
        ((196, 256), 256),
    ):
        fitted = fit_model(run, facts(12, counts))
        assert (fitted.model.num_tokens, fitted.loop.val_num_tokens) == (own, (own,))
        assert fitted.model.trained_num_tokens == (counts[0], counts[-1])
        assert fit_model(fitted, facts(12, counts)) == fitted


def test_every_field_of_a_generators_run_is_read_somewhere() -> None:
    root = Path(mergevq.__file__).parent
    code = "\n".join(
        p.read_text() for p in root.rglob("*.py") if not p.name.endswith(("config.py", "presets.py", "release.py"))
    )
    own = "\n".join((root / name).read_text() for name in ("generator/config.py", "training/generator_config.py"))

    def names(cls: type) -> set[str]:
        hints = get_type_hints(cls)
        found: set[str] = set()
        for f in fields(cls):
            found |= names(hints[f.name]) if is_dataclass(hints[f.name]) else {f.name}
        return found

    unread = {n for n in names(GeneratorRun) if f".{n}" not in code and f'"{n}"' not in code}
    # Read through a property.
    assert unread <= {n for n in ("kv_heads", "ffn_multiple") if f"self.{n}" in own}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_discriminator_too_deep_for_the_images_is_refused(layers: int) -> None:
    network = PatchDiscriminator(1, layers)
    run = presets.tiny()
    weights = replace(run.loss.weights, adversarial=0.1)
    loss = replace(run.loss, weights=weights, disc_channels=1, disc_layers=layers)
    loop = replace(run.loop, num_tokens=(1,), val_num_tokens=(1,))
    accepted, works = [], []
    for side in range(4, 40, 4):
        try:
            replace(run, model=replace(run.model, image_size=side, num_tokens=1), loss=loss, loop=loop)
            accepted.append(side)
        except ConfigError as error:
            assert re.search(
                rf"loss.disc_layers {layers} needs images of at least \d+ pixels, got .* {side}", str(error)
            )
        with suppress(RuntimeError, ValueError):
            # One image in training mode: BatchNorm needs more than one value of each channel too.
            network.train()(torch.zeros(1, 3, side, side))
            works.append(side)
    assert accepted == works
    assert 4 not in works and 36 in works
