"""MergedTokens: its checks, its arithmetic and its file. Round trips of arbitrary tokens are in property/."""

import json
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor

from mergevq.checksum import checksum
from mergevq.errors import OutputExistsError, ShapeError, TokenFileError, WriteError
from mergevq.files import load_tensors, save_tensors
from mergevq.merging import SourceMap
from mergevq.tokens import MergedTokens, load_tokens, save_tokens


def make(counts: list[int], grid: tuple[int, int] = (3, 4), num_bits: int = 6, seed: int = 0) -> MergedTokens:
    """Returns random tokens, with a source map that uses every one."""
    rng = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    num_tokens = torch.tensor(counts)
    index = torch.randint(2**num_bits, (len(counts), max(counts)), generator=rng)
    source = torch.empty(len(counts), patches, dtype=torch.int64)
    for b, count in enumerate(counts):
        index[b, count:] = 0
        extra = torch.randint(count, (patches - count,), generator=rng)
        source[b] = torch.cat([torch.arange(count), extra])[torch.randperm(patches, generator=rng)]
    return MergedTokens(index, SourceMap(source, num_tokens), grid, num_bits, "f" * 64, num_tokens)


def replaced(tokens: MergedTokens, **changes: object) -> MergedTokens:
    """Returns the tokens with some parts exchanged, and checked again."""
    names = ("index", "source", "grid", "num_bits", "tokenizer", "num_tokens")
    return MergedTokens(**{name: changes.get(name, getattr(tokens, name)) for name in names})


# ----------------------------------------------------------------------------------------------------------- checks


def with_entry(tensor: Tensor, place: tuple[int, ...], value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.fixture
def unhooked() -> Iterator[None]:
    """Turns the tests' shape-checking hook off: users run without it, and it would speak before the class does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.usefixtures("unhooked")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"index": t.index.float()}, "an int64 index"),
        (lambda t: {"index": t.index.int()}, "an int64 index"),
        (lambda t: {"index": t.index[0]}, "an int64 index"),
        (lambda t: {"index": t.index[:0], "num_tokens": t.num_tokens[:0]}, "at least one image"),
        (lambda t: {"index": with_entry(t.index, (1, 2), 64)}, "indices 0..63 (6 bits), got something else in image 1"),
        (lambda t: {"index": with_entry(t.index, (0, 0), -1)}, "indices 0..63 (6 bits), got something else in image 0"),
        (lambda t: {"index": with_entry(t.index, (1, 3), 1)}, "the last token, got something else in image 1"),
        (lambda t: {"num_tokens": t.num_tokens.int()}, "int64 num_tokens [2]"),
        (lambda t: {"num_tokens": t.num_tokens[:1]}, "int64 num_tokens [2]"),
        (lambda t: {"num_tokens": torch.tensor([5, 0])}, "num_tokens 1..12, got something else in image 1"),
        (lambda t: {"num_tokens": torch.tensor([13, 3])}, "num_tokens 1..12, got something else in image 0"),
        (lambda t: {"num_tokens": torch.tensor([4, 3])}, "as wide as the largest num_tokens, not 5"),
        (lambda t: {"num_tokens": torch.tensor([3, 5])}, "the last token, got something else in image 0"),
        (lambda t: {"num_tokens": torch.tensor([5, 4])}, "of the source map, got something else in image 1"),
        (lambda t: {"grid": (3, 5)}, "source map [2, 15]"),
        (lambda t: {"grid": (0, 4)}, "both at least 1"),
        (lambda t: {"num_bits": 0}, "num_bits 1..30"),
        (lambda t: {"num_bits": 31}, "num_bits 1..30"),
        (lambda t: {"source": SourceMap(t.source.index[:, :-1], t.num_tokens)}, "source map [2, 12]"),
        (lambda t: {"source": SourceMap(t.source.index.int(), t.num_tokens)}, "int64 source map"),
        (
            lambda t: {"source": SourceMap(with_entry(t.source.index, (1, 0), 3), t.num_tokens)},
            "source entries 0..K-1 in every image, got something else in image 1",
        ),
        (
            lambda t: {"source": SourceMap(with_entry(t.source.index, (0, 0), -1), t.num_tokens)},
            "source entries 0..K-1 in every image, got something else in image 0",
        ),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(change, said: str) -> None:
    tokens = make([5, 3])
    with pytest.raises(ShapeError) as caught:
        replaced(tokens, **change(tokens))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_predicted_map_may_leave_a_token_without_patches() -> None:
    tokens = make([5, 3])
    empty = SourceMap(torch.zeros_like(tokens.source.index), tokens.num_tokens)
    assert replaced(tokens, source=empty).source.sizes().tolist() == [[12, 0, 0, 0, 0], [12, 0, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------------- the values


def test_mask_and_full_index_of_known_tokens() -> None:
    num_tokens = torch.tensor([3, 1])
    source = SourceMap(torch.tensor([[0, 1, 0, 2], [0, 0, 0, 0]]), num_tokens)
    tokens = MergedTokens(torch.tensor([[7, 5, 6], [4, 0, 0]]), source, (2, 2), 3, None, num_tokens)
    assert tokens.mask().tolist() == [[True, True, True], [True, False, False]]
    assert tokens.full_index().tolist() == [[7, 5, 7, 6], [4, 4, 4, 4]]
    assert repr(tokens) == "MergedTokens(2 images, 1..3 tokens of 3 bits, grid 2x2, with source)"


def test_full_index_without_a_source_is_the_index_if_nothing_was_merged() -> None:
    index = torch.tensor([[3, 1, 2, 1]])
    tokens = MergedTokens(index, None, (2, 2), 2, None, torch.tensor([4]))
    assert tokens.full_index().tolist() == [[3, 1, 2, 1]]
    with pytest.raises(ShapeError, match="expected a source map to place 3 tokens on 4 patches"):
        MergedTokens(index[:, :3], None, (2, 2), 2, None, torch.tensor([3])).full_index()


def test_bits_per_image_are_counted_apart() -> None:
    tokens = make([12, 9, 8, 2, 1])
    bits = tokens.bits_per_image()
    assert bits.index.tolist() == [72, 54, 48, 12, 6]
    assert bits.source.tolist() == [12 * 4, 12 * 4, 12 * 3, 12 * 1, 0]
    assert bits.total.tolist() == [120, 102, 84, 24, 6]
    assert tokens.without_source().bits_per_image().source.tolist() == [0] * 5
    assert tokens.without_source().bits_per_image().total.tolist() == [72, 54, 48, 12, 6]


def test_bits_of_the_paper_setting() -> None:
    tokens = MergedTokens(torch.zeros(1, 144, dtype=torch.int64), None, (16, 16), 18, None, torch.tensor([144]))
    source = SourceMap(torch.arange(256)[None] % 144, tokens.num_tokens)
    bits = replaced(tokens, source=source).bits_per_image()
    assert (int(bits.index), int(bits.source)) == (144 * 18, 256 * 8)


def test_one_image_is_trimmed_to_its_own_tokens() -> None:
    tokens = make([5, 3, 12])
    one = tokens[1]
    assert (len(one), one.index.shape[1], one.num_tokens.tolist()) == (1, 3, [3])
    assert torch.equal(one.full_index(), tokens.full_index()[1:2])
    assert tokens[-2].equal(one)
    assert [len(t) for t in tokens] == [1, 1, 1]
    assert tokens[:2].index.shape == (2, 5)
    for outside in (3, -4):
        with pytest.raises(IndexError):
            tokens[outside]
    with pytest.raises(ShapeError, match="at least one image"):
        tokens[3:]


def test_join_is_the_inverse_of_indexing() -> None:
    tokens = make([5, 3, 12, 1])
    assert MergedTokens.join([tokens[0], tokens[1:3], tokens[3]]).equal(tokens)
    bare = tokens.without_source()
    assert MergedTokens.join(list(bare)).equal(bare)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (make([2], grid=(4, 3)), "equal grid"),
        (make([2], num_bits=7), "equal num_bits"),
        (replaced(make([2]), tokenizer=None), "equal tokenizer"),
        (make([2]).without_source(), "all without"),
    ],
)
def test_join_refuses_what_does_not_belong_together(other: MergedTokens, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        MergedTokens.join([make([3]), other])
    with pytest.raises(ShapeError, match="at least one"):
        MergedTokens.join([])


def test_equal_sees_every_part() -> None:
    tokens = make([5, 3])
    assert tokens.equal(make([5, 3]))
    source = SourceMap(
        with_entry(tokens.source.index, (1, 0), (int(tokens.source.index[1, 0]) + 1) % 3), tokens.num_tokens
    )
    others = [
        replaced(tokens, index=with_entry(tokens.index, (0, 0), int(tokens.index[0, 0]) ^ 1)),
        replaced(tokens, source=source),
        replaced(tokens, tokenizer=None),
        replaced(tokens, num_bits=7),
        tokens.without_source(),
        tokens[:1],
        MergedTokens(tokens.index, None, tokens.grid, 6, tokens.tokenizer, torch.tensor([5, 5])),
    ]  # fmt: skip
    for other in others:
        assert not tokens.equal(other)
        assert not other.equal(tokens)


def test_from_full_index_of_the_papers_kind_of_example() -> None:
    tokens = MergedTokens.from_full_index(torch.tensor([[9, 9, 4, 9, 7, 4], [5, 5, 5, 5, 5, 5]]), (2, 3), 4, "abc")
    assert tokens.index.tolist() == [[9, 4, 7], [5, 0, 0]]
    assert tokens.source.index.tolist() == [[0, 0, 1, 0, 2, 1], [0, 0, 0, 0, 0, 0]]
    assert (tokens.num_tokens.tolist(), tokens.tokenizer) == ([3, 1], "abc")
    # The position cache (the position of the first equal token) needs no storage of its own.
    assert tokens.source.first().gather(1, tokens.source.index)[0].tolist() == [0, 0, 2, 0, 4, 2]


def test_from_full_index_checks_its_input() -> None:
    index = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ShapeError, match=r"indices 0\.\.3 \(2 bits\)"):
        MergedTokens.from_full_index(index, (2, 2), 2)
    with pytest.raises(ShapeError, match=r"source map \[1, 6\]"):
        MergedTokens.from_full_index(index, (2, 3), 4)


# ------------------------------------------------------------------------------------------------------------ files


def test_a_file_holds_the_promised_bytes(tmp_path: Path) -> None:
    tokens = make([12, 12, 7, 1, 9], num_bits=11)
    save_tokens(tmp_path / "a.mvq", tokens)
    tensors, header = load_tensors(tmp_path / "a.mvq")
    maps = [-(-12 * bits // 8) for bits in (4, 4, 3, 0, 4)]
    assert tensors["index"].numel() == sum(-(-k * 11 // 8) for k in (12, 12, 7, 1, 9))
    assert tensors["source"].numel() == sum(maps)
    assert json.loads(header["num_tokens"]) == [[12, 2], [7, 1], [1, 1], [9, 1]]
    size = (tmp_path / "a.mvq").stat().st_size
    header_size = int.from_bytes((tmp_path / "a.mvq").read_bytes()[:8], "little")
    assert size == 8 + header_size + tensors["index"].numel() + tensors["source"].numel()


def test_bits_are_counted_from_the_least_significant_one(tmp_path: Path) -> None:
    tokens = MergedTokens(torch.tensor([[0b101, 0b011, 0b110]]), None, (1, 3), 3, None, torch.tensor([3]))
    save_tokens(tmp_path / "a.mvq", tokens)
    assert load_tensors(tmp_path / "a.mvq")[0]["index"].tolist() == [0b10_011_101, 0b1]


def test_the_header_does_not_grow_with_images_of_equal_k(tmp_path: Path) -> None:
    sizes = []
    for count in (100, 200):
        tokens = make([4] * count)
        save_tokens(tmp_path / f"{count}.mvq", tokens)
        sizes.append((tmp_path / f"{count}.mvq").stat().st_size)
    assert abs(sizes[1] - sizes[0] - 100 * (3 + 3)) <= 16


def test_saving_asks_before_it_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([3]))
    with pytest.raises(OutputExistsError):
        save_tokens(path, make([4]))
    assert load_tokens(path).equal(make([3]))
    save_tokens(path, make([4]), force=True)
    assert load_tokens(path).equal(make([4]))


def test_a_full_disk_keeps_the_old_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([3]))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(WriteError, match="no room"):
        save_tokens(path, make([4]), force=True)
    assert load_tokens(path).equal(make([3]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mvq"]


def refused(path: Path, said: str, expect_tokenizer: str | None = None) -> None:
    with pytest.raises(TokenFileError) as caught:
        load_tokens(path, expect_tokenizer)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        refused(path, "expected")


def test_a_flipped_payload_is_called_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(path, "the checksum differs")


def test_a_truncated_or_missing_or_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    refused(path, "there is no such file")
    save_tokens(path, make([5, 3]))
    data = path.read_bytes()
    for kept in (0, 7, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:kept])
        refused(path, "save or copy it again")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    refused(path, "a PNG image")
    save_tensors(path, {"w": torch.ones(2)}, {"mergevq": "tokenizer/1"})
    refused(path, "expected a token file (.mvq), got a tokenizer file")


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.int64])
def test_a_payload_that_is_not_bytes(tmp_path: Path, kind: torch.dtype) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    tensors, header = load_tensors(path)
    save_tensors(path, {name: data.to(kind) for name, data in tensors.items()}, header)
    refused(path, f"expected packed bytes, got index in {str(kind).removeprefix('torch.')}")


def test_another_version(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    tensors, header = load_tensors(path)
    save_tensors(path, tensors, {**header, "mergevq": "tokens/2"})
    refused(path, "expected format tokens/1, got tokens/2")


def test_tokens_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    assert load_tokens(path, expect_tokenizer="f" * 64).equal(make([5, 3]))
    refused(path, f"tokens of tokenizer {'a' * 12}, got those of {'f' * 12}", expect_tokenizer="a" * 64)
    save_tokens(path, replaced(make([5, 3]), tokenizer=None), force=True)
    assert load_tokens(path, expect_tokenizer="a" * 64).tokenizer is None


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": "[[5, 1], [2, 1]]"},
        {"num_tokens": "[[5, 1]]"},
        {"num_tokens": "[5, 3]"},
        {"num_tokens": "[[5, 1], [3, -1]]"},
        {"num_tokens": "[[1, 1000000000000]]"},
        {"num_tokens": "[[1, 1000000000000]]", "count": "1000000000000"},
        {"num_tokens": "[[1, 1000000000000], [1, -999999999998]]"},
        {"num_tokens": "[[1000000000000, 2]]"},
        {"num_tokens": "[[1, 100000000000000000000]]"},
        {"grid": "[3, 3]"},
        {"grid": "[12]"},
        {"num_bits": "7"},
        {"num_bits": "2"},
        {"count": "3"},
        {"has_source": "false"},
        {"tokenizer": "f"},
    ],
)
def test_a_header_that_does_not_fit_its_data(tmp_path: Path, change: dict[str, str]) -> None:
    """A file of some other writer, with a checksum that is right."""
    path = tmp_path / "a.mvq"
    save_tokens(path, make([5, 3]))
    tensors, header = load_tensors(path)
    header = {**header, **change}
    header["sha256"] = checksum(header, tensors)
    save_tensors(path, tensors, header)
    refused(path, "expected a header that fits the data")


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.mvq", "b.mvq"):
        save_tokens(tmp_path / name, make([5, 3]))
    assert (tmp_path / "a.mvq").read_bytes() == (tmp_path / "b.mvq").read_bytes()


def test_num_tokens_may_be_left_out() -> None:
    index = torch.tensor([[3, 1, 0], [2, 0, 0]])
    source = SourceMap(torch.tensor([[0, 1, 2, 2], [0, 0, 0, 0]]), torch.tensor([3, 1]))
    assert MergedTokens(index, source, (2, 2), 2).num_tokens.tolist() == [3, 1]
    assert MergedTokens(index, None, (2, 2), 2).num_tokens.tolist() == [3, 3]
