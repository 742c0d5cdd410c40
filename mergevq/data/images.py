"""Image files to tensors and back: any common format becomes 8-bit RGB, and tensors become PNG files.

`read_images` and `write_images` are the two ends of the package; `read_image` and `to_tensor` are the steps in between.
"""

import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mergevq.errors import ConfigError, DataError, ShapeError
from mergevq.files import atomic_write, refuse_existing

_log = logging.getLogger("mergevq")

_WEB = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".avif", ".jp2", ".j2k"}
_PLAIN = {".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"}
SUFFIXES = frozenset(_WEB | _PLAIN)
"""Endings of the files that are taken for images, in lower case."""

# A strip longer than this many times its width is cut at both ends: resized whole it could fill the memory.
_MAX_ASPECT = 16


# ---------------------------------------------------------------------------------------------------------- reading


def read_image(source: str | Path | io.BytesIO, name: str | None = None) -> Image.Image:
    """Returns one image as 8-bit RGB, upright, its transparent parts white.

    Turns it as its EXIF orientation says; takes grey, palette, CMYK and 16-bit images (scaled to 8 bits) and the first
    frame of an animation. Colour profiles are ignored.

    Args:
        source: a path, or the bytes of a file.
        name: what errors call the image; the path by default.

    Raises:
        DataError: there is no such file, or it cannot be decoded whole.
    """
    name = str(name or source)
    try:
        with Image.open(source) as image:
            image.load()
            return _to_rgb(_upright(image))
    except FileNotFoundError:
        raise DataError(f"{name}: expected an image file, but there is no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: expected an image file, got a folder: name the images in it") from None
    except UnidentifiedImageError:
        raise DataError(f"{name}: expected an image, got a file of another kind or a damaged one") from None
    except Exception as error:  # Decoders fail in many ways on damaged files (SyntaxError, struct.error, ...).
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: cannot read this image: {reason}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Broken metadata do not make the pixels unreadable.
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise DataError("pixels are floats of unknown range: convert the image to 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255. Pillow's own conversion would cut everything above 255 off."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(
            f"pixels must lie in 0..65535, got {pixels.min()}..{pixels.max()}: convert the image to 8 or 16 bits"
        )
    grey = np.round(pixels / 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[pixels == key] = 255
    return Image.fromarray(grey)


def image_paths(folder: str | Path) -> list[Path]:
    """Returns the image files in `folder` and its subfolders, sorted by their path relative to it.

    Files count by their ending (`SUFFIXES`); hidden ones do not.

    Raises:
        DataError: the folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        came = "a file" if folder.exists() else "nothing there"
        raise DataError(f"expected a folder of images at {folder}, got {came}")
    found: list[str] = []
    others: dict[str, int] = {}
    try:
        names = list(_walk(folder, "", ()))
    except OSError as error:
        raise DataError(f"cannot list the images in {folder}: {error.strerror} ({error.filename})") from error
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES:
            found.append(name)
        else:
            others[suffix or "no ending"] = others.get(suffix or "no ending", 0) + 1
    if not found:
        came = f"{sum(others.values())} other files ({', '.join(sorted(others)[:5])})" if others else "an empty folder"
        raise DataError(f"expected images (.jpg, .png, .webp, ...) in {folder}, got {came}")
    return [folder / name for name in sorted(found)]


def holds_files(folder: str | Path) -> bool:
    """Says whether there is a file in `folder` or its subfolders that is not hidden."""
    return next(_walk(Path(folder), "", ()), None) is not None


def _walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Names of all files below, with slashes. Follows links, but not in circles."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))
            elif entry.is_file():
                yield prefix + entry.name


def read_images(source: str | Path | Sequence[str | Path], size: int) -> Float[Tensor, "B 3 S S"]:
    """Returns images as floats in [-1, 1]: short side resized to `size` (bicubic, antialiased), then centre-cropped.

    Args:
        source: a folder (its images in sorted order; unreadable ones are left out and named in a log line), one file,
            or several files (in the given order; an unreadable one is an error).
        size: side of the result in pixels.

    Raises:
        DataError: the folder is missing, empty or holds broken images only, or a named file cannot be read.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        images, _, _ = read_readable(image_paths(source), size)
        return images
    paths = [source] if isinstance(source, str | Path) else list(source)
    if not paths:
        raise DataError("expected at least one image file, got an empty list")
    return stack_images([center_square(read_image(path), size) for path in paths])


def read_readable(paths: Sequence[Path], size: int) -> tuple[Float[Tensor, "B 3 S S"], list[Path], dict[Path, str]]:
    """Reads what can be read, as `read_images` does.

    Returns:
        The images, the paths they came from, and why each of the others could not be read.

    Raises:
        DataError: none of the files can be read.
    """
    images: list[Image.Image] = []
    kept: list[Path] = []
    unreadable: dict[Path, str] = {}
    for path in paths:
        try:
            images.append(center_square(read_image(path), size))
            kept.append(path)
        except DataError as error:
            unreadable[path] = str(error)
    if not images:
        raise DataError(all_unreadable(len(unreadable), next(iter(unreadable.values()), "nothing was given")))
    if unreadable:
        _log.warning(
            "left out %d unreadable of %d images, first %s",
            len(unreadable),
            len(paths),
            next(iter(unreadable.values())),
        )
    return stack_images(images), kept, unreadable


def all_unreadable(tried: int, first: str) -> str:
    """Returns the message for a source in which no image could be read."""
    return f"expected readable images, but all {tried} tried are broken, first {first}"


# --------------------------------------------------------------------------------------------------- size and tensor


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Returns the image with its short side `size` pixels long (bicubic, antialiased), the long one in proportion.

    Strips longer than 16 times their width are cut at both ends first.
    """
    width, height = image.size
    limit = _MAX_ASPECT * min(width, height)
    if max(width, height) > limit:
        left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
        image = image.crop((left, top, left + min(width, limit), top + min(height, limit)))
        width, height = image.size
    scale = size / min(width, height)
    target = (max(size, round(width * scale)), max(size, round(height * scale)))
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Returns the middle of the image, its short side resized to `size`, as a square of `size` pixels."""
    if size < 1:
        raise ConfigError(f"expected an image size of at least 1 pixel, got {size}")
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image if image.size == (size, size) else image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Returns an RGB image as float32 in [-1, 1]: byte / 127.5 - 1."""
    return stack_images([image])[0]


def stack_images(images: Sequence[Image.Image]) -> Float[Tensor, "B 3 H W"]:
    """Returns RGB images of one size as float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


# ---------------------------------------------------------------------------------------------------------- writing


def write_images(
    folder: str | Path,
    images: Float[Tensor, "B 3 H W"],
    names: Sequence[str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Writes images as PNG files, each whole or not at all, and returns their paths.

    Args:
        folder: where to; created if need be.
        images: clamped to [-1, 1] and rounded to bytes.
        names: one a file, perhaps with subfolders ("cats/tom.jpg" becomes "cats/tom.png"); by default 0000.png,
            0001.png and so on.
        force: replace files that exist.

    Raises:
        ShapeError: the tensor is of another shape or type, or holds NaN or infinity (nothing is written).
        ConfigError: the names do not fit the images, repeat, or leave the folder.
        OutputExistsError: a file exists already (nothing is written).
    """
    if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ShapeError(f"expected float images [B, 3, H, W] in [-1, 1], got {images.dtype} {list(images.shape)}")
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise ShapeError(
            f"expected finite pixels, got NaN or infinity in {len(bad)} of {len(images)} images, first number {bad[0]}"
        )
    if names is None:
        digits = max(4, len(str(len(images) - 1)))
        names = [f"{i:0{digits}d}.png" for i in range(len(images))]
    paths = [Path(folder) / name for name in _png_names(names, len(images))]
    for path in paths:
        refuse_existing(path, force)
    pixels = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
    for path, image in zip(paths, pixels.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        atomic_write(path, buffer.getvalue())
    return paths


def _png_names(names: Sequence[str], count: int) -> list[str]:
    if len(names) != count:
        raise ConfigError(f"expected one name for each of {count} images, got {len(names)} names")
    result: list[str] = []
    for name in names:
        pure = PurePosixPath(Path(name).as_posix())
        if pure.is_absolute() or ".." in pure.parts or not pure.name:
            raise ConfigError(f"expected file names inside the output folder, got {name!r}")
        png = pure.with_suffix(".png") if pure.suffix.lower() in SUFFIXES else pure.with_name(pure.name + ".png")
        result.append(str(png))
    if len(set(result)) < count:
        twice = next(name for name in result if result.count(name) > 1)
        raise ConfigError(f"expected a different file for each image, got {twice} more than once: rename the images")
    return result
