"""What encoding and decoding loses, at several numbers of kept tokens, in one pass over the images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.configuration import check_seed
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.data.sources import evaluation_images
from mergevq.errors import CheckpointError, ConfigError, ShapeError
from mergevq.evaluation.protocol import PREPARATION, data_name, hardware, now, precision, versions
from mergevq.evaluation.result import Example, ReconstructionReport, Reference
from mergevq.evaluation.tally import Quality, Tally, to_float
from mergevq.layers.pretrained import weights_checksum
from mergevq.losses.perceptual import build_perceptual
from mergevq.merging import check_num_tokens
from mergevq.metrics.distribution import FeatureSet, FeatureStore, frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork, feature_network
from mergevq.metrics.image import WINDOW, to_uint8
from mergevq.tokenizer.inputs import kept_tokens
from mergevq.tokenizer.model import MergeVQ

MOST_EXAMPLES = 64
"""Images kept for pictures at most."""


def evaluate_reconstruction(
    tok: MergeVQ,
    data: str | Path | ImageFolder,
    num_tokens: int | Sequence[int] | None = None,
    *,
    network: str | nn.Module | None = "lite1",
    perceptual: str | nn.Module | None = None,
    predict_source: bool = False,
    size: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    examples: int = 8,
    device: torch.device | str | None = None,
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> ReconstructionReport:
    """Returns how well a tokenizer reconstructs images at each K, and how it was measured. `print` shows a table.

    Each image has its short side resized to `size` (bicubic, antialiased) and its middle cut out. Reconstructions are
    clamped and rounded to bytes before anything is measured. The networks run in float32.

    Args:
        tok: the tokenizer; used in evaluation mode and left in the mode it was in.
        data: a folder, a .zip, a pattern that names several .zip files, "embedded", or a data set. Of a source with
            parts, the held-out part.
        num_tokens: one K or several; None takes the tokenizer's own. A converted tokenizer may keep more: its row and
            a note tell of what it keeps.
        network: features for the distances between all originals and all reconstructions: "inception" (rFID, its
            weights are downloaded once), "lite1" (from a package; another number, under another name), any module from
            images in [-1, 1] to features [B, D], or None.
        perceptual: "lite0", "lpips" (downloaded once), a module called with (reconstruction, image), or None.
        predict_source: also decode with the source map that recovery predicts from the tokens (at K = L, where nothing
            was merged, with the identity).
        size: side in pixels; None takes the size the tokenizer was trained with.
        limit: look at so many images, evenly spread over the data; None takes all.
        batch_size: images at a time.
        examples: images kept for pictures, evenly spread; at most 64.
        device: where to compute; the tokenizer and the networks are moved there. None leaves the tokenizer where it is.
        seed: of the two halves of the originals that are compared with each other, for reference.
        on_images: called after each batch with its number of images.

    Raises:
        ConfigError: `limit`, `examples` or `seed` is out of range, or there is no such network.
        ShapeError: a K or the size is impossible for this tokenizer.
        DataError: the images are missing, or none can be read.
        MissingDependencyError: a network needs a package that is not installed.
        CheckpointError: a network's weights are not here and cannot be downloaded; or a source is to be predicted, and
            the tokenizer has no recovery.
    """
    check_seed(seed)
    images = evaluation_images(data)
    wanted = (num_tokens,) if isinstance(num_tokens, int) else num_tokens or (tok.config.num_tokens,)
    side = tok.config.image_size if size is None else size
    counts = _kept_counts(tok, side, wanted)
    place = torch.device(device) if device is not None else tok.encoder.class_token.device
    features = None if network is None else feature_network(network).to(place)
    distance = build_perceptual(perceptual) if isinstance(perceptual, str) else perceptual
    if limit is not None and limit < 1:
        raise ConfigError(f"expected a limit of at least 1 image, got {limit}")
    if not 0 <= examples <= MOST_EXAMPLES:
        raise ConfigError(
            f"expected 0..{MOST_EXAMPLES} examples, as all are held in memory and in the page, got {examples}"
        )
    if predict_source and tok.recovery is None:
        raise CheckpointError(
            "expected a tokenizer with a recovery model to predict source maps, this one has none: train one with "
            "`mergevq train recovery`"
        )
    total = min(len(images), limit or len(images))
    shown = {i * total // examples for i in range(examples)} if examples else set()
    run = _Pass(
        tok.to(place),
        {asked: Tally(kept, tok.config.num_bits, predict_source) for kept, asked in counts.items()},
        features,
        None if distance is None else distance.to(place).eval(),
        [],
        FeatureStore(),
    )
    was_training = tok.training
    tok.eval()
    try:
        seen, workers = 0, 2 if total > 256 else 0
        for batch in evaluation_batches(images, side, batch_size=batch_size, limit=limit, workers=workers):
            picked = [i for i in range(len(batch["image"])) if seen + i in shown]
            run.measure(batch["image"].to(place), picked)
            seen += len(batch["image"])
            if on_images is not None:
                on_images(len(batch["image"]))
    finally:
        tok.train(was_training)

    originals = FeatureSet(run.originals.features) if features is not None and seen >= 2 else None
    reference = None if originals is None or seen < 4 else two_halves(originals.features, seed)
    protocol = {
        "data": data_name(data, images),
        "images": seen,
        "images_unreadable": total - seen,
        "images_available": len(images),
        "fingerprint": images.fingerprint(),
        "image_size": side,
        "preparation": PREPARATION,
        "reference_set": "the originals of the reconstructions",
        "rounding": "reconstructions clamped to [-1, 1] and rounded to bytes",
        "ssim": f"Gaussian {WINDOW} x {WINDOW}, sigma 1.5, no padding, mean over channels",
        "network": None if features is None else {"name": features.name, "sha256": features.checksum},
        "perceptual": None if distance is None else perceptual_facts(perceptual, distance),
        "tokenizer": tok.fingerprint(),
        "decoder": weights_checksum(tok.decoder),
        "recovery": weights_checksum(tok.recovery) if predict_source and tok.recovery is not None else None,
        "num_patches": run.grid[0] * run.grid[1],
        "num_bits": tok.config.num_bits,
        "precision": precision(place),
        "batch_size": batch_size,
        "seed": seed,
        "hardware": hardware(place),
        "versions": versions(),
    }
    return ReconstructionReport(
        rows=tuple(tally.row(originals) for tally in run.tallies.values()),
        reference=reference,
        protocol=protocol,
        notes=_notes(seen, total, side, features, reference, counts),
        grid=run.grid,
        examples=tuple(run.examples),
    )


def _kept_counts(tok: MergeVQ, side: int, wanted: Sequence[int]) -> dict[int, int]:
    """Returns each K that the tokenizer keeps of images of `side`, the largest first, with the one to ask for."""
    step = tok.config.downsampling
    if side < step or side % step:
        raise ShapeError(f"expected a size that is a multiple of the tokenizer's downsampling {step}, got {side}")
    patches = (side // step) ** 2
    asked = sorted(set(check_num_tokens(list(wanted), len(wanted), patches)))
    # Of several that come to the same, the nearest: the largest, which comes last.
    kept = {kept_tokens(tok.config, patches, k): k for k in asked}
    return dict(sorted(kept.items(), reverse=True))


class _Pass:
    """The pass over the images."""

    def __init__(
        self,
        tok: MergeVQ,
        tallies: dict[int, Tally],
        network: FeatureNetwork | None,
        perceptual: nn.Module | None,
        examples: list[Example],
        originals: FeatureStore,
    ) -> None:
        self.tok, self.tallies, self.network, self.perceptual = tok, tallies, network, perceptual
        self.examples, self.originals = examples, originals
        self.grid = (0, 0)

    @torch.no_grad()
    def measure(self, images: Float[Tensor, "B 3 H W"], picked: Sequence[int]) -> None:
        originals = to_uint8(images)
        if self.network is not None:
            self.originals.update(self.network(originals))
        shown = [Example(images[i].cpu(), {}, {}) for i in picked]
        start = now(images.device)
        embedded = self.tok.embed(images)
        before = now(images.device) - start
        for asked, tally in self.tallies.items():
            k, start = tally.num_tokens, now(images.device)
            tokens = self.tok.encode_embedded(embedded, asked)
            middle = now(images.device)
            decoded = self.tok.decode(tokens)
            # What comes before attention ran once, and is part of encoding at every K.
            tally.seconds.append((len(images), before + middle - start, now(images.device) - middle))
            assert tokens.source is not None
            self.grid = tokens.grid
            drawn = self._compare(tally.known, to_uint8(decoded), originals)
            bits, index = tokens.bits_per_image(), tokens.index.sort(dim=1).values
            tally.codebook.update(tokens.index)
            tally.known.add(
                bits_index=bits.index,
                bits_source=bits.source,
                distinct=(index[:, 1:] != index[:, :-1]).sum(1) + 1,
            )
            for example, i in zip(shown, picked, strict=True):
                example.source_index[k] = tokens.source.index[i].cpu()
                example.reconstruction[k] = to_float(drawn[i].cpu())
            if tally.predicted is not None:
                guess = self.tok.recover(tokens.without_source())
                assert guess.source is not None
                # Tokens of equal index are the same vector to the decoder.
                tally.predicted.add(accuracy=(guess.full_index() == tokens.full_index()).double().mean(1))
                drawn = self._compare(tally.predicted, to_uint8(self.tok.decode(guess)), originals)
                # Without merging there is nothing to see: the map is the identity.
                for example, i in zip(shown, picked if k < tokens.num_patches else (), strict=False):
                    example.predicted_index[k] = guess.source.index[i].cpu()
                    example.predicted[k] = to_float(drawn[i].cpu())
        self.examples += shown

    def _compare(self, quality: Quality, drawn: Tensor, originals: Tensor) -> Tensor:
        """Adds what `drawn` is worth to `quality`, and returns it."""
        quality.compare(drawn, originals, self.perceptual)
        quality.look(drawn, self.network)
        return drawn


def two_halves(originals: Float[Tensor, "n D"], seed: int) -> Reference:
    """Returns how far two random halves of a set are apart.

    Args:
        originals: features, in the order of the data set; at least 4.
        seed: of the halves.
    """
    a, b = map(FeatureSet, halves(originals, seed))
    return Reference(frechet_distance(a, b), kernel_distance(a, b), len(a.features))


def halves(features: Float[Tensor, "n D"], seed: int) -> tuple[Float[Tensor, "h D"], Float[Tensor, "h D"]]:
    """Returns two random halves of features, equally many.

    Args:
        features: one row an image, in the order of the data set.
        seed: of the halves.
    """
    half = len(features) // 2
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:half]], features[order[half : 2 * half]]


def _notes(
    seen: int,
    total: int,
    side: int,
    network: FeatureNetwork | None,
    reference: Reference | None,
    counts: Mapping[int, int],
) -> tuple[str, ...]:
    notes = [
        f"Asked for {asked} tokens, this tokenizer keeps {kept}." for kept, asked in counts.items() if kept != asked
    ]
    if seen < total:
        notes.append(f"{total - seen} of {total} images could not be read and were left out.")
    if network is not None and seen < 2:
        notes.append(f"The distances need at least 2 images, got {seen}: not measured.")
    if network is not None and seen >= 2:
        notes.append(
            f"Fréchet distance of {seen} images on {network.name} ({network.checksum[:12]}); "
            "it falls with their number, so compare at equal numbers only. "
            "The kernel distance, taken for pairs, does not."
        )
    if reference is not None:
        notes.append(
            f"For reference: two halves of the originals, {reference.images} different images of the same kind each, "
            f"are {reference.frechet:.4g} (Fréchet) and {reference.kernel:.4g} (kernel) apart. Copies are 0 apart."
        )
    elif network is not None:
        notes.append(f"The reference, two halves of the originals, needs at least 4 images, got {seen}.")
    if side < WINDOW:
        notes.append(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, got {side}: not measured.")
    return tuple(notes)


def perceptual_facts(given: str | nn.Module | None, network: nn.Module) -> dict[str, str]:
    """Returns what identifies a perceptual distance in a result.

    Args:
        given: as the caller named it.
        network: what that became.
    """
    name = given if isinstance(given, str) else type(network).__name__
    return {"name": name, "sha256": weights_checksum(network)}
