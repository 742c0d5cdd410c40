"""Atomic writes, safetensors with a header, strict loading, finding a model file: what survives, and what is said."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from mergevq.errors import CheckpointError, MergeVQError, OutputExistsError, ShapeError, WriteError
from mergevq.files import (
    atomic_path,
    atomic_write,
    check_format,
    load_strict,
    load_tensors,
    read_header,
    read_json,
    refuse_existing,
    save_tensors,
    write_json,
)
from mergevq.model_files import find_model_file, shipped_names, shipped_roles

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    """Returns everything in the folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def message(call, kind: type[MergeVQError]) -> str:
    """Returns the one line that `call` fails with."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------------------------------------------------- writing


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    atomic_write(target, b"first, and longer")
    atomic_write(target, b"second")
    assert target.read_bytes() == b"second"
    assert names(target.parent) == ["a.bin"]


def test_new_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    atomic_write(tmp_path / "atomic", b"")
    save_tensors(tmp_path / "tensors", {"a": torch.zeros(1)}, {})
    for name in ("atomic", "tensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_temporary_file_is_hidden_in_the_same_folder_and_keeps_the_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.png") as temporary:
        assert (temporary.parent, temporary.suffix, temporary.name[0]) == (tmp_path, ".png", ".")
        assert not (tmp_path / "a.png").exists()
    assert names(tmp_path) == ["a.png"]


def test_the_file_is_synced_and_then_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    at_sync = []
    monkeypatch.setattr(os, "fsync", lambda _: at_sync.append(target.read_bytes()))
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"new")
        written = temporary.stat().st_ino
    assert at_sync == [b"old", b"new"], "first the file, before anything is exchanged, then the folder"
    assert target.stat().st_ino == written


def test_a_failing_block_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    for failure in (KeyboardInterrupt(), RuntimeError("no"), FileNotFoundError("another file")):
        with pytest.raises(type(failure)), atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise failure
        assert target.read_bytes() == b"old"
        assert names(tmp_path) == ["a.bin"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.bin").symlink_to(tmp_path / "real" / "a.bin")
    atomic_write(tmp_path / "link.bin", b"through")
    assert (tmp_path / "link.bin").is_symlink()
    assert (tmp_path / "real" / "a.bin").read_bytes() == b"through"


def test_disk_full_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"step": 1})
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(FULL))
    text = message(lambda: write_json(target, {"step": 2}), WriteError)
    assert str(target) in text and "no room" in text and "MiB free" in text
    assert read_json(target) == {"step": 1}
    assert names(tmp_path) == ["a.json"]


def test_disk_full_while_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Delayed allocation: some file systems notice only here that there is no room.
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(FULL))
    assert "no room" in message(lambda: atomic_write(target, b"new"), WriteError)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_no_room_inside_the_safetensors_library(tmp_path: Path) -> None:
    """A real failed write below Python: the largest file this process may write is smaller than the model."""
    script = """
        import os, resource, signal, sys, torch
        from mergevq.errors import WriteError
        from mergevq.files import load_tensors, save_tensors
        path = sys.argv[1]
        save_tensors(path, {"w": torch.ones(10)}, {"mergevq": "test/1"})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_tensors(path, {"w": torch.zeros(10_000)}, {"mergevq": "test/1"})
        except WriteError as error:
            assert "no room" in str(error) and path in str(error) and "\\n" not in str(error), error
        else:
            raise SystemExit("it should not have worked")
        assert torch.equal(load_tensors(path)[0]["w"], torch.ones(10))
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    """
    run_script(script, str(tmp_path / "model.safetensors"))


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    save_tensors(target, {"w": torch.ones(3)}, {"mergevq": "test/1"})
    before = target.read_bytes()
    script = """
        import os, signal, sys
        from mergevq.files import atomic_path
        with atomic_path(sys.argv[1]) as temporary:
            with temporary.open("wb") as file:
                file.write(b"half of a new model")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
    """
    run_script(script, str(target), status=-signal.SIGKILL)
    assert target.read_bytes() == before
    leftover = [name for name in names(tmp_path) if name != target.name]
    assert len(leftover) == 1 and leftover[0].startswith(".model."), "the kill did not come in the middle of the write"
    save_tensors(target, {"w": torch.zeros(3)}, {"mergevq": "test/1"})
    assert torch.equal(load_tensors(target)[0]["w"], torch.zeros(3))


def run_script(script: str, *arguments: str, status: int = 0) -> None:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr


def test_a_place_that_does_not_allow_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    text = message(lambda: atomic_write(tmp_path / "file" / "a.bin", b""), WriteError)
    assert "a.bin: cannot be written" in text and f"{tmp_path / 'file'}: file exists" in text
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    assert "directory" in message(lambda: atomic_write(tmp_path / "folder", b""), WriteError)
    assert names(tmp_path) == ["file", "folder"]


def test_refuse_existing(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "free", force=False)
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty", force=False)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for taken in (tmp_path / "file", tmp_path, tmp_path / "broken"):
        assert "force=True" in message(lambda taken=taken: refuse_existing(taken, force=False), OutputExistsError)
        refuse_existing(taken, force=True)


def test_json_round_trip_and_numbers_that_json_cannot_say(tmp_path: Path) -> None:
    value = {"name": "Füße", "shape": (1, 2), "path": Path("a/b"), "none": None, "x": 0.1}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {**value, "shape": [1, 2], "path": "a/b"}
    assert "a.json" in message(lambda: write_json(tmp_path / "a.json", {"psnr": float("inf")}), ShapeError)
    assert read_json(tmp_path / "a.json")["x"] == 0.1
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"tensor": torch.ones(1)})
    (tmp_path / "bad.json").write_text('{"a": ')
    assert "damaged" in message(lambda: read_json(tmp_path / "bad.json"), CheckpointError)
    assert "no such file" in message(lambda: read_json(tmp_path / "none.json"), CheckpointError)


# ---------------------------------------------------------------------------------------------------------- tensors


def test_tensors_round_trip_with_their_header(tmp_path: Path) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "part": base[1],
        "half": base.to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3, dtype=torch.uint8),
        "parameter": nn.Parameter(base + 1),
    }
    header = {"mergevq": "test/1", "config": json.dumps({"words": 'Füße "quoted"\n'}), "step": "12"}
    save_tensors(tmp_path / "a.safetensors", tensors, header)
    loaded, found = load_tensors(tmp_path / "a.safetensors")
    assert found == header == read_header(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.detach())


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    # The library alone writes the header's strings in a random order: with ten of them, never twice the same.
    for name in "ab":
        header = {"mergevq": "test/1", **{letter: letter for letter in "abcdefghij"}}
        save_tensors(tmp_path / name, {"w": torch.arange(3.0)}, header)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    save_tensors(tmp_path / "m.safetensors", {"w": torch.arange(100.0)}, {"mergevq": "tokenizer/1", "version": "9.9"})
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("kept", [0, 4, 8, 40, 200, 500, -1])
def test_a_truncated_file_at_every_stage(model_file: Path, kept: int) -> None:
    data = model_file.read_bytes()
    model_file.write_bytes(data[:kept])
    text = message(lambda: load_tensors(model_file), CheckpointError)
    assert str(model_file) in text and "expected a safetensors file" in text and "save or copy it again" in text
    if kept in (40, 200, 500):
        assert f"got {kept} of at least" in text
    if kept == -1:
        assert f"got {len(data) - 1} of at least {len(data)} bytes" in text


@pytest.mark.parametrize(
    ("start", "name", "advice"),
    [
        (b"\x89PNG\r\n\x1a\n", "a PNG image", "give a model"),
        (b"\xff\xd8\xff\xe0", "a JPEG image", "give a model"),
        (b"PK\x03\x04", "zip archive", "mergevq convert"),
        (b"\x80\x02}q\x00", "pickle", "mergevq convert"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", "git lfs pull"),
        (b"just words", "something else", "copy it again"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, start: bytes, name: str, advice: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(start + bytes(200))
    for call in (load_tensors, read_header):
        text = message(lambda call=call: call(path), CheckpointError)
        assert name in text and advice in text


def test_a_pickle_under_another_name_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Bomb()}, tmp_path / "model.safetensors")
    assert "zip archive" in message(lambda: load_tensors(tmp_path / "model.safetensors"), CheckpointError)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "there is no such file" in message(lambda: load_tensors(tmp_path / "none.safetensors"), CheckpointError)
    assert "got a folder" in message(lambda: load_tensors(tmp_path), CheckpointError)


def test_check_format(model_file: Path) -> None:
    header = read_header(model_file)
    check_format(header, "tokenizer/1", model_file)
    assert "expected a generator file, got a tokenizer file" in message(
        lambda: check_format(header, "generator/1", model_file), CheckpointError
    )
    newer = {**header, "mergevq": "tokenizer/2"}
    assert "mergevq 9.9 wrote it, upgrade mergevq" in message(
        lambda: check_format(newer, "tokenizer/1", model_file), CheckpointError
    )
    for other in ("tokenizer/0", "tokenizer", "tokenizer/x"):
        text = message(lambda other=other: check_format({"mergevq": other}, "tokenizer/1", model_file), CheckpointError)
        assert f"expected format tokenizer/1, got {other}" in text
    assert "another origin" in message(lambda: check_format({}, "tokenizer/1", model_file), CheckpointError)


# ---------------------------------------------------------------------------------------------------- model loading


def test_load_strict_copies_and_converts_float_types() -> None:
    torch.manual_seed(0)
    module, other = nn.Linear(3, 2), nn.Linear(3, 2).double()
    load_strict(module, other.state_dict(), "other")
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, other.weight.float())


def test_load_strict_lists_ten_of_each_and_copies_nothing() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {f"foreign.{i}": torch.zeros(1) for i in range(11)}
    tensors |= {f"{i}.weight": torch.zeros(2, 3) for i in range(11)} | {"11.weight": torch.zeros(2, 2)}
    text = message(lambda: load_strict(module, tensors, "gr.safetensors"), CheckpointError)
    assert "gr.safetensors does not fit" in text
    assert "12 missing (0.bias; 1.bias;" in text and "9.bias and 2 more" in text and "10.bias" not in text
    assert "11 unexpected (foreign.0;" in text and "foreign.9 and 1 more" in text and "foreign.10" not in text
    assert "11 misshaped (0.weight: expected float32[2, 2], got float32[2, 3];" in text and "10.weight" not in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_load_strict_tells_integers_from_numbers() -> None:
    module = nn.BatchNorm1d(2)
    tensors = {**module.state_dict(), "num_batches_tracked": torch.tensor(1.5)}
    text = message(lambda: load_strict(module, tensors, "bn"), CheckpointError)
    assert "expected int64[], got float32[]" in text


def test_find_model_file_on_this_machine(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_hub(monkeypatch)
    assert find_model_file(model_file) == model_file
    run = tmp_path / "run"
    run.mkdir()
    assert "expected model.safetensors in this folder" in message(lambda: find_model_file(run), CheckpointError)
    (run / "model.safetensors").write_bytes(model_file.read_bytes())
    assert find_model_file(str(run)) == run / "model.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model_file("~/m.safetensors") == model_file


@pytest.mark.parametrize(
    "name",
    [
        "gone.safetensors",
        "runs/gone.safetensors",
        "./runs/gone",
        "../gone",
        "/gone",
        "~/gone",
        "a/b/c",
        "gone",
        "a/",
        "a b/c",
    ],
)
def test_what_looks_local_is_never_asked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_the_hub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    text = message(lambda: find_model_file(name), CheckpointError)
    assert name in text and "there is no such file" in text and "owner/name" in text


def test_only_safetensors_are_asked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_the_hub(monkeypatch)
    assert "there is no such file" in message(lambda: find_model_file("owner/name", ".ckpt"), CheckpointError)


def test_a_hub_id_is_downloaded(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(*arguments: str) -> str:
        asked.append(arguments)
        return str(model_file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: None)
    assert find_model_file("some-owner/gr_256.v1") == model_file
    assert asked == [("some-owner/gr_256.v1", "model.safetensors")]


def test_a_hub_that_does_not_answer_or_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def said(error: Exception) -> str:
        def fail(*_: str) -> str:
            raise error

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: None)
        text = message(lambda: find_model_file("owner/name"), CheckpointError)
        assert text.startswith("owner/name: no such file or folder here, and")
        return text

    assert "cannot be reached" in said(errors.LocalEntryNotFoundError("offline"))
    assert "has no model.safetensors" in said(errors.EntryNotFoundError("404"))
    missing = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
    assert "check the name" in said(missing)
    assert "(too many requests)" in said(RuntimeError("too many requests\nand much more"))
    assert "(TimeoutError)" in said(TimeoutError())


def test_a_hub_that_cannot_be_reached_is_asked_once_and_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def fail(url: str) -> None:
        asked.append(url)
        raise RuntimeError("Name or service not known")  # Stands for the errors of the HTTP library.

    forbid_the_hub(monkeypatch)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    assert "cannot be reached" in message(lambda: find_model_file("owner/name"), CheckpointError)
    assert len(asked) == 1 and "owner/name" in asked[0]
    assert capfd.readouterr() == ("", "")
    # What was downloaded before needs no answer: the client looks there itself.
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "/kept/model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: "/kept/model.safetensors")
    assert find_model_file("owner/name") == Path("/kept/model.safetensors") and len(asked) == 1


def forbid_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: str) -> None:
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)


def test_models_of_the_package_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = find_model_file("emoji_64")
    assert file.name == "tokenizer.safetensors" and "tokenizer" in shipped_roles("emoji_64")
    assert shipped_names() == ("emoji_64",) and shipped_roles("emoji_65") == ()
    text = message(lambda: find_model_file("emoji_64", role="upscaler"), CheckpointError)
    assert text.startswith("emoji_64: expected one of the models that come with mergevq (") and "no upscaler" in text
    assert "emoji_64 (comes with mergevq)" in message(lambda: find_model_file("emoji_65"), CheckpointError)
    # What lies here under that name comes first.
    (tmp_path / "emoji_64").mkdir()
    assert "expected model.safetensors in this folder" in message(lambda: find_model_file("emoji_64"), CheckpointError)
