"""Settings of probes. No torch is imported here."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from mergevq.configuration import check_seed, check_types
from mergevq.errors import ConfigError

PROBES = ("knn", "linear", "few-shot")
"""Every probe by name."""


@dataclass(frozen=True)
class LinearConfig:
    """How a linear probe is trained. The defaults are those of the paper's supplement, with a sweep around its rate."""

    optimizer: Literal["adamw", "lbfgs"] = "adamw"
    """adamw: minibatches, a rate that falls to 0 by a cosine. lbfgs: the whole training set to the optimum; it has no
    rate, and weight decay is the weight of the penalty."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Of adamw, at the start. All are trained at once."""
    weight_decays: tuple[float, ...] = ()
    """Each is tried with each rate. Empty: 0 for adamw; for lbfgs 1e-5, 1e-4, 1e-3, 1e-2 and 1e-1."""
    epochs: int = 90
    """Passes of adamw over the training features."""
    batch_size: int = 1024
    """Features in a step of adamw."""
    iterations: int = 300
    """At most, of lbfgs."""

    def __post_init__(self) -> None:
        check_types(self)
        rates, decays = self.learning_rates, self.weight_decays
        if not rates or not 0 < min(rates) <= max(rates) <= 1000 or min(decays, default=0) < 0:
            raise ConfigError(
                f"expected learning rates above 0 and at most 1000 and weight decays of at least 0, got {list(rates)} "
                f"and {list(decays)}"
            )
        if min(self.epochs, self.batch_size, self.iterations) < 1:
            raise ConfigError(
                f"expected epochs, batch_size and iterations of at least 1, got {self.epochs}, {self.batch_size} and "
                f"{self.iterations}"
            )

    def grid(self) -> tuple[tuple[float | None, float], ...]:
        """Returns every pair of learning rate (None for lbfgs) and weight decay that is tried."""
        decays = self.weight_decays or ((0.0,) if self.optimizer == "adamw" else (1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
        rates: tuple[float | None, ...] = self.learning_rates if self.optimizer == "adamw" else (None,)
        return tuple(dict.fromkeys((rate, decay) for decay in decays for rate in rates))


@dataclass(frozen=True)
class ProbeConfig:
    """Which probes are made, and how; the same for every row of a result."""

    probes: tuple[str, ...] = PROBES
    """Of knn, linear and few-shot."""
    ks: tuple[int, ...] = ()
    """Of k-NN. Empty: 1, 10, 20, 100 and 200, as far as there are training images."""
    temperature: float = 0.07
    """Of its votes."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    shots: tuple[int, ...] = ()
    """Labelled images of each class. Empty: 1, 5 and 10, as far as every class has them."""
    draws: int = 10
    """Of the labelled images."""
    held_out: float = 0.1
    """Share of the training images on which k, rate and weight decay are chosen."""
    seed: int = 0
    """Of the held-out share, the order of training, and the draws."""

    def __post_init__(self) -> None:
        check_types(self)
        unknown = next((name for name in self.probes if name not in PROBES), None)
        if unknown is not None or not self.probes or len(set(self.probes)) < len(self.probes):
            near = difflib.get_close_matches(unknown or "", PROBES, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"expected probes of {', '.join(PROBES)}, each once, got {', '.join(self.probes) or 'none'}{hint}"
            )
        if min((*self.ks, *self.shots, self.draws)) < 1 or self.temperature <= 0:
            raise ConfigError(
                f"expected every k, shot and draws of at least 1 and a temperature above 0, got {list(self.ks)}, "
                f"{list(self.shots)}, {self.draws} and {self.temperature}"
            )
        check_seed(self.seed)
        if not 0 < self.held_out < 1:
            raise ConfigError(f"expected a held-out fraction between 0 and 1, got {self.held_out}")
