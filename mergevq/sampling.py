"""Choosing one of a group's numbers from logits: guidance, temperature, top-k, top-p, and a draw by given noise.

Functions on tensors without state and without random generators: the noise comes in as uniform numbers, drawn for each
image from a generator of its own, so that it depends on neither the batch nor the device. Options are Python values,
never data; nothing waits for the device, and every function compiles as one graph.

Order of the steps: guidance, temperature, top-k, top-p, draw, each with a value of its own for each bit group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError

GuidanceSchedule = Literal["constant", "linear", "cosine", "power_cosine", "interval"]

# Shape checkers at run time do not take the int 2 for a float.
Number = float | int

# Logits divided by less than this may leave float32; two that differ at all are then as far apart as for argmax.
_COLD = 1e-8

# Scales in use are below 100. From about 1e36 on guided logits leave float32, and all tokens become the same.
_MOST_GUIDANCE = 1e6


class GroupSampling(NamedTuple):
    """How one bit group is sampled."""

    temperature: float
    top_k: int
    top_p: float
    guidance: float
    """The scale that the schedule is given."""


@dataclass(frozen=True)
class SamplingOptions:
    """How numbers are chosen from logits; temperature, top_k, top_p and guidance are one value, or one a bit group."""

    temperature: Number | Sequence[Number] = 1.0
    """Divides the logits; 0 takes the largest."""
    top_k: int | Sequence[int] = 0
    """Only the k largest logits can be drawn, and what equals the smallest of them; 0 is off."""
    top_p: Number | Sequence[Number] = 1.0
    """Only the most probable that make up this probability can be drawn; 1 is off."""
    guidance: Number | Sequence[Number] = 1.0
    """Scale of classifier-free guidance; 1 is off, 0 is unconditional."""
    schedule: GuidanceSchedule = "constant"
    """How the scale changes from the first token to the last, see `guidance_scale`."""
    power: Number = 1.0
    """Of schedule power_cosine: above 1 guides later."""
    interval: tuple[Number, Number] = (0.0, 1.0)
    """Of schedule interval: where guidance is on, first and last progress."""

    def check(self, num_groups: int) -> None:
        """Checks every value against its range, and their number against the bit groups.

        Raises:
            ConfigError: one is out of range, or there are neither one nor `num_groups` of them.
        """
        for value in _values("temperature", self.temperature, num_groups):
            if not _is_number(value) or value < 0:
                raise ConfigError(f"expected temperature of at least 0 (0 takes the largest), got {value}")
        for value in _values("top_k", self.top_k, num_groups):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"expected top_k to be a whole number of at least 0 (0 is off), got {value}")
        for value in _values("top_p", self.top_p, num_groups):
            if not _is_number(value) or not 0 < value <= 1:
                raise ConfigError(f"expected top_p above 0 and at most 1 (1 is off), got {value}")
        for value in _values("guidance", self.guidance, num_groups):
            if not _is_number(value) or not 0 <= value <= _MOST_GUIDANCE:
                raise ConfigError(
                    f"expected guidance of at least 0 (1 is off, 0 is unconditional) and at most {_MOST_GUIDANCE:g}, "
                    f"got {value}"
                )
        _check_schedule(self.schedule, self.power, self.interval)

    def per_group(self, num_groups: int) -> tuple[GroupSampling, ...]:
        """Returns the values of each bit group, the lowest bits first.

        Raises:
            ConfigError: see `check`.
        """
        self.check(num_groups)
        columns = (
            _values("temperature", self.temperature, num_groups),
            _values("top_k", self.top_k, num_groups),
            _values("top_p", self.top_p, num_groups),
            _values("guidance", self.guidance, num_groups),
        )
        return tuple(GroupSampling(float(t), int(k), float(p), float(g)) for t, k, p, g in zip(*columns, strict=True))

    def branches(self, num_groups: int) -> Literal["conditional", "unconditional", "both"]:
        """Says which logits sampling needs: one branch alone if the scale of every group is 1, or 0, all the time.

        Raises:
            ConfigError: see `check`.
        """
        scales = {group.guidance for group in self.per_group(num_groups)}
        if scales == {1.0}:
            return "conditional"
        return "unconditional" if scales == {0.0} and self.schedule == "constant" else "both"

    def scales(self, num_groups: int, progress: Number) -> tuple[float, ...]:
        """Returns the guidance scale of each bit group at `progress`, 0 for the first token and 1 for the last.

        Raises:
            ConfigError: see `check`, or progress lies outside 0..1.
        """
        return tuple(
            guidance_scale(self.schedule, group.guidance, progress, self.power, self.interval)
            for group in self.per_group(num_groups)
        )


# --------------------------------------------------------------------------------------------------------- guidance


def guidance_scale(
    kind: GuidanceSchedule,
    scale: Number,
    progress: Number,
    power: Number = 1.0,
    interval: tuple[Number, Number] = (0.0, 1.0),
) -> float:
    """Returns the guidance scale at one moment of sampling.

    With s = `scale`, p = `progress` and q = `power`:

    - constant: s.
    - linear: 1 + (s - 1) p, from 1 at the first token to s at the last (MAR, arXiv 2406.11838; RandAR, 2412.01827).
    - cosine: 1 + (s - 1) (1 - cos(pi p)) / 2, the same ends.
    - power_cosine: 1 + (s - 1) (1 - cos(pi p^q)) / 2, the same ends (MDTv2, arXiv 2303.14389; RAR, arXiv 2411.00776).
    - interval: s where interval[0] <= p <= interval[1], elsewhere 1 (arXiv 2404.07724).

    A scale of 1 is 1 for every kind.

    Args:
        kind: one of the above.
        scale: s, at least 0.
        progress: p, 0 for the first token and 1 for the last.
        power: q, above 0; read by power_cosine.
        interval: read by interval.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check_schedule(kind, power, interval)
    if not 0 <= progress <= 1:
        raise ConfigError(f"expected progress in 0..1, got {progress}")
    if kind == "constant":
        weight = 1.0
    elif kind == "linear":
        weight = progress
    elif kind == "interval":
        weight = float(interval[0] <= progress <= interval[1])
    else:
        weight = (1 - math.cos(math.pi * progress ** (power if kind == "power_cosine" else 1.0))) / 2
    return float(scale) if weight == 1 else 1 + (scale - 1) * weight


def guide(
    conditional: Float[Tensor, "*n V"],
    unconditional: Float[Tensor, "*n V"],
    scale: Number | Float[Tensor, ""],
) -> Float[Tensor, "*n V"]:
    """Returns unconditional + scale (conditional - unconditional), in float32.

    A scale of 0 gives the unconditional logits, one of 1 the conditional, both exactly. In compiled code a scale that
    changes from step to step has to be a tensor, for every new number would be a new compilation.

    Reference: classifier-free guidance, arXiv 2207.12598, with scale = 1 + w.
    """
    weight = scale.float() if isinstance(scale, Tensor) else scale
    return torch.lerp(unconditional.float(), conditional.float(), weight)


# ---------------------------------------------------------------------------------------------------------- filters


def filter_logits(
    logits: Float[Tensor, "*n V"], temperature: Number = 1.0, top_k: int = 0, top_p: Number = 1.0
) -> Float[Tensor, "*n V"]:
    """Returns float32 logits divided by the temperature, with -inf for what must not be drawn.

    First temperature, then top-k, then top-p, which counts probability among what top-k leaves.

    Args:
        logits: finite.
        temperature: 0 leaves only the largest logit, the first of equal ones; so does anything below 1e-8, by which
            float32 could not be divided.
        top_k: leaves the k largest, and what equals the smallest of these; 0, or V and more, is off.
        top_p: sorted from the most probable down, drops what comes after the sum has exceeded `top_p`; the most
            probable always stays, and so does the one with which the sum exceeds it. 1 is off.

    Reference: top-p is nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    logits = logits.float()
    if temperature < _COLD:
        largest = logits.argmax(-1, keepdim=True)
        return logits.masked_fill(_positions(logits) != largest, -torch.inf)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        # A stable order: which of equal logits stays must not depend on the device.
        ordered, order = logits.sort(stable=True, dim=-1, descending=True)
        before = F.pad(ordered.softmax(-1).cumsum(-1, dtype=torch.float64)[..., :-1], (1, 0))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(before > top_p, -torch.inf))
    return logits


def draw(logits: Float[Tensor, "*n V"], uniform: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Returns the number at which the distribution function of softmax(logits) first exceeds `uniform`.

    What has probability 0 in float32, -inf above all, is never drawn, whatever `uniform` is in 0..1, both ends
    included. Logits that are not finite otherwise give some number in 0..V-1; it is the caller's to look for them where
    looking does not stop the device.

    Args:
        logits: at least one of each row is not -inf.
        uniform: one number in 0..1 a row; the result follows softmax(logits) if it is uniform there.
    """
    probability = logits.float().softmax(-1)
    # In float64, because thousands of float32 sums lose the rare numbers at the end of the codebook.
    distribution = probability.cumsum(-1, dtype=torch.float64)
    target = uniform.double()[..., None] * distribution[..., -1:]
    # A parallel sum need not be monotone to the last bit, so what cannot be drawn is left out by name, and where the
    # target is the whole sum the last that can be drawn is it.
    possible = probability > 0
    reached = possible & (distribution > target)
    last = torch.where(possible, _positions(logits), 0).amax(-1)
    return torch.where(reached.any(-1), reached.to(torch.uint8).argmax(-1), last)


# -------------------------------------------------------------------------------------------------------- randomness


def image_seeds(rng: torch.Generator | None, count: int) -> list[int]:
    """Returns one seed an image. The first of many images get what few would get, on every device.

    Args:
        rng: on any device, moved on by one draw whatever `count` is; None is torch's own generator of the CPU.
        count: images.
    """
    device = rng.device if rng is not None else torch.device("cpu")
    first = int(torch.randint(2**62, (), generator=rng, device=device))
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(first)).tolist()


def image_uniforms(seed: int, count: int, groups: int) -> Float[Tensor, "{count} {groups}"]:
    """Returns the noise of one image on the CPU: a number in 0..1, 1 excluded, for each draw and each bit group.

    Args:
        seed: the image's own, any integer of 64 bits.
        count: draws; the first of many are what few would be.
        groups: bit groups.

    Raises:
        ConfigError: the seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"expected a seed of at most 64 bits, got {seed}")
    return torch.rand(count, groups, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- details


def _positions(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _values(name: str, value: Number | Sequence[Number], num_groups: int) -> tuple[Number, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, num_groups):
        raise ConfigError(f"expected one {name}, or one for each of the {num_groups} bit groups, got {len(values)}")
    return values * num_groups if len(values) == 1 else values


def _check_schedule(kind: str, power: Number, interval: tuple[Number, Number]) -> None:
    if kind not in get_args(GuidanceSchedule):
        raise ConfigError(f"expected a guidance schedule of {', '.join(get_args(GuidanceSchedule))}, got {kind!r}")
    if not _is_number(power) or power <= 0:
        raise ConfigError(f"expected a guidance power above 0, got {power}")
    if len(interval) != 2 or not all(map(_is_number, interval)) or not 0 <= interval[0] < interval[1] <= 1:
        raise ConfigError(f"expected a guidance interval that increases within 0..1, got {interval}")
