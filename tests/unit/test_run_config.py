"""A run that cannot work is refused before anything is touched."""

from dataclasses import replace

import pytest

from mergevq import presets
from mergevq.errors import ConfigError
from mergevq.training.config import LossConfig, LossWeights


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
        ("loop", {"steps": 0}, "loop.steps must be at least 1"),
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
