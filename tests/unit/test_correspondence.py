"""Pairs of tokens of two images: the search, the model's features, the picture."""

import pytest
import torch
from torch import Tensor

from mergevq.data.embedded import EmbeddedImages
from mergevq.data.images import stack_images
from mergevq.errors import ShapeError
from mergevq.evaluation.correspondence import Correspondence, correspond, draw_correspondence
from mergevq.merging import SourceMap, merge_schedule
from mergevq.metrics.correspondence import Matches, mutual_matches
from mergevq.tokenizer.model import MergeVQ


def _random(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))


def test_pairs_are_all_that_are_each_others_nearest() -> None:
    a, b = _random(30, 0), _random(40, 1)
    found = mutual_matches(a, b)
    cosine = [[float(torch.dot(x, y) / (x.norm() * y.norm())) for y in b] for x in a]
    expected = {
        (i, j): cosine[i][j]
        for i in range(30)
        for j in range(40)
        if cosine[i][j] == max(cosine[i]) == max(row[j] for row in cosine)
    }
    assert 5 < len(expected) < 30
    pairs = list(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs == sorted(expected, key=lambda pair: -expected[pair])
    torch.testing.assert_close(found.similarity, torch.tensor([expected[pair] for pair in pairs]).double())


def test_lengths_do_not_matter_and_neither_does_which_set_is_first() -> None:
    a, b = _random(20, 2), _random(20, 3)
    found = mutual_matches(a, b)
    scaled = mutual_matches(a * torch.logspace(-3, 3, 20)[:, None], b * 7)
    turned = mutual_matches(b, a)
    for other in ((scaled.first, scaled.second), (turned.second, turned.first)):
        assert torch.equal(found.first, other[0]) and torch.equal(found.second, other[1])


def test_equal_rows_make_one_pair() -> None:
    found = mutual_matches(torch.ones(4, 3), torch.ones(6, 3))
    assert (found.first.tolist(), found.second.tolist()) == ([0], [0])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"one width, got \[2, 3\] and \[2, 4\]"),
        (torch.ones(0, 3), torch.ones(2, 3), "two sets"),
        (torch.ones(2, 3), torch.full((1, 3), torch.nan), "finite features"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_features_are_named(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        mutual_matches(a, b)


@pytest.mark.parametrize("num_tokens", [None, 20])
def test_tokens_are_compared_as_the_encoder_leaves_them(
    tiny_tokenizer: MergeVQ, images: Tensor, num_tokens: int | None
) -> None:
    found = correspond(tiny_tokenizer, images[:2], num_tokens)
    count = num_tokens or 64
    with torch.no_grad():
        schedule = merge_schedule(64, count, 2, "linear", "carry")
        out = tiny_tokenizer.encoder(images[:2], schedule)
    assert torch.equal(found.source.index, out.source)
    expected = mutual_matches(out.tokens[0], out.tokens[1])
    assert all(torch.equal(a, b) for a, b in zip(found.matches, expected, strict=True))
    assert found.num_tokens == count and found.grid == (8, 8)
    paired = [sum(int(t) in tokens for t in index) / 64 for tokens, index in zip(expected, out.source, strict=False)]
    assert found.covered().tolist() == pytest.approx(paired)


def test_the_shipped_tokenizer_finds_where_an_image_went() -> None:
    tok = MergeVQ.from_pretrained("emoji_64")
    data = EmbeddedImages("val")
    right = total = 0
    for number in (7, 50, 120, 200):
        image = stack_images([data[number].image])[0]
        found = correspond(tok, torch.stack([image, image.roll((8, 8), (1, 2))])).matches
        # Two patches down and to the right. White patches, alike everywhere, do not count.
        drawn = image.mean(0).unflatten(0, (16, 4)).unflatten(2, (16, 4)).mean((1, 3)).flatten() < 0.9
        went = (found.second == found.first + 2 * 16 + 2)[drawn[found.first]]
        right, total = right + int(went.sum()), total + len(went)
    assert total > 200 and right / total > 0.85


def _picture(**options: int) -> tuple[Tensor, Correspondence]:
    """2 x 2 patches: tokens 0 (upper row) and 1 of the first image are 1 and 0 of the second; token 2 has no pair."""
    source = SourceMap(torch.tensor([[0, 0, 1, 2], [2, 1, 0, 0]]), torch.tensor([3, 3]))
    matches = Matches(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([0.9, 0.8]))
    found = Correspondence(matches, source, (2, 2))
    picture = draw_correspondence(torch.zeros(2, 3, 8, 8), found, cell=64, gap=16, **options)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(64, 144, 3).long(), found


def test_pairs_share_a_colour_and_the_rest_is_grey() -> None:
    pixels, found = _picture(lines=0)
    # Centres of the patches of both images.
    first, second = ([[pixels[y, x + left].tolist() for x in (16, 48)] for y in (16, 48)] for left in (0, 80))
    assert first[0][0] == first[0][1] == second[0][1]
    assert first[1][0] == second[1][0] == second[1][1]
    assert first[0][0] != first[1][0]
    assert first[1][1] == second[0][0] and len(set(first[1][1])) == 1
    assert len(set(first[0][0])) > 1 and len(set(first[1][0])) > 1
    assert bool((pixels[:, 64:80] == 255).all()), "the gap is white without lines"
    assert found.covered().tolist() == [0.75, 0.75]


def test_lines_join_the_pairs_that_cover_most() -> None:
    gap = _picture(lines=1)[0][:, 70:74]
    rows = (gap != 255).any(2).any(1).nonzero().flatten().tolist()
    # Both pairs cover three patches, so the more similar one: from the upper row to its right patch.
    assert rows and max(rows) < 32
    both = (_picture(lines=2)[0][:, 70:74] != 255).any(2).any(1).nonzero().flatten().tolist()
    assert min(both) < 32 <= max(both)


@pytest.mark.usefixtures("unchecked")
def test_two_images_are_asked_for(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"two images \[2, 3, H, W\] to compare, got \[1, 3, 32, 32\]"):
        correspond(tiny_tokenizer, images[:1])
