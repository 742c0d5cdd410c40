"""A token cache holds what `encode` returns, survives being killed, and refuses what is not its own."""

import json
import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import mergevq.files
from mergevq.data.cache_format import CacheSettings
from mergevq.data.cache_writer import write_token_cache
from mergevq.data.folder import ImageFolder
from mergevq.data.images import read_images
from mergevq.data.shard_folder import MANIFEST, UNFINISHED
from mergevq.data.token_cache import TokenCache
from mergevq.data.token_shards import map_shard, save_shard, signed, unsigned
from mergevq.errors import ConfigError, DataError, OutputExistsError, ShapeError, TokenFileError
from mergevq.merging import merge_schedule
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ

COUNT, BROKEN = 11, 5
OPTIONS: dict[str, Any] = {
    "num_tokens": (20, 5),
    "views": ("crop", "flip"),
    "shard_size": 4,
    "batch_size": 2,
    "workers": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Eleven images of two classes, one of which cannot be read."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = root / ("ant", "bee")[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((44, 36), Image.Resampling.BICUBIC).save(path)
    folder = ImageFolder(root)
    (root / folder.name(BROKEN)).write_bytes(b"no image")
    return ImageFolder(root)


@pytest.fixture
def write(tiny_tokenizer: MergeVQ, data: ImageFolder) -> Callable[..., TokenCache]:
    """Writes a cache with `OPTIONS`, some of them changed."""

    def write(out: Path, images: ImageFolder | None = None, **changed: Any) -> TokenCache:
        images = data if images is None else images
        return write_token_cache(tiny_tokenizer, images, out, **{**OPTIONS, **changed})

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(images: int) -> Callable[[int], None]:
    """Raises when so many images are done."""
    seen = 0

    def stop(done: int) -> None:
        nonlocal seen
        seen += done
        if seen >= images:
            raise KeyboardInterrupt

    return stop


# ------------------------------------------------------------------------------------------------------- what it holds


def test_a_cache_gives_back_what_encode_returned(
    write: Callable[..., TokenCache], tiny_tokenizer: MergeVQ, data: ImageFolder, tmp_path: Path
) -> None:
    ran: list[int] = []
    hook = tiny_tokenizer.encoder.stem.register_forward_hook(lambda *_: ran.append(1))
    cache = write(tmp_path / "cache")
    hook.remove()
    assert len(ran) == 2 * 6, "convolutions run once for each view of each batch, whatever K"
    good = [i for i in range(COUNT) if i != BROKEN]
    assert (len(cache), cache.num_images, cache.num_tokens, cache.views) == (10, 10, (5, 20), ("crop", "flip"))
    assert (cache.grid, cache.num_bits, cache.tokenizer) == ((8, 8), 6, tiny_tokenizer.fingerprint())
    assert (cache.class_names, cache.num_classes) == (("ant", "bee"), 2)
    assert cache.numbers.tolist() == good
    assert cache.labels.tolist() == [data.labels[i] for i in good]
    assert list(cache.unreadable) == [data.name(BROKEN)]
    images = read_images([data.root / data.name(i) for i in good], 32)
    for view, shown in (("crop", images), ("flip", images.flip(-1))):
        for k in (20, 5):
            # In the batches that the cache was made with, so that equality is of bits.
            parts = [tiny_tokenizer.encode(shown[rows], k) for rows in ([0, 1], [2, 3], [4], [5, 6], [7, 8], [9])]
            expected = type(parts[0]).join(parts)
            assert cache.tokens(range(10), k, view).equal(expected)
            batch = cache.batch(range(10), k, view)
            assert torch.equal(batch["index"].gather(1, batch["source"]), expected.full_index())
    assert torch.equal(
        tiny_tokenizer.decode(cache.tokens([3], 20)), tiny_tokenizer.decode(tiny_tokenizer.encode(images[3:4], 20))
    )


def test_a_batch_mixes_rows_views_and_k(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    cache = write(tmp_path / "cache")
    rows, counts = [9, 0, 9, 4, 0], [5, 20, 20, 5, 20]
    views = ["crop", "crop", "flip", "flip", "flip"]
    mixed = cache.batch(rows, counts, views, width=23)  # type: ignore[arg-type]
    assert mixed["index"].shape == (5, 23)
    assert all(value.dtype == torch.int64 for value in mixed.values())
    for i, (row, k, view) in enumerate(zip(rows, counts, views, strict=True)):
        alone = cache.batch([row], k, view)  # type: ignore[arg-type]
        assert torch.equal(mixed["index"][i, :k], alone["index"][0])
        assert not mixed["index"][i, k:].any()
        for name in ("source", "num_tokens", "label", "number"):
            assert torch.equal(mixed[name][i], alone[name][0])
    assert cache.batch(rows, counts)["index"].shape == (5, 20)


def test_values_are_stored_in_the_smallest_types_that_hold_them(
    write: Callable[..., TokenCache], tmp_path: Path
) -> None:
    write(tmp_path / "cache")
    shard = load_file(tmp_path / "cache" / "shard-00001.safetensors")  # Another reader of the format.
    assert {name: (array.dtype, array.shape) for name, array in shard.items()} == {
        "label": (np.int8, (3,)),
        "number": (np.uint8, (3,)),
        **{f"{view}.{k}.index": (np.uint8, (3, k)) for view in ("crop", "flip") for k in (5, 20)},
        **{f"{view}.{k}.source": (np.uint8, (3, 64)) for view in ("crop", "flip") for k in (5, 20)},
    }
    layout = CacheSettings("d", 70_000, 256, 4096, "t", (32, 32), 18, (256, 257), ("crop",), (), 200).layout(7)
    assert {name: (str(kind), shape) for name, (kind, shape) in layout.items()} == {
        "label": ("int16", (7,)),
        "number": ("uint32", (7,)),
        "crop.256.index": ("uint32", (7, 256)),
        "crop.256.source": ("uint8", (7, 1024)),
        "crop.257.index": ("uint32", (7, 257)),
        "crop.257.source": ("uint16", (7, 1024)),
    }
    for largest in (255, 256, 65_535, 65_536):
        assert np.array([largest]).astype(unsigned(largest)) == largest
        assert unsigned(largest).itemsize == (1 if largest < 256 else 2 if largest < 65_536 else 4)
    for largest in (-1, 127, 128, 32_767, 32_768):
        assert np.array([largest, -1]).astype(signed(largest)).tolist() == [largest, -1]
        assert signed(largest).itemsize == (1 if largest < 128 else 2 if largest < 32_768 else 4)


def test_wide_integers_come_back(tmp_path: Path) -> None:
    arrays = {
        "a": np.array([[1, 255]], np.uint8),
        "b": np.array([65_535, 256, 3], np.uint16),
        "c": np.array([2**30 - 1], np.uint32),
        "d": np.array([-1, 32_767], np.int16),
        "none": np.zeros((0, 4), np.uint16),
    }
    save_shard(tmp_path / "x.safetensors", arrays, {"note": 'Grüße "x"'})
    for found in (map_shard(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")):
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
        assert all(found[name].dtype == arrays[name].dtype for name in arrays)


def test_only_the_rows_asked_for_are_read(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    cache = write(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.safetensors"
    array = map_shard(path)["crop.5.source"]
    offset = path.read_bytes().index(array.tobytes())
    with path.open("r+b") as file:  # A value that no source map of five tokens has, in row 2.
        file.seek(offset + 2 * 64)
        file.write(b"\xff")
    cache = TokenCache(tmp_path / "cache")
    assert cache.batch([0, 1, 3], 5)["source"].max() < 5
    with pytest.raises(TokenFileError, match=r"shard-00000.safetensors: expected .* sources below 5, got others"):
        cache.batch([0, 2], 5)
    with pytest.raises(TokenFileError, match="the checksum differs"):
        cache.verify()
    assert not array.flags.writeable


def test_many_shards_hold_no_files_open(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", shard_size=100)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    cut = write(tmp_path / "cut", shard_size=2)
    for cache in (cut, pickle.loads(pickle.dumps(cut))):
        for rows in ([9, 0, 4, 6, 2, 0], list(range(10))):
            assert torch.equal(cache.batch(rows, 20)["index"], whole.batch(rows, 20)["index"])
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_an_unreadable_shard_is_empty_and_nothing_readable_is_an_error(
    write: Callable[..., TokenCache], data: ImageFolder, tmp_path: Path
) -> None:
    some = data.select([0, 1, BROKEN, 3])
    done: list[int] = []
    cache = write(tmp_path / "some", some, shard_size=1, on_images=done.append)
    assert (len(cache), cache.numbers.tolist(), sum(done)) == (3, [0, 1, 3], 4)
    assert cache.batch([2], 5)["number"].tolist() == [3]
    with pytest.raises(DataError, match="all 1 tried are broken"):
        write(tmp_path / "none", data.select([BROKEN]))
    assert not any((tmp_path / "none").iterdir())
    with pytest.raises(DataError, match="expected images to encode"):
        write(tmp_path / "empty", data.select([]))


def test_worker_processes_change_nothing(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two", workers=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_tokenizer_is_used_in_evaluation_mode_and_left_as_it_was(
    write: Callable[..., TokenCache], tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    encode = MergeVQ.encode_each

    def watched(self: MergeVQ, *args: Any, **kwargs: Any) -> Any:
        modes.append(self.training)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(MergeVQ, "encode_each", watched)
    tiny_tokenizer.train()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", on_images=stop_after(2))
    assert modes and not any(modes) and tiny_tokenizer.training


# -------------------------------------------------------------------------------------------------- killed and gone on


@pytest.mark.parametrize("images", [2, 7, 11])
def test_a_run_stopped_anywhere_is_gone_on_with(write: Callable[..., TokenCache], tmp_path: Path, images: int) -> None:
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", on_images=stop_after(images))
    kept = contents(tmp_path / "cut")
    assert len(kept) == 1 + (images - 1) // 4
    with pytest.raises(TokenFileError, match="interrupted: `mergevq cache-tokens` with the same options goes on"):
        TokenCache(tmp_path / "cut")
    times = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in kept if name != UNFINISHED}
    done: list[int] = []
    write(tmp_path / "cut", on_images=done.append)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in times} == times
    assert sum(done) == COUNT


def test_a_killed_run_loses_nothing_and_leaves_nothing(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    """The process dies while a shard is being written to the disk."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    write(whole)

    def die() -> None:
        sync = mergevq.files._fsync

        def killed(path: Path) -> None:
            if "shard-00001" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        mergevq.files._fsync = killed
        write(cut)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    names = sorted(path.name for path in cut.iterdir())
    assert (
        len(names) == 3
        and names[0].startswith(".shard-00001.")
        and names[1:] == ["shard-00000.safetensors", UNFINISHED]
    )
    write(cut)
    assert contents(cut) == contents(whole)


def test_a_run_killed_in_its_last_step_is_finished(
    write: Callable[..., TokenCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "whole")
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == UNFINISHED:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut")
    monkeypatch.undo()
    assert len(TokenCache(tmp_path / "cut")) == 10
    with pytest.raises(OutputExistsError, match="holds a finished token cache"):
        write(tmp_path / "cut", num_tokens=7)
    assert len(write(tmp_path / "cut")) == 10
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_damaged_shard_of_an_unfinished_cache_is_made_again(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", on_images=stop_after(11))
    shard = tmp_path / "cut" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    write(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_only_the_same_work_is_gone_on_with(
    write: Callable[..., TokenCache], data: ImageFolder, tiny_config: TokenizerConfig, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        write(out, on_images=stop_after(7))
    before = contents(out)
    relabelled = data.select(range(COUNT))
    relabelled.labels = [1 - label for label in data.labels]
    for wrong, images, changed in (
        (r"another num_tokens, \[5, 20\] instead of \[5\]", None, {"num_tokens": 5}),
        (r"another views, .*flip.* instead of \[\"crop\"\]", None, {"views": ("crop",)}),
        ("another image_size, 32 instead of 40", None, {"size": 40}),
        ("another shard_size, 4 instead of 5", None, {"shard_size": 5}),
        ("another data, ", data.select(range(COUNT - 1)), {}),
        ("another data, ", relabelled, {}),
    ):
        with pytest.raises(OutputExistsError, match=f"unfinished token cache of {wrong}"):
            write(out, images, **changed)
    with pytest.raises(OutputExistsError, match="unfinished token cache of another tokenizer, "):
        write_token_cache(MergeVQ(tiny_config), data, out, **OPTIONS)
    assert contents(out) == before
    # In whatever order they are named.
    assert write(out, num_tokens=[5, 20, 5], views=("flip", "crop")).num_tokens == (5, 20)


def test_force_starts_anew_and_removes_only_its_own(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    out = tmp_path / "cache"
    write(out, shard_size=2)
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(OutputExistsError, match="holds a finished token cache: choose another folder"):
        write(out, shard_size=2)
    write(out, shard_size=8, force=True)
    names = {"manifest.json", "notes.txt", "shard-00000.safetensors", "shard-00001.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    with pytest.raises(KeyboardInterrupt):
        write(out, force=True, on_images=stop_after(6))
    assert {path.name for path in out.iterdir()} == {"notes.txt", UNFINISHED, "shard-00000.safetensors"}
    assert len(write(out, num_tokens=3, force=True)) == 10

    other = tmp_path / "other"
    other.mkdir()
    (other / "shard-00000.safetensors").write_text("not ours")
    (other / MANIFEST).write_text("{}")
    with pytest.raises(OutputExistsError, match="other exists already"):
        write(other)
    assert contents(other) == {"shard-00000.safetensors": b"not ours", MANIFEST: b"{}"}


# ----------------------------------------------------------------------------------------------------- what is refused


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def replace_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "no manifest.json in it"),
    "broken manifest": (lambda f: truncate(f / MANIFEST), "expected JSON, the file is damaged"),
    "foreign manifest": (lambda f: (f / MANIFEST).write_text("{}"), "expected the field mergevq"),
    "manifest of a list": (lambda f: (f / MANIFEST).write_text("[]"), "expected the field mergevq"),
    "newer": (lambda f: edit(f / MANIFEST, lambda m: m.update(mergevq="token-cache/9")), "upgrade mergevq"),
    "other kind": (lambda f: edit(f / MANIFEST, lambda m: m.update(mergevq="tokens/1")), "got a token file"),
    "no shards named": (lambda f: edit(f / MANIFEST, lambda m: m.pop("shards")), "the field shards"),
    "one shard named": (lambda f: edit(f / MANIFEST, lambda m: m["shards"].pop()), "expected 3 shards"),
    "shard without size": (lambda f: edit(f / MANIFEST, lambda m: m["shards"][0].pop("bytes")), "'bytes'"),
    "no images": (
        lambda f: edit(f / MANIFEST, lambda m: [shard.update(images=0) for shard in m["shards"]]),
        "with at least one image",
    ),
    "no settings": (lambda f: edit(f / MANIFEST, lambda m: m.update(settings=3)), "encode the images again"),
    "K too large": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(num_tokens=[65])), "in 1..64"),
    "unknown view": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(views=["left"])), "views"),
    "no bits": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(num_bits=0)), "num_bits 1..30"),
    "fewer bits": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(num_bits=9)), "crop.20.index"),
    "fewer classes": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(num_classes=1)), "labels -1..0"),
    "too many classes": (lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(num_classes=10**9 * 9)), "2..31"),
    "endless shards": (
        lambda f: edit(f / MANIFEST, lambda m: m["settings"].update(data_images=2**32 - 1, shard_size=1)),
        "expected 4294967295 shards",
    ),
    "missing shard": (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.safetensors: .* missing"),
    "truncated shard": (lambda f: truncate(f / "shard-00002.safetensors"), "shard-00002.safetensors: .* truncated"),
    "another shard's file": (replace_shard, "shard-00001.safetensors: expected .* bytes"),
    "the manifest alone": (lambda f: [path.unlink() for path in f.glob("shard-*")], "it is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_cache_is_one_line(
    case: str, write: Callable[..., TokenCache], tmp_path: Path, unchecked: None
) -> None:
    damage, message = DAMAGED[case]
    write(tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(TokenFileError, match=message) as caught:
        TokenCache(tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_origin_is_refused_although_its_size_fits(
    write: Callable[..., TokenCache], tmp_path: Path
) -> None:
    write(tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.safetensors"
    for old, new in ((b"token-shard/1", b"other-shard/1"), (b"crop.5.index", b"crop.6.index"), (b'"U8"', b'"I8"')):
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(TokenFileError, match=r"shard-00000.safetensors: expected"):
            TokenCache(tmp_path / "cache")
        path.write_bytes(whole)
    assert len(TokenCache(tmp_path / "cache")) == 10


def test_a_cache_of_another_tokenizer_and_folders_without_one_are_refused(
    write: Callable[..., TokenCache], tiny_tokenizer: MergeVQ, tmp_path: Path
) -> None:
    write(tmp_path / "cache")
    assert len(TokenCache(tmp_path / "cache", expect_tokenizer=tiny_tokenizer.fingerprint())) == 10
    with pytest.raises(TokenFileError, match="expected tokens of tokenizer 0123456789ab, got those of"):
        TokenCache(tmp_path / "cache", expect_tokenizer="0123456789abcdef")
    with pytest.raises(TokenFileError, match="got nothing there"):
        TokenCache(tmp_path / "nowhere")
    with pytest.raises(TokenFileError, match="got a file"):
        TokenCache(tmp_path / "cache" / MANIFEST)


def test_what_the_cache_does_not_hold_is_told(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", views=("crop",))
    for wrong, arguments in (
        ("rows 0..9, got 0..10", ([0, 10], 5)),
        ("rows 0..9, got -1..3", ([3, -1], 5)),
        ("at least one row", ([], 5)),
        ("one K and view for each, got 2, 1, 2", ([0, 1], [5])),
        ("num_tokens among 5, 20, got 7, 9", ([0, 1], [9, 7])),
        ("views among crop, got flip", ([0], 5, "flip")),
        ("a width of at least 20", ([0], 20, "crop", 19)),
    ):
        with pytest.raises(ConfigError, match=wrong):
            cache.batch(*arguments)  # type: ignore[arg-type]


def test_impossible_settings_are_refused_and_nothing_is_written(
    write: Callable[..., TokenCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    for kind, wrong, changed in (
        (ShapeError, "1..64", {"num_tokens": (5, 65)}),
        (ShapeError, "1..64", {"num_tokens": 0}),
        (ShapeError, "multiple of the tokenizer's downsampling 4, got 30", {"size": 30}),
        (ConfigError, "views of crop, flip, got left", {"views": ("crop", "left")}),
        (ConfigError, "views of crop, flip, got none", {"views": ()}),
        (ConfigError, "at least one image a shard, got 0", {"shard_size": 0}),
        (ConfigError, "batch_size of at least 1", {"batch_size": 0}),
    ):
        with pytest.raises(kind, match=wrong):
            write(tmp_path / "cache", **changed)
    # A converted model merges at most half of its tokens in a layer.
    schedule = merge_schedule(64, 20, 2)
    monkeypatch.setattr("mergevq.tokenizer.inputs.merge_schedule", lambda *_: (schedule[0] - 1, schedule[1]))
    with pytest.raises(ConfigError, match="a K that this tokenizer reaches, got 20: it keeps 21"):
        write(tmp_path / "cache", num_tokens=20)
    assert not (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_of_images_is_of_names_labels_and_sizes(data: ImageFolder, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(COUNT):
            archive.write(data.root / data.name(i), data.name(i))
    packed = ImageFolder(tmp_path / "all.zip")
    own = data.fingerprint()
    assert packed.fingerprint() == own == ImageFolder(data.root).fingerprint()
    changed = [data.select(range(COUNT - 1)), data.select([1, 0, *range(2, COUNT)])]
    relabelled = data.select(range(COUNT))
    relabelled.labels = [*data.labels[:-1], 1 - data.labels[-1]]
    renamed = data.select(range(COUNT))
    renamed.classes = ("ape", "bee")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for i in range(COUNT):
            archive.writestr(data.name(i), (data.root / data.name(i)).read_bytes() + b" " * (i == 2))
    changed += [relabelled, renamed, ImageFolder(tmp_path / "more.zip")]
    assert len({own, *(images.fingerprint() for images in changed)}) == 6


def test_the_fingerprint_of_a_cache_is_of_its_tokens(write: Callable[..., TokenCache], tmp_path: Path) -> None:
    prints = [write(tmp_path / str(i), num_tokens=k).fingerprint for i, k in enumerate((5, 5, 6))]
    assert prints[0] == prints[1] != prints[2]
