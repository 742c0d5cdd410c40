"""The crops of training: which part of the image they show, and that every draw is the generator's."""

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.augment import Views, alignment_views, sample_rng, training_crops
from mergevq.errors import ConfigError


def coordinates(width: int, height: int) -> Image.Image:
    """Red is the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def corners(image: Image.Image) -> tuple[int, int, int, int]:
    pixels = np.asarray(image).astype(int)
    return pixels[0, 0, 0], pixels[0, 0, 1], pixels[-1, -1, 0], pixels[-1, -1, 1]


def test_random_and_middle_squares() -> None:
    image = coordinates(60, 40)
    assert corners(training_crops(image, Views(40, crop="center"), sample_rng(0, 0, 0))["image"]) == (10, 0, 49, 39)
    lefts = set()
    for number in range(300):
        left, top, right, bottom = corners(training_crops(image, Views(40), sample_rng(0, 0, number))["image"])
        assert (top, bottom, right - left) == (0, 39, 39)
        lefts.add(left)
    assert lefts == set(range(21))


def test_half_of_the_images_are_mirrored_if_asked() -> None:
    image = coordinates(40, 40)
    for flip, least, most in ((False, 0, 0), (True, 70, 130)):
        views = Views(40, flip=flip)
        crops = [training_crops(image, views, sample_rng(1, 2, number))["image"] for number in range(200)]
        mirrored = sum(corners(crop)[0] > corners(crop)[2] for crop in crops)
        assert least <= mirrored <= most
        assert {corners(crop) for crop in crops} == {(0, 0, 39, 39), (39, 0, 0, 39)} if flip else {(0, 0, 39, 39)}


@pytest.mark.parametrize(("width", "height"), [(200, 120), (64, 64)])
def test_student_view_shows_parts_of_the_stated_areas_and_ratios(width: int, height: int) -> None:
    image = coordinates(width, height)
    areas, ratios, mirrored = [], [], 0
    for number in range(400):
        crop = training_crops(image, Views(32, student=56), sample_rng(3, 0, number))["view_student"]
        assert crop.size == (56, 56)
        left, top, right, bottom = corners(crop)
        mirrored += left > right
        # The centres of the outer pixels are half an output pixel inside the part.
        wide, tall = (abs(right - left) * 56 / 55, (bottom - top) * 56 / 55)
        areas.append(wide * tall / (width * height))
        ratios.append(wide / tall)
    assert 0.04 < min(areas) < 0.2 and 0.7 < max(areas) <= 1.1
    assert 0.65 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.55
    # Large parts often do not fit into a wide image and are drawn again.
    assert (0.45 if width == height else 0.3) < np.mean(areas) < 0.6 and 140 < mirrored < 260


def test_strips_give_views_too() -> None:
    for size in ((300, 4), (4, 300), (1, 1)):
        crops = training_crops(coordinates(*size), alignment_views(64, 8), sample_rng(0, 0, 0))
        sizes = {name: crop.size for name, crop in crops.items()}
        assert sizes == {"image": (64, 64), "view_student": (56, 56), "view_teacher": (64, 64)}


def test_teacher_view_is_never_mirrored_and_has_its_own_place() -> None:
    image = coordinates(80, 40)
    places = []
    for number in range(50):
        crops = training_crops(image, Views(40, flip=True, teacher=40), sample_rng(0, 0, number))
        left, _, right, _ = corners(crops["view_teacher"])
        assert right - left == 39
        places.append((min(corners(crops["image"])[::2]), left))
    assert sum(one == other for one, other in places) < 10


def test_alignment_does_not_change_the_image() -> None:
    image = coordinates(80, 50)
    alone = training_crops(image, Views(40, flip=True), sample_rng(5, 6, 7))
    with_views = training_crops(image, alignment_views(40, 8, flip=True), sample_rng(5, 6, 7))
    assert set(alone) == {"image"} and set(with_views) == {"image", "view_student", "view_teacher"}
    assert alone["image"].tobytes() == with_views["image"].tobytes()


@pytest.mark.parametrize("crop", ["random", "center"])
def test_image_and_teacher_view_are_cut_from_one_resized_image(crop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image, resize, resized = coordinates(170, 110), Image.Image.resize, []
    apart = training_crops(image, Views(40, crop), sample_rng(5, 6, 7))

    def counted(self: Image.Image, size: tuple[int, int], *options: object) -> Image.Image:
        resized.append(size)
        return resize(self, size, *options)

    monkeypatch.setattr(Image.Image, "resize", counted)
    crops = training_crops(image, Views(40, crop, student=32, teacher=40), sample_rng(5, 6, 7))
    assert resized == [(62, 40), (32, 32)]
    assert crops["image"].tobytes() == apart["image"].tobytes()
    whole = np.asarray(resize(image, (62, 40), Image.Resampling.BICUBIC))
    view = np.asarray(crops["view_teacher"])
    assert any(np.array_equal(whole[:, left : left + 40], view) for left in range(23))


@pytest.mark.parametrize(
    ("size", "downsampling", "student"),
    [(256, 16, 224), (256, 8, 224), (128, 16, 112), (64, 4, 56), (48, 16, 48), (8, 8, 8)],
)
def test_student_side_is_seven_eighths_of_the_size(size: int, downsampling: int, student: int) -> None:
    views = alignment_views(size, downsampling)
    assert (views.size, views.student, views.teacher) == (size, student, size)


def test_the_generator_depends_on_every_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0, 1), (-1, 0, 0), (2**40, 0, 0)]
    draws = [tuple(torch.rand(4, generator=sample_rng(*key)).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert draws[3] == tuple(torch.rand(4, generator=sample_rng(1, 0, 0)).tolist())
    training_crops(coordinates(50, 40), alignment_views(40, 8, flip=True), sample_rng(0, 0, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_impossible_sizes() -> None:
    with pytest.raises(ConfigError, match="at least 1 pixel"):
        Views(0)


def test_a_training_image_may_be_a_random_part() -> None:
    """The law of the student's view, and mirrored only if asked."""
    image = coordinates(100, 60)
    for number in range(50):
        part = training_crops(image, Views(32, crop="part", teacher=32), sample_rng(3, 0, number))
        view = training_crops(image, Views(1, crop="center", student=32), sample_rng(3, 0, number))["view_student"]
        left, top, right, bottom = corners(part["image"])
        assert left < right and top < bottom
        assert {left, right} == {corners(view)[0], corners(view)[2]} and (top, bottom) == corners(view)[1::2]
        assert part["view_teacher"].size == (32, 32)


def test_distortions_are_the_generators_and_come_after_the_crop() -> None:
    image = coordinates(60, 40)
    before = torch.get_rng_state()
    views = Views(40, rand_augment=2)
    crops = [np.asarray(training_crops(image, views, sample_rng(0, 0, n))["image"]) for n in range(12)]
    again = [np.asarray(training_crops(image, views, sample_rng(0, 0, n))["image"]) for n in range(12)]
    plain = [np.asarray(training_crops(image, Views(40), sample_rng(0, 0, n))["image"]) for n in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(crops, again, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    # Some operations change nothing, but rarely both.
    assert sum(not np.array_equal(a, b) for a, b in zip(crops, plain, strict=True)) >= 9
    with pytest.raises(ConfigError, match="rand_augment"):
        Views(40, rand_augment=-1)
