"""MergeVQ, the tokenizer: images to merged tokens and back."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.checksum import check_checksum
from mergevq.configuration import check_is
from mergevq.errors import CheckpointError, ShapeError, TokenFileError
from mergevq.files import load_strict, load_tensors
from mergevq.merging import SourceMap, check_num_tokens, merge_schedule, unmerge
from mergevq.model_files import find_model_file
from mergevq.quantize import LFQ, Quantized, codes_to_index, index_to_codes, sign_codes
from mergevq.tokenizer.alignment import AlignmentHead
from mergevq.tokenizer.arithmetic import arithmetic
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.decoder import Decoder
from mergevq.tokenizer.encoder import Encoder, EncoderOutput
from mergevq.tokenizer.features import FeatureKind, PooledFeatures, check_features, choose_features
from mergevq.tokenizer.fingerprint import fingerprint
from mergevq.tokenizer.inputs import check_images, kept_tokens
from mergevq.tokenizer.model_file import read_config, write_model
from mergevq.tokenizer.recovery import SourceRecovery
from mergevq.tokens import MergedTokens


class TokenizerOutput(NamedTuple):
    """What one training forward gives."""

    reconstruction: Float[Tensor, "B 3 H W"]
    quantized: Quantized
    source: Int[Tensor, "B L"]
    recovery_logits: Float[Tensor, "B L K"] | None


class Embedded(NamedTuple):
    """Images as the first attention block takes them: what is the same for every K. `MergeVQ.embed` makes it."""

    tokens: Float[Tensor, "B T D"]
    """The class token, then the L patches."""
    source: Int[Tensor, "B L"]
    """The map before merging: each patch is its own token."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


class MergeVQ(nn.Module):
    """A tokenizer that merges the L patches of an image into K semantic tokens of N bits.

    `encode` returns everything that `decode` needs; the model remembers nothing between calls. K is an argument: any 1
    <= K <= L, per call or per image. Images are float `[B, 3, H, W]` in [-1, 1]; H and W are any multiples of the
    downsampling.

    Args:
        config: what to build; see `mergevq.presets.tokenizer`.

    Reference: Li et al., "MergeVQ: A Unified Framework for Visual Generation and Representation with Disentangled Token
        Merging and Quantization" (CVPR 2025, arXiv 2504.00999).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        check_is(config, TokenizerConfig, "presets.tokenizer(name).model is one; MergeVQ.from_pretrained loads a model")
        super().__init__()
        self.config = config
        quant = config.quantizer
        self.encoder = Encoder(config)
        self.quantizer = LFQ(
            config.num_bits,
            norm=quant.norm,
            temperature=quant.temperature,
            scope=quant.scope,
            groups=quant.groups,
            eps=quant.eps,
        )
        self.decoder = Decoder(config)
        self.recovery = SourceRecovery(config) if config.recovery.enabled else None
        self.alignment = AlignmentHead(config) if config.alignment.enabled else None

    # -------------------------------------------------------------------------------------------------------- inference

    @torch.no_grad()
    def encode(
        self,
        images: Float[Tensor, "B 3 H W"],
        num_tokens: int | Sequence[int] | Int[Tensor, "..."] | None = None,
        dtype: torch.dtype | None = None,
    ) -> MergedTokens:
        """Returns the tokens of the images, with their source map.

        Args:
            images: float in [-1, 1], on any device; the downsampling divides H and W.
            num_tokens: K for all images, or one K per image, 1 .. L; None is `config.num_tokens` (at most L).
            dtype: arithmetic of the networks, for example torch.bfloat16. None is float32, also inside autocast and
                where a GPU would round to TF32: that is how tokens are defined.

        Raises:
            ShapeError: images or num_tokens are not as described, or hold numbers that are not finite.
        """
        grid = check_images(images, self.config.downsampling)
        asked_counts = check_num_tokens(
            self._default_tokens(grid) if num_tokens is None else num_tokens, images.shape[0], grid[0] * grid[1]
        )
        kept = {count: kept_tokens(self.config, grid[0] * grid[1], count) for count in sorted(set(asked_counts))}
        counts = [kept[count] for count in asked_counts]
        device = self.encoder.class_token.device
        index = torch.zeros(len(counts), max(counts), dtype=torch.int64, device=device)
        source = torch.zeros(len(counts), grid[0] * grid[1], dtype=torch.int64, device=device)
        with arithmetic(device, dtype):
            x, identity = self.encoder.embed(self._to_model(images))
            for asked, count in kept.items():
                rows = [b for b, k in enumerate(asked_counts) if k == asked]
                # A slice where all images keep as many: indexing with a list waits for a GPU.
                chosen = slice(None) if len(rows) == len(counts) else rows
                index[chosen, :count], source[chosen] = self._indices(x[chosen], identity[chosen], grid, asked)
        num = torch.tensor(counts, device=device)
        return MergedTokens(index, SourceMap(source, num), grid, self.config.num_bits, self.fingerprint(), num)

    def encode_each(
        self, images: Float[Tensor, "B 3 H W"], num_tokens: Sequence[int], dtype: torch.dtype | None = None
    ) -> tuple[MergedTokens, ...]:
        """Returns `encode(images, k)` for each K of several, running what does not depend on K only once.

        Args:
            images: as for `encode`, and so is `dtype`.
            num_tokens: every K, 1 .. L, in any order.
            dtype: arithmetic of the networks.

        Raises:
            ShapeError: images or num_tokens are not as described, or hold numbers that are not finite.
        """
        embedded = self.embed(images, dtype)
        counts = check_num_tokens(num_tokens, len(num_tokens), embedded.source.shape[1])
        return tuple(self.encode_embedded(embedded, count, dtype) for count in counts)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "B 3 H W"], dtype: torch.dtype | None = None) -> Embedded:
        """Returns what goes into the attention blocks, to encode or to pool it at several K.

        Args:
            images: as for `encode`, and so is `dtype`.
            dtype: arithmetic of the networks.

        Raises:
            ShapeError: images are not as described, or hold numbers that are not finite.
        """
        grid = check_images(images, self.config.downsampling)
        images = self._to_model(images)
        with arithmetic(images.device, dtype):
            return Embedded(*self.encoder.embed(images), grid)

    @torch.no_grad()
    def encode_embedded(self, embedded: Embedded, num_tokens: int, dtype: torch.dtype | None = None) -> MergedTokens:
        """Returns what `encode` does of the images that `embed` was given, at one K.

        Raises:
            ShapeError: K is not in 1 .. L, or the encoder's output is not finite.
        """
        (count,) = check_num_tokens([num_tokens], 1, embedded.source.shape[1])
        with arithmetic(embedded.tokens.device, dtype):
            index, source = self._indices(embedded.tokens, embedded.source, embedded.grid, count)
        num = torch.full((len(index),), index.shape[1], device=index.device)
        return MergedTokens(index, SourceMap(source, num), embedded.grid, self.config.num_bits, self.fingerprint(), num)

    @torch.no_grad()
    def pool_embedded(self, embedded: Embedded, num_tokens: int, dtype: torch.dtype | None = None) -> PooledFeatures:
        """Returns `features` of the kinds class, mean and quantized mean, of the images that `embed` was given.

        Raises:
            ShapeError: K is not in 1 .. L, or the features are not finite.
        """
        (count,) = check_num_tokens([num_tokens], 1, embedded.source.shape[1])
        with arithmetic(embedded.tokens.device, dtype):
            out = self.encoder.keep(embedded.tokens, embedded.source, self._schedule(embedded.grid, count))
            codes = self.quantizer.codes(self.encoder.to_codes(out.tokens))
            pooled = PooledFeatures(
                out.class_token,
                *(choose_features("mean", out.class_token, x, out.source, embedded.grid) for x in (out.tokens, codes)),
            )
        for features in pooled:
            _check_finite(features, "the features")
        return pooled

    @torch.no_grad()
    def decode(self, tokens: MergedTokens) -> Float[Tensor, "B 3 H W"]:
        """Returns images drawn from the tokens alone: the decoder's output, unclamped.

        With `tokens.source` None the recovery model predicts which patches each token covers (all of them in order if K
        = L).

        Raises:
            ShapeError: the tokens have another number of bits.
            TokenFileError: another tokenizer made the tokens.
            CheckpointError: the source is missing and this model has no recovery.
        """
        self._check_tokens(tokens)
        device = self.encoder.class_token.device
        tokens = tokens.to(device)
        with arithmetic(device, None):
            codes = index_to_codes(tokens.index, tokens.num_bits)
            source = tokens.source.index if tokens.source is not None else self._recover(codes, tokens)
            grid_codes = unmerge(codes, source).mT.unflatten(2, tokens.grid)
            out: Tensor = self.decoder(grid_codes)
        _check_finite(out, "the decoder's output")
        return out

    def recover(self, tokens: MergedTokens) -> MergedTokens:
        """Returns the tokens with the source map that the recovery model predicts; a token may get no patch.

        Raises:
            ShapeError: the tokens have another number of bits.
            TokenFileError: another tokenizer made the tokens.
            CheckpointError: this model has no recovery.
        """
        self._check_tokens(tokens)
        tokens = tokens.to(self.encoder.class_token.device)
        with torch.no_grad(), arithmetic(tokens.index.device, None):
            source = self._recover(index_to_codes(tokens.index, tokens.num_bits), tokens)
        return MergedTokens(
            tokens.index,
            SourceMap(source, tokens.num_tokens),
            tokens.grid,
            tokens.num_bits,
            tokens.tokenizer,
            tokens.num_tokens,
        )

    def reconstruct(
        self, images: Float[Tensor, "B 3 H W"], num_tokens: int | Sequence[int] | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Returns `decode(encode(images, num_tokens))`."""
        return self.decode(self.encode(images, num_tokens))

    def features(
        self,
        images: Float[Tensor, "B 3 H W"],
        num_tokens: int | None = None,
        *,
        kind: FeatureKind = "class",
        quantized: bool = False,
    ) -> Float[Tensor, "B F *grid"]:
        """Returns features for probes, `[B, D]`, `[B, 2 D]` (class+mean) or `[B, D, rows, columns]` (patches), not
        normalised. Differentiable.

        Args:
            images: float in [-1, 1].
            num_tokens: K of all images; None merges nothing.
            kind: class token, mean of the tokens by size, both, or one vector a patch; see `FeatureKind`.
            quantized: take the codes, N numbers that are -1 or +1 (straight-through), instead of the semantic tokens
                of width D.

        Raises:
            ShapeError: images or num_tokens are not as described.
            ConfigError: there is no such kind, or `quantized` with the class token, which never is.
        """
        check_features(kind, quantized)
        grid = check_images(images, self.config.downsampling)
        patches = grid[0] * grid[1]
        # In a list of one: all images have the same K here.
        (count,) = check_num_tokens([patches if num_tokens is None else num_tokens], 1, patches)
        out = self._encode(self._to_model(images), count)
        tokens = self.quantizer.codes(self.encoder.to_codes(out.tokens)) if quantized else out.tokens
        features = choose_features(kind, out.class_token, tokens, out.source, grid)
        _check_finite(features, "the features")
        return features

    def align(self, images: Float[Tensor, "B 3 H W"], num_tokens: int | None = None) -> Float[Tensor, "B Dt"]:
        """Returns the alignment head's output, comparable with the teacher's. Differentiable.

        Args:
            images: float in [-1, 1], usually a smaller view.
            num_tokens: K of a full image of `config.image_size`; `config.alignment.view_tokens` decides how many a
                smaller view keeps. None merges nothing.

        Raises:
            ShapeError: images or num_tokens are not as described.
            CheckpointError: this model has no alignment head.
        """
        check_images(images, self.config.downsampling)
        full = self.config.num_patches
        (count,) = check_num_tokens([full if num_tokens is None else num_tokens], 1, full)
        return self.forward_alignment(self._to_model(images), count)

    # --------------------------------------------------------------------------------------------------------- training

    def forward(
        self, images: Float[Tensor, "B 3 H W"], num_tokens: int, recovery_gradient: bool = True
    ) -> TokenizerOutput:
        """Returns what the losses need. Checks nothing; `train_tokenizer` calls it.

        Args:
            images: float in [-1, 1].
            num_tokens: K.
            recovery_gradient: let the recovery logits' gradient pass through the codes into the encoder
                (straight-through).
        """
        out = self._encode(images, num_tokens)
        grid = self._grid(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized = self.quantizer(self.encoder.to_codes(out.tokens.float()))
        codes = quantized.codes
        reconstruction = self.decoder(unmerge(codes, out.source).mT.unflatten(2, grid))
        logits = None
        if self.recovery is not None:
            num = torch.full((images.shape[0],), codes.shape[1], device=images.device)
            logits = self.recovery(codes if recovery_gradient else codes.detach(), num, grid)
        return TokenizerOutput(reconstruction, quantized, out.source, logits)

    def forward_alignment(self, view: Float[Tensor, "B 3 H W"], num_tokens: int) -> Float[Tensor, "B Dt"]:
        """Returns the alignment head's output for a view, given K of the full image. Checks nothing but that there is a
        head.
        """
        if self.alignment is None:
            raise CheckpointError(
                "expected a tokenizer with an alignment head, this one has none (alignment.enabled is false)"
            )
        grid = self._grid(view)
        patches, full = grid[0] * grid[1], self.config.num_patches
        kept = {
            "fraction": max(1, round(num_tokens * patches / full)),
            "all": patches,
            "same_count": patches - (full - num_tokens),
        }[self.config.alignment.view_tokens]
        out = self._encode(view, kept)
        prediction: Tensor = self.alignment(torch.cat([out.class_token[:, None], out.tokens], 1))
        return prediction

    # ------------------------------------------------------------------------------------------------------------ files

    def fingerprint(self) -> str:
        """Returns the SHA-256 of everything the tokens depend on: the encoder's weights and the parts of the
        configuration that shape codes.

        Training the decoder, recovery or alignment further does not change it.
        """
        return fingerprint(self.config, self.encoder)

    def save_pretrained(
        self, path: str | Path, *, step: int = 0, force: bool = False, dtype: torch.dtype | None = None
    ) -> Path:
        """Writes weights and configuration to one `.safetensors` file, atomically; a folder gets `model.safetensors`.
        Returns the file.

        Args:
            path: file ending in .safetensors, or a folder.
            step: optimizer steps the model was trained for, kept in the header.
            force: replace an existing file.
            dtype: of the weights in the file, such as torch.float16 for half the size; None keeps them as they are.
                Rounded weights make another tokenizer, with a fingerprint of its own: encode with the one in the file.

        Raises:
            OutputExistsError: there is a file already.
            ShapeError: a weight is not finite, or is not in `dtype`.
        """
        return write_model(self, Path(path), step, force, dtype)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: torch.device | str = "cpu") -> "MergeVQ":
        """Returns the tokenizer in a file, a folder or a Hugging Face hub repository, in evaluation mode.

        Args:
            name: file ending in .safetensors, a folder with `model.safetensors`, "emoji_64" for the tokenizer that
                comes with the package, or a hub id like `owner/model`.
            device: where to put it.

        Raises:
            CheckpointError: there is no such model, it is damaged or of another kind, or weights are missing,
                unexpected or misshaped.
        """
        path = find_model_file(name)
        tensors, header = load_tensors(path)
        config = read_config(header, path)
        with torch.device("meta"):
            model = cls(config)
        model.to_empty(device="cpu")
        load_strict(model, tensors, str(path))
        check_checksum(header, tensors, path)
        return model.to(device).eval()

    # ---------------------------------------------------------------------------------------------------------- private

    def _encode(self, images: Tensor, num_tokens: int) -> EncoderOutput:
        out: EncoderOutput = self.encoder(images, self._schedule(self._grid(images), num_tokens))
        return out

    def _indices(self, x: Tensor, source: Tensor, grid: tuple[int, int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Returns index [B, K] and source map [B, L] of what the encoder's `embed` returned."""
        out = self.encoder.keep(x, source, self._schedule(grid, num_tokens))
        z = self.quantizer.normalize(self.encoder.to_codes(out.tokens))
        _check_finite(z, "the encoder's output")
        return codes_to_index(sign_codes(z)), out.source.contiguous()

    def _schedule(self, grid: tuple[int, int], num_tokens: int) -> tuple[int, ...]:
        merging = self.config.merging
        return merge_schedule(
            grid[0] * grid[1], num_tokens, self.config.encoder.depth, merging.schedule, merging.overflow
        )

    def _check_tokens(self, tokens: MergedTokens) -> None:
        check_is(tokens, MergedTokens, "encode, load_tokens and generators make them")
        if tokens.num_bits != self.config.num_bits:
            raise ShapeError(
                f"expected tokens of {self.config.num_bits} bits, got {tokens.num_bits}: another tokenizer made them"
            )
        if tokens.tokenizer is not None and tokens.tokenizer != self.fingerprint():
            raise TokenFileError(
                f"expected tokens of tokenizer {self.fingerprint()[:12]}, got tokens of {tokens.tokenizer[:12]}: "
                "decode them with the model that made them"
            )

    def _recover(self, codes: Tensor, tokens: MergedTokens) -> Tensor:
        num_patches = tokens.grid[0] * tokens.grid[1]
        identity = torch.arange(num_patches, device=codes.device).expand(codes.shape[0], -1)
        if codes.shape[1] == num_patches and bool((tokens.num_tokens == num_patches).all()):
            return identity
        if self.recovery is None:
            raise CheckpointError(
                "expected tokens with a source map: this tokenizer has no recovery model that could predict it "
                "(recovery.enabled is false)"
            )
        predicted = self.recovery(codes, tokens.num_tokens, tokens.grid).argmax(-1)
        return torch.where(tokens.num_tokens[:, None] == num_patches, identity, predicted)

    def _to_model(self, images: Tensor) -> Tensor:
        return images.to(self.encoder.class_token.device, torch.float32)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        down = self.config.downsampling
        return images.shape[-2] // down, images.shape[-1] // down

    def _default_tokens(self, grid: tuple[int, int]) -> int:
        return min(self.config.num_tokens, grid[0] * grid[1])


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ShapeError(f"expected finite numbers in {what}, got NaN or infinity: the model's weights are damaged")
