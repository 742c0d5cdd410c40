"""Any common image file becomes the RGB that a viewer shows, and broken ones are named in one line."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mergevq.data.images import (
    center_square,
    image_paths,
    read_image,
    read_images,
    read_readable,
    resize_short_side,
    to_tensor,
    write_images,
)
from mergevq.errors import ConfigError, DataError, OutputExistsError, ShapeError


def gradient(width: int = 24, height: int = 16) -> Image.Image:
    """Red grows to the right, green downwards; blue is constant."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    # What a camera held another way stores: the inverse of the turn that its tag asks for.
    t = Image.Transpose
    stored = {
        2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE,
        6: t.ROTATE_90, 7: t.TRANSVERSE, 8: t.ROTATE_270,
    }  # fmt: skip
    image = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(read_image(tmp_path / "a.png")), pixels(upright))


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_transparency_becomes_white_without_fringes(tmp_path: Path, suffix: str) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)  # black, fully transparent
    rgba[1] = [200, 0, 0, 255]
    rgba[2] = [200, 0, 0, 128]
    path = tmp_path / f"a{suffix}"
    Image.fromarray(rgba).save(path, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    came = pixels(read_image(path))
    assert (came[0] == 255).all() and (came[3] == 255).all()
    assert (came[1] == [200, 0, 0]).all()
    assert np.abs(came[2] - [227, 127, 127]).max() <= 1


def test_grey_with_alpha_and_palette_with_transparency(tmp_path: Path) -> None:
    la = Image.fromarray(np.array([[[0, 0], [90, 255]]], np.uint8), "LA")
    la.save(tmp_path / "la.png")
    assert pixels(read_image(tmp_path / "la.png")).tolist() == [[[255] * 3, [90] * 3]]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for name in ("a.png", "a.gif"):
        palette.save(tmp_path / name, transparency=0)
        assert pixels(read_image(tmp_path / name)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_rgb_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert pixels(read_image(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled_not_cut(tmp_path: Path, name: str) -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    if name.endswith(".pgm"):
        (tmp_path / name).write_bytes(b"P5\n4 1\n65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(tmp_path / name)
    assert pixels(read_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_colour_png(tmp_path: Path) -> None:
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    row = b"\0" + np.array([0, 32896, 65535, 65535, 257, 0], ">u2").tobytes()
    parts = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(row)), png_chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert pixels(read_image(tmp_path / "a.png")).tolist() == [[[0, 128, 255], [255, 1, 0]]]


def test_16_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    header = (2).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, 0, 0, 0, 0])
    row = b"\0" + np.array([1000, 32896], ">u2").tobytes()
    key = png_chunk(b"tRNS", (1000).to_bytes(2, "big"))
    parts = (png_chunk(b"IHDR", header), key, png_chunk(b"IDAT", zlib.compress(row)), png_chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert pixels(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 128]


def test_cmyk_black_and_white_and_other_modes(tmp_path: Path) -> None:
    cmyk = np.zeros((8, 16, 4), np.uint8)
    cmyk[:, 8:, 3] = 255
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "a.jpg", quality=100)
    came = pixels(read_image(tmp_path / "a.jpg"))
    assert came[0, 0].min() >= 250 and came[0, -1].max() <= 5

    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "a.bmp")
    assert pixels(read_image(tmp_path / "a.bmp"))[0, :, 1].tolist() == [0, 255]


def test_floats_are_refused_as_unreadable(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff: cannot read this image: pixels are floats"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff"])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / f"half{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"half\\{suffix}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no such file"), (b"", "another kind"), (b"no image\n" * 99, "another kind")]
)
def test_what_is_no_image(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png.*{reason}"):
        read_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 10_000), value=st.integers(0, 255), suffix=st.sampled_from(["JPEG", "PNG", "GIF", "TIFF"])
)
def test_one_changed_byte_gives_an_image_or_a_data_error(position: int, value: int, suffix: str) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(buffer, suffix, **({"exif": exif} if suffix != "GIF" else {}))
    data = bytearray(buffer.getvalue())
    data[position % len(data)] = value
    try:
        image = read_image(io.BytesIO(bytes(data)), "changed")
    except DataError as error:
        assert str(error).startswith("changed: ") and "\n" not in str(error)
    else:
        assert image.mode == "RGB"


def test_pixels_map_to_minus_one_and_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    assert to_tensor(image).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])


def test_short_side_then_middle() -> None:
    image = gradient(60, 20)
    assert resize_short_side(image, 10).size == (30, 10)
    middle = pixels(center_square(image, 20))
    assert np.array_equal(middle, pixels(image)[:, 20:40])
    assert resize_short_side(gradient(3, 7), 6).size == (6, 14)


def test_reducing_is_antialiased() -> None:
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(pixels(center_square(checks, 16))[4:-4, 4:-4] - 127.5).max() < 3


def test_a_long_strip_does_not_fill_the_memory() -> None:
    assert resize_short_side(Image.new("RGB", (30_000, 1)), 256).size == (16 * 256, 256)


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    for i, name in enumerate(["b/2.png", "a.PNG", "b/10.jpg", ".hidden.png", "notes.txt"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / name)
    names = [p.relative_to(tmp_path).as_posix() for p in image_paths(tmp_path)]
    assert names == ["a.PNG", "b/10.jpg", "b/2.png"]
    red = (read_images(tmp_path, 4)[:, 0, 0, 0] + 1) * 127.5
    assert red.round().tolist() == pytest.approx([50, 100, 0], abs=2)
    backwards = read_images([tmp_path / "b/2.png", tmp_path / "a.PNG"], 4)
    assert ((backwards[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 50]
    assert torch.equal(read_images(tmp_path / "a.PNG", 4)[0], backwards[1])


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    gradient().save(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    assert image_paths(tmp_path) == [tmp_path / "a/x.png", tmp_path / "linked/x.png"]


def test_missing_empty_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing there"):
        image_paths(tmp_path / "none")
    with pytest.raises(DataError, match="got an empty folder"):
        read_images(tmp_path, 8)
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"got 1 other files \(\.heic\)"):
        read_images(tmp_path, 8)
    with pytest.raises(DataError, match="empty list"):
        read_images([], 8)


def test_broken_images_in_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "b.jpg", "c.gif"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"all 3 tried are broken, first .*a\.png: ") as caught:
        read_images(tmp_path, 8)
    assert "\n" not in str(caught.value)
    gradient().save(tmp_path / "d.png")
    assert read_images(tmp_path, 8).shape == (1, 3, 8, 8)
    assert "left out 3 unreadable of 4 images" in caplog.text and "a.png" in caplog.text
    _, kept, unreadable = read_readable(image_paths(tmp_path), 8)
    assert kept == [tmp_path / "d.png"] and [p.name for p in unreadable] == ["a.png", "b.jpg", "c.gif"]
    with pytest.raises(DataError, match=r"b\.jpg"):
        read_images([tmp_path / "d.png", tmp_path / "b.jpg"], 8)


def test_written_images_are_clamped_and_rounded(tmp_path: Path) -> None:
    images = torch.tensor([-3.0, -1.0, -1 + 0.6 / 127.5, 0.0, 1.0, 3.5]).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    paths = write_images(tmp_path / "new", images)
    assert [p.name for p in paths] == [f"{i:04d}.png" for i in range(6)]
    assert [pixels(Image.open(p))[0, 0, 0] for p in paths] == [0, 0, 1, 128, 255, 255]


def test_bytes_survive_a_round_trip(tmp_path: Path) -> None:
    every = torch.arange(256 * 3, dtype=torch.uint8).view(1, 3, 16, 16)
    (path,) = write_images(tmp_path, every / 127.5 - 1)
    back = ((read_images(path, 16) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back, every)


def test_nothing_is_written_over_or_with_nan(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ShapeError, match="1 of 2 images, first number 1"):
        write_images(tmp_path, images)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "0001.png").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"0001\.png"):
        write_images(tmp_path, images.nan_to_num())
    assert [p.name for p in tmp_path.iterdir()] == ["0001.png"] and (tmp_path / "0001.png").read_bytes() == b"mine"
    write_images(tmp_path, images.nan_to_num(), force=True)
    assert Image.open(tmp_path / "0001.png").size == (4, 4)


def test_names_of_written_images(tmp_path: Path) -> None:
    two = torch.zeros(2, 3, 4, 4)
    paths = write_images(tmp_path, two, names=["cats/tom.jpg", "v1.5"])
    assert [p.relative_to(tmp_path).as_posix() for p in paths] == ["cats/tom.png", "v1.5.png"]
    for bad, reason in [
        (["a"], "one name for each of 2"),
        (["a.jpg", "a.png"], "more than once"),
        (["../a", "b"], "inside the output folder"),
        (["/a", "b"], "inside the output folder"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            write_images(tmp_path, two, names=bad)
