"""Crops of a training image: the one to reconstruct, and the two views that align the class token with a teacher.

Every draw comes from the generator that is passed in; `sample_rng` makes one for each sample, so that a sample's crops
depend on nothing but (seed, epoch, its number in the epoch): not on workers, processes or where a run was resumed.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from mergevq.data.images import center_square, resize_short_side
from mergevq.errors import ConfigError

_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class Views:
    """Which crops of an image training needs, and their sides in pixels."""

    size: int
    """Of the image to reconstruct."""
    crop: Literal["part", "random", "center"] = "random"
    """Where that image is cut after the short side was resized; or a random part of it made square, like the student's
    view.
    """
    flip: bool = False
    """Mirror half of the images to reconstruct."""
    rand_augment: int = 0
    """Operations that RandAugment (arXiv 1909.13719, magnitude 9) does to that image; 0 leaves its colours and shapes
    alone.
    """
    student: int = 0
    """Of the encoder's view for alignment; 0 makes none."""
    teacher: int = 0
    """Of the teacher's view; 0 makes none."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.student < 0 or self.teacher < 0:
            raise ConfigError(f"expected sizes of at least 1 pixel, got {self}")
        if self.rand_augment < 0:
            raise ConfigError(f"expected rand_augment to be at least 0, got {self.rand_augment}")


def alignment_views(
    size: int, downsampling: int, crop: Literal["random", "center"] = "random", flip: bool = False
) -> Views:
    """Returns the crops for training with alignment.

    The student's side is 7/8 of `size`, rounded to a multiple of `downsampling` (224 for 256); the teacher's is `size`:
    teachers resize by themselves.
    """
    patches = max(1, math.floor(7 / 8 * size / downsampling + 0.5))
    return Views(size, crop, flip, student=patches * downsampling, teacher=size)


def sample_rng(seed: int, epoch: int, number: int) -> torch.Generator:
    """Returns the CPU generator for sample `number` of an epoch."""
    words = np.random.SeedSequence((seed % 2**64, epoch, number)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def training_crops(image: Image.Image, views: Views, rng: torch.Generator) -> dict[str, Image.Image]:
    """Returns "image" and, if asked for, "view_student" and "view_teacher", each a square RGB image.

    image: short side resized, then a square cut at random or from the middle, or a random part as in view_student;
        perhaps mirrored, perhaps distorted by RandAugment.
    view_student: a random part (8 % to 100 % of the area, sides 3:4 to 4:3) made square, half of them mirrored.
    view_teacher: like image, cut at a place of its own, never mirrored.

    The draws for "image" come first, so alignment does not change it.
    """
    resized = image if views.crop == "part" else resize_short_side(image, views.size)
    if views.crop == "part":
        square = _random_part(image, views.size, rng)
    elif views.crop == "random":
        square = _random_square(resized, views.size, rng)
    else:
        square = center_square(resized, views.size)
    square = _maybe_mirrored(square, rng) if views.flip else square
    crops = {"image": _distorted(square, views.rand_augment, rng) if views.rand_augment else square}
    if views.student:
        crops["view_student"] = _maybe_mirrored(_random_part(image, views.student, rng), rng)
    if views.teacher:
        # Resizing the whole image is what takes the time here, and mostly both are of one size.
        shown = resized if views.teacher == views.size else image
        crops["view_teacher"] = _random_square(shown, views.teacher, rng)
    return crops


def _random_square(image: Image.Image, size: int, rng: torch.Generator) -> Image.Image:
    image = resize_short_side(image, size)
    left, top = _integer(image.width - size, rng), _integer(image.height - size, rng)
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def _random_part(image: Image.Image, size: int, rng: torch.Generator) -> Image.Image:
    width, height = _part_size(image.width, image.height, rng)
    left, top = _integer(image.width - width, rng), _integer(image.height - height, rng)
    # Cut before resizing: the filter must not look outside the part.
    return image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)


def _part_size(width: int, height: int, rng: torch.Generator) -> tuple[int, int]:
    """Draws the sides of a part, its area uniform and its ratio log-uniform."""
    for _ in range(_TRIES):
        area = width * height * _uniform(*_AREA, rng)
        ratio = math.exp(_uniform(math.log(_RATIO[0]), math.log(_RATIO[1]), rng))
        part = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= part[0] <= width and 1 <= part[1] <= height:
            return part
    # A strip, into which few parts fit: as much of it as the ratio allows.
    return max(1, min(width, round(height * _RATIO[1]))), max(1, min(height, round(width / _RATIO[0])))


def _maybe_mirrored(image: Image.Image, rng: torch.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if _integer(1, rng) else image


def _distorted(image: Image.Image, operations: int, rng: torch.Generator) -> Image.Image:
    from torchvision.transforms import InterpolationMode, v2  # Slow to import.

    # torchvision draws from the global generator only.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        distorted: Image.Image = v2.RandAugment(operations, interpolation=InterpolationMode.BILINEAR)(image)
    return distorted


def _integer(largest: int, rng: torch.Generator) -> int:
    return int(torch.randint(largest + 1, (), generator=rng))


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))
