"""Lookup-free quantization (LFQ): codes, indices, bit groups, and the exact entropies.

A token z of N numbers becomes the N signs of z, one entry of a codebook of all 2**N sign vectors that is never stored.
The losses see the soft assignment softmax(2 z.c / temperature) over that codebook. Because the codebook is the full
cube, the softmax is a product of independent bits, P(bit i is set) = sigmoid(4 z_i / temperature). So the entropy of
one token is a sum over bits, and the mean assignment of n tokens is one product of two tables of n x 2**(N/2): exact,
and nothing is ever of size n x 2**N.

Reference: MergeVQ section 3.1 and equation 4; MAGVIT-2 (arXiv 2310.05737) section 3 for the losses.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.errors import ConfigError

Scope = Literal["global", "local", "grouped"]
Norm = Literal["none", "layer"]


class Quantized(NamedTuple):
    """What quantization makes of a batch of tokens. The three scalars are losses; entropies are in nats."""

    codes: Float[Tensor, "B K N"]
    """Exactly -1 or +1; the gradient goes to the quantizer's input unchanged (straight-through)."""
    index: Int[Tensor, "B K"]  # type: ignore[assignment]  # hides tuple.index, which nobody misses
    """0 <= index < 2**N."""
    sample_entropy: Float[Tensor, ""]
    """To be minimised: how undecided the bits of one token are, 0 to N ln 2."""
    codebook_entropy: Float[Tensor, ""]
    """To be maximised: how evenly the codebook is used, 0 to N ln 2."""
    commitment: Float[Tensor, ""]
    """To be minimised: mean squared distance to the codes."""


def sign_codes(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """+1 where z > 0, otherwise -1 (0 included). Carries no gradient."""
    return torch.where(z > 0, 1.0, -1.0).to(z.dtype)


def bits_to_index(bits: Int[Tensor, "*n N"]) -> Int[Tensor, "*n"]:
    """The number whose bit i is `bits[..., i]`; bits are 0 or 1."""
    shift = torch.arange(bits.shape[-1], device=bits.device)
    return (bits.long() << shift).sum(-1)


def index_to_bits(index: Int[Tensor, "*n"], num_bits: int) -> Int[Tensor, "*n N"]:
    """The lowest `num_bits` bits of each index, bit 0 first."""
    shift = torch.arange(num_bits, device=index.device)
    return (index.long()[..., None] >> shift) & 1


def codes_to_index(codes: Float[Tensor, "*n N"]) -> Int[Tensor, "*n"]:
    """Codebook index of each code vector; channel i is bit i, set where the code is positive."""
    return bits_to_index((codes > 0).long())


def index_to_codes(index: Int[Tensor, "*n"], num_bits: int) -> Float[Tensor, "*n N"]:
    """The code vectors (float32, -1 or +1) of codebook indices."""
    return index_to_bits(index, num_bits).float() * 2 - 1


def split_index(index: Int[Tensor, "*n"], groups: Sequence[int]) -> Int[Tensor, "*n G"]:
    """Cuts indices into bit groups, lowest bits first: group g is a number of `groups[g]` bits."""
    parts, start = [], 0
    for size in groups:
        parts.append((index.long() >> start) & (2**size - 1))
        start += size
    return torch.stack(parts, -1)


def join_index(parts: Int[Tensor, "*n G"], groups: Sequence[int]) -> Int[Tensor, "*n"]:
    """Puts bit groups together again; the inverse of `split_index`."""
    index, start = torch.zeros_like(parts[..., 0], dtype=torch.long), 0
    for g, size in enumerate(groups):
        index = index + (parts[..., g].long() << start)
        start += size
    return index


def sample_entropy(
    z: Float[Tensor, "*n N"], temperature: float, weights: Float[Tensor, "*n"] | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of the entropy of their soft assignment, in nats; exact.

    Args:
        z: The numbers right before the sign.
        temperature: Softness of the assignment, above 0.
        weights: How much each token counts in the mean, at least 0; all the same by default.
    """
    with _float32(z):
        # From |logit|, where nothing cancels: H(p) = softplus(-a) + a sigmoid(-a).
        a = (_at_least_float32(z) * (4 / temperature)).abs()
        per_token = (F.softplus(-a) + a * torch.sigmoid(-a)).sum(-1)
        return _mean(per_token, weights)


def codebook_entropy(
    z: Float[Tensor, "*n N"],
    temperature: float,
    weights: Float[Tensor, "*n"] | None = None,
    scope: Scope = "local",
    groups: Sequence[int] = (9, 9),
    eps: float = 0.0,
) -> Float[Tensor, ""]:
    """Entropy of the mean soft assignment of all tokens, in nats; exact unless `scope` is grouped.

    With scope global or grouped all processes of the default process group have to call this, and its backward,
    together; their numbers of tokens may differ. The value is the same on each. Each gets the gradient of the *sum* of
    all processes' losses, so that averaging gradients over processes, as DistributedDataParallel does, gives the
    gradient of one process with the joined batch. Where there is one process nothing is communicated.

    Args:
        z: The numbers right before the sign.
        temperature: Softness of the assignment, above 0.
        weights: How much each token counts in the mean, at least 0; all the same by default.
        scope: local: over these tokens. global: over all processes' tokens. grouped: the sum of the entropies of bit
            groups over all processes' tokens, an upper bound that is blind to dependence between groups.
        groups: Bits of each group, lowest bits first; read when `scope` is grouped.
        eps: Added inside the logarithm. The authors' release uses 1e-5, which is above the 2**-18 of an evenly used
            codebook and so caps the entropy at 11.19 nats.
    """
    if scope == "grouped" and sum(groups) != z.shape[-1]:
        raise ConfigError(f"groups must add up to the {z.shape[-1]} bits of a token, got {tuple(groups)}")
    groups = groups if scope == "grouped" else (z.shape[-1],)
    return _group_entropies(z, temperature, weights, groups, eps, everywhere=scope != "local")


class LFQ(nn.Module):
    """Quantizes each token to its signs and computes the losses that make this work. Has no parameters and no state.

    Computes in float32 whatever the autocast (float64 stays float64): bf16 loses the bits near 0, the only ones with a
    gradient.

    Args:
        num_bits: N, the width of a token; the codebook has 2**N entries.
        norm: layer: LayerNorm over N without parameters right before the sign. none: nothing, as in the release.
        temperature: Softness of the assignment in the entropies; no effect on codes. At 0.01 with |z| near 1 the
            entropies have almost no gradient.
        scope: See `codebook_entropy`. In eval mode no other process is asked, so that one may validate alone.
        groups: Bits of each group, for scope grouped.
        eps: See `codebook_entropy`.

    Raises:
        ConfigError: An option does not make sense.
    """

    def __init__(
        self,
        num_bits: int = 18,
        *,
        norm: Norm = "none",
        temperature: float = 0.01,
        scope: Scope = "global",
        groups: Sequence[int] = (9, 9),
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        if num_bits < 1:
            raise ConfigError(f"num_bits must be at least 1, got {num_bits}")
        if norm not in get_args(Norm):
            raise ConfigError(f"norm must be one of {', '.join(get_args(Norm))}, got {norm!r}")
        if scope not in get_args(Scope):
            raise ConfigError(f"scope must be one of {', '.join(get_args(Scope))}, got {scope!r}")
        if not temperature > 0 or eps < 0:
            raise ConfigError(f"temperature must be above 0 and eps at least 0, got {temperature} and {eps}")
        if scope == "grouped" and (sum(groups) != num_bits or min(groups) < 1):
            raise ConfigError(
                f"scope grouped needs groups of at least 1 bit that add up to num_bits {num_bits}, got {tuple(groups)}"
            )
        self.num_bits = num_bits
        self.norm: Norm = norm
        self.temperature = temperature
        self.scope: Scope = scope
        self.groups = tuple(groups)
        self.eps = eps

    def normalize(self, z: Float[Tensor, "*n N"]) -> Float[Tensor, "*n N"]:
        """What the sign is taken of: z in float32 (or float64), normalised if this quantizer does so."""
        with _float32(z):
            z = _at_least_float32(z)
            return F.layer_norm(z, z.shape[-1:]) if self.norm == "layer" else z

    def codes(self, z: Float[Tensor, "*n N"]) -> Float[Tensor, "*n N"]:
        """The codes alone, without the losses: exactly -1 or +1, with the gradient of `normalize` (straight-through).

        Args:
            z: Tokens before the sign and before `normalize`.
        """
        return _straight_through(self.normalize(z))

    def forward(self, z: Float[Tensor, "B K N"], weights: Float[Tensor, "B K"] | None = None) -> Quantized:
        """Quantizes tokens.

        The per-token entropy and the commitment are means over this process's tokens. Averaged over processes, every
        process counts the same whatever its number of tokens, as with all other losses that are means.

        Args:
            z: Tokens before the sign and before `normalize`.
            weights: How much each token counts in the three losses, at least 0; all the same by default, and 0 leaves
                a token out.
        """
        z = self.normalize(z)
        codes = _straight_through(z)
        signs = codes.detach()
        groups = self.groups if self.scope == "grouped" else (self.num_bits,)
        everywhere = self.training and self.scope != "local"
        return Quantized(
            codes=codes,
            index=codes_to_index(signs),
            sample_entropy=sample_entropy(z, self.temperature, weights),
            codebook_entropy=_group_entropies(z, self.temperature, weights, groups, self.eps, everywhere),
            commitment=_mean((z - signs).square().mean(-1), weights),
        )

    def extra_repr(self) -> str:
        """The options, for printing a model."""
        return f"num_bits={self.num_bits}, norm={self.norm}, temperature={self.temperature}, scope={self.scope}"


def _straight_through(z: Tensor) -> Tensor:
    # Adding z - z = 0 keeps the codes exactly -1 and +1; z + (signs - z) would only come close.
    return sign_codes(z.detach()) + (z - z.detach())


def _group_entropies(
    z: Tensor, temperature: float, weights: Tensor | None, groups: Sequence[int], eps: float, everywhere: bool
) -> Tensor:
    """Sum over bit groups of the entropy of their mean soft assignment, over the tokens of one or of all processes."""
    with _float32(z):
        logits = (_at_least_float32(z) * (4 / temperature)).flatten(0, -2)
        weight = logits.new_ones(len(logits)) if weights is None else weights.to(logits.dtype).flatten()
        sums = [_assignment_sum(part, weight) for part in torch.split(logits, list(groups), dim=1)]
        total = weight.sum()
        if everywhere and _num_processes() > 1:
            joined = _sum_over_processes(torch.cat([*sums, total[None]]))
            *sums, total = torch.split(joined, [2**size for size in groups] + [1])
        return torch.stack([_entropy(s / total, eps) for s in sums]).sum()


def _assignment_sum(logits: Tensor, weight: Tensor) -> Tensor:
    """[n, m] bit logits, [n] weights -> [2**m], the weighted sum over tokens of the bits' joint distribution."""
    half = logits.shape[1] // 2
    # sigmoid(-x), not 1 - sigmoid(x): the small probabilities stay exact.
    on, off = torch.sigmoid(logits), torch.sigmoid(-logits)
    low = _joint_table(on[:, :half], off[:, :half])
    high = _joint_table(on[:, half:], off[:, half:])
    return ((high * weight[:, None]).T @ low).flatten()


def _joint_table(on: Tensor, off: Tensor) -> Tensor:
    """[n, m] probabilities of each bit -> [n, 2**m] probabilities of all their values, bit 0 lowest."""
    num_bits = on.shape[1]
    if num_bits == 0:
        return on.new_ones(len(on), 1)
    if num_bits == 1:
        return torch.cat([off, on], 1)
    half = num_bits // 2
    low, high = _joint_table(on[:, :half], off[:, :half]), _joint_table(on[:, half:], off[:, half:])
    return (high[:, :, None] * low[:, None, :]).flatten(1)


def _entropy(p: Tensor, eps: float) -> Tensor:
    # xlogy has the gradient -inf at p = 0, which underflow reaches. Clamped, the value is the same and the gradient
    # finite.
    log = (p + eps).log() if eps > 0 else p.clamp_min(torch.finfo(p.dtype).tiny).log()
    return -(p * log).sum()


def _mean(per_token: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return per_token.mean()
    weights = weights.to(per_token.dtype)
    return (per_token * weights).sum() / weights.sum()


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _float32(z: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off where there is one (the meta device has none)."""
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _num_processes() -> int:
    return (
        torch.distributed.get_world_size()
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else 1
    )


def _sum_over_processes(x: Tensor) -> Tensor:
    return cast(Tensor, _SumOverProcesses.apply(x))  # type: ignore[no-untyped-call]


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce with the gradient of the sum of all processes' losses: the sum forward and the sum backward.

    Averaging gradients divides by the number of processes later, so the identity as backward would lose that factor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total
