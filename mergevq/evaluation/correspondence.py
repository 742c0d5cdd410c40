"""Which tokens of two images mean the same, and a picture of it."""

import colorsys
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.evaluation.token_map import to_pil
from mergevq.merging import SourceMap
from mergevq.metrics.correspondence import Matches, mutual_matches
from mergevq.tokenizer.arithmetic import arithmetic
from mergevq.tokenizer.model import MergeVQ

_FINE = 2  # Lines are drawn this many times larger and scaled down, which smooths them.
_TINT = 0.72  # Share of a pair's colour in its patches; the rest is the image's brightness.


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Pairs of kept tokens of two images of one size."""

    matches: Matches
    """Numbers of kept tokens of the first and of the second image."""
    source: SourceMap
    """Of the two images."""
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def num_tokens(self) -> int:
        """K."""
        return int(self.source.num_tokens[0])

    def covered(self) -> Float[Tensor, " 2"]:
        """Returns the share of each image's patches that lie in a paired token."""
        tokens = (self.matches.first, self.matches.second)
        return torch.stack(
            [torch.isin(index, t).float().mean() for index, t in zip(self.source.index, tokens, strict=True)]
        )


@torch.no_grad()
def correspond(tokenizer: MergeVQ, images: Float[Tensor, "2 3 H W"], num_tokens: int | None = None) -> Correspondence:
    """Returns the pairs of kept tokens that are each other's nearest by the cosine of their semantic tokens.

    Args:
        tokenizer: the model.
        images: two, in [-1, 1]; the downsampling divides H and W.
        num_tokens: K of both; None merges nothing and pairs patches.

    Raises:
        ShapeError: images or num_tokens are not as described.
    """
    if images.ndim != 4 or len(images) != 2:
        raise ShapeError(f"expected two images [2, 3, H, W] to compare, got {list(images.shape)}")
    # As tokens are defined: rounded, or under autocast, features would merge otherwise than `encode`.
    with arithmetic(tokenizer.encoder.class_token.device, None):
        features = tokenizer.features(images, num_tokens, kind="patches").cpu()
    grid = (features.shape[2], features.shape[3])
    encoded = tokenizer.encode(images, grid[0] * grid[1] if num_tokens is None else num_tokens).source
    assert encoded is not None
    source = encoded.to("cpu")
    # All patches of a token have its features.
    first = source.first()[..., None].expand(-1, -1, features.shape[1])
    tokens = features.flatten(2).mT.gather(1, first)
    return Correspondence(mutual_matches(tokens[0], tokens[1]), source, grid)


def draw_correspondence(
    images: Float[Tensor, "2 3 H W"], found: Correspondence, *, cell: int = 320, gap: int = 24, lines: int = 8
) -> Image.Image:
    """Returns both images side by side, the patches of each pair of tokens in one colour, all else in pale grey.

    Hues follow the first image from top to bottom, so a coherent correspondence repeats their order in the second.

    Args:
        images: in [-1, 1].
        found: from `correspond`.
        cell: side of each image in pixels.
        gap: white pixels between the two.
        lines: draw lines between so many pairs, those that cover most patches.
    """
    images, (rows, columns) = images.cpu(), found.grid
    pairs = (found.matches.first, found.matches.second)
    places = [_places(index, tokens, columns) for index, tokens in zip(found.source.index, pairs, strict=True)]
    palette = _palette(places[0][:, 0] * columns + places[0][:, 1])
    sheet = Image.new("RGB", (_FINE * (2 * cell + gap), _FINE * cell), "white")
    for i, (image, index, tokens) in enumerate(zip(images, found.source.index, pairs, strict=True)):
        number = torch.full((found.num_tokens,), -1).scatter(0, tokens, torch.arange(len(tokens)))
        tinted = _tint(image, number[index].reshape(rows, columns), palette, -(-_FINE * cell // min(image.shape[1:])))
        sheet.paste(to_pil(tinted, _FINE * cell), (i * _FINE * (cell + gap), 0))

    pen = ImageDraw.Draw(sheet)
    sizes = found.source.sizes(found.num_tokens)
    weight = sizes[0][pairs[0]] + sizes[1][pairs[1]]
    for pair in weight.argsort(descending=True, stable=True)[:lines].tolist():
        centres = [
            (_FINE * (i * (cell + gap) + (place[1] + 0.5) * cell / columns), _FINE * (place[0] + 0.5) * cell / rows)
            for i, place in enumerate(places[side][pair].tolist() for side in range(2))
        ]
        r, g, b = (round((v + 1) * 127.5) for v in palette[pair].tolist())
        pen.line(centres, "white", 5 * _FINE)
        pen.line(centres, (r, g, b), 3 * _FINE)
        for x, y in centres:
            radius = 6 * _FINE
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), (r, g, b), "white", 2 * _FINE)
    return sheet.resize((2 * cell + gap, cell), Image.Resampling.BOX)


def _places(index: Int[Tensor, " L"], tokens: Int[Tensor, " M"], columns: int) -> Int[Tensor, "M 2"]:
    """Row and column of the patch of each token that is nearest to the middle of its patches."""
    position = torch.arange(len(index))
    grid = torch.stack([position // columns, position % columns], 1)
    places = []
    for token in tokens.tolist():
        inside = grid[index == token]
        places.append(inside[(inside - inside.float().mean(0)).square().sum(1).argmin()])
    return torch.stack(places)


def _palette(order: Int[Tensor, " M"]) -> Float[Tensor, "M 3"]:
    """Colours in [-1, 1], hues evenly spaced in the order given, neighbours of different lightness."""
    rank = order.argsort(stable=True).argsort().tolist()
    colours = [colorsys.hls_to_rgb(0.9 * r / max(1, len(rank)), (0.46, 0.6)[r % 2], 0.8) for r in rank]
    return 2 * torch.tensor(colours) - 1


def _tint(image: Tensor, number: Int[Tensor, "rows columns"], palette: Tensor, scale: int) -> Tensor:
    """The image in grey, enlarged, patches in the colour of their pair (-1 has none), a line where pairs meet."""
    for axis in (0, 1):
        number = number.repeat_interleave(image.shape[1 + axis] // number.shape[axis] * scale, axis)
    grey = image.mean(0).clamp(-1, 1).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    colour = palette.T[:, number.clamp_min(0)]
    picture = torch.where(number >= 0, grey + _TINT * (colour - grey), 0.5 + 0.45 * grey)
    edge = torch.zeros_like(number, dtype=torch.bool)
    for shift in range(1, _FINE + 1):  # As wide as a pixel of the picture in the end.
        edge[shift:] |= number[shift:] != number[:-shift]
        edge[:, shift:] |= number[:, shift:] != number[:, :-shift]
    return torch.where(edge, picture - 0.35 * (picture + 1), picture)
