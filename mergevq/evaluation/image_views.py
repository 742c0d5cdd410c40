"""What a tokenizer makes of one image, gathered for pictures: tokens, what comes back, where the class token looks."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from mergevq.metrics.image import psnr
from mergevq.tokenizer.class_attention import class_attention
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens


@dataclass(frozen=True, eq=False)
class TokenView:
    """One image as K tokens; everything on the CPU."""

    tokens: MergedTokens
    """Of this image alone, with a source map."""
    drawn: Float[Tensor, "3 H W"]
    """What `decode` returns: not clamped."""
    predicted: bool = False
    """The source map is recovery's."""
    attention: Float[Tensor, "rows columns"] | None = None
    """The class token's attention to each patch in the last block, mean over heads; see `class_attention`. None for
    tokens without an image.
    """
    psnr: float | None = None
    """In dB against the original, where there is one."""

    @property
    def source_index(self) -> Int[Tensor, " L"]:
        """Kept token of each patch."""
        assert self.tokens.source is not None
        return self.tokens.source.index[0]

    @property
    def sizes(self) -> Int[Tensor, " K"]:
        """Patches in each kept token; a predicted map may give a token none."""
        assert self.tokens.source is not None
        return self.tokens.source.sizes()[0]

    @property
    def num_tokens(self) -> int:
        """K."""
        return int(self.tokens.num_tokens[0])

    @property
    def bits(self) -> int:
        """Bits of the indices and of the source map, unless that is predicted."""
        counts = self.tokens.bits_per_image()
        return int(counts.index[0] if self.predicted else counts.total[0])


@dataclass(frozen=True, eq=False)
class ImageView:
    """An image at several K."""

    original: Float[Tensor, "3 H W"]
    views: tuple[TokenView, ...]
    name: str = "original"
    """What pictures call the image."""


def view_image(
    tokenizer: MergeVQ, image: Float[Tensor, "3 H W"], num_tokens: Sequence[int], *, name: str = "original"
) -> ImageView:
    """Returns what the tokenizer makes of an image at each K.

    Args:
        tokenizer: the model.
        image: in [-1, 1]; the downsampling divides H and W.
        num_tokens: one or several K.
        name: what pictures call the image.

    Raises:
        ShapeError: image or num_tokens are not as described.
    """
    views = []
    for k in num_tokens:
        tokens = tokenizer.encode(image[None], k)
        drawn = tokenizer.decode(tokens).cpu()
        attention = class_attention(tokenizer, image[None], k)[0].mean(0).cpu()
        quality = float(psnr(drawn, image[None].cpu()))
        views.append(TokenView(tokens.to("cpu"), drawn[0], False, attention, quality))
    return ImageView(image.cpu(), tuple(views), name)


def view_tokens(tokenizer: MergeVQ, tokens: MergedTokens) -> list[TokenView]:
    """Returns one view for each image of tokens that come from a file or a generator.

    Tokens without a source map get the one that the recovery model predicts.

    Args:
        tokenizer: the model that made the tokens.
        tokens: any number of images, each with its own K.

    Raises:
        CheckpointError: there is no source map, and the tokenizer has no recovery.
        TokenFileError: another tokenizer made the tokens.
    """
    predicted = tokens.source is None
    drawn = tokenizer.decode(tokens).cpu()
    placed = (tokenizer.recover(tokens) if predicted else tokens).to("cpu")
    return [TokenView(placed[i], drawn[i], predicted) for i in range(len(placed))]
