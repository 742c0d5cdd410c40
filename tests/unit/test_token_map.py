import pytest
import torch

from mergevq.errors import ShapeError
from mergevq.evaluation.token_map import contact_sheet, draw_token_map, to_pil


def _quarters() -> torch.Tensor:
    """A 3 x 8 x 8 image of four flat quarters, on a 2 x 2 grid of patches."""
    values = torch.tensor([[-1.0, -0.5], [0.5, 1.0]])
    return values.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 8, 8).clone()


def test_each_token_has_the_mean_colour_of_its_patches() -> None:
    picture = draw_token_map(_quarters(), torch.tensor([0, 1, 1, 0]), (2, 2), outline=False)
    # Token 0 owns the patches -1 and 1, token 1 owns -0.5 and 0.5: both average to 0.
    torch.testing.assert_close(picture, torch.zeros(3, 8, 8))
    picture = draw_token_map(_quarters(), torch.tensor([0, 0, 1, 2]), (2, 2), outline=False)
    torch.testing.assert_close(picture[0, ::4, ::4], torch.tensor([[-0.75, -0.75], [0.5, 1.0]]))


def test_the_mean_is_over_pixels_inside_the_patches() -> None:
    image = torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = torch.tensor([0, 1, 1, 0, 2, 1])
    picture = draw_token_map(image, source, (2, 3), outline=False)
    owner = source.reshape(2, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    for token in range(3):
        torch.testing.assert_close(picture[:, owner == token][:, 0], image[:, owner == token].mean(dim=1))


def test_outlines_lie_exactly_where_tokens_meet() -> None:
    source = torch.tensor([0, 0, 1, 2])
    flat = draw_token_map(_quarters(), source, (2, 2), scale=3, outline=False)
    lined = draw_token_map(_quarters(), source, (2, 2), scale=3)
    changed = (flat != lined).any(dim=0)
    expected = torch.zeros(24, 24, dtype=torch.bool)
    expected[12] = True  # between the upper token and the two lower ones
    expected[12:, 12] = True  # between the two lower ones
    assert torch.equal(changed, expected)
    assert lined.abs().max() <= 1


def test_one_token_has_no_outline() -> None:
    lined = draw_token_map(_quarters(), torch.zeros(4, dtype=torch.int64), (2, 2))
    torch.testing.assert_close(lined, torch.zeros(3, 8, 8))


@pytest.mark.parametrize(
    ("source", "grid", "scale", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), (2, 2), 1, "4 patches for a 2 x 2 grid, got 3"),
        (torch.zeros(9, dtype=torch.int64), (3, 3), 1, "3 x 3 grid divides, got 8 x 8"),
        (torch.zeros(4, dtype=torch.int64), (2, 2), 0, "scale of at least 1, got 0"),
    ],
)
def test_wrong_shapes_are_named(source: torch.Tensor, grid: tuple[int, int], scale: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        draw_token_map(_quarters(), source, grid, scale=scale)


def test_to_pil_clamps_and_rounds() -> None:
    image = torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]).expand(3, 1, 5)
    assert [to_pil(image).getpixel((x, 0))[0] for x in (0, 1, 3, 4)] == [0, 0, 255, 255]
    assert to_pil(_quarters(), side=32).size == (32, 32)


def test_contact_sheet_puts_images_where_titles_say() -> None:
    red, blue = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -1.0)
    red[0], blue[2] = 1.0, 1.0
    plain = contact_sheet([[red, blue], [blue]], cell=16, gap=2)
    assert plain.size == (2 + 2 * 18, 2 + 2 * 18)
    assert plain.getpixel((10, 10)) == (255, 0, 0) and plain.getpixel((28, 10)) == (0, 0, 255)
    assert plain.getpixel((10, 28)) == (0, 0, 255) and plain.getpixel((28, 28)) == (255, 255, 255)
    titled = contact_sheet([[red, blue], [blue]], ["K = 4", "K = 2"], ["one", "two"], cell=16, gap=2)
    left, top = titled.width - plain.width, titled.height - plain.height
    assert left > 0 and top > 0
    assert titled.getpixel((left + 10, top + 10)) == (255, 0, 0)
    assert titled.crop((0, 0, titled.width, top)).getextrema() != ((255, 255),) * 3, "titles leave ink above the images"


def test_an_empty_contact_sheet_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one image"):
        contact_sheet([[]])
