"""Every verb, run in-process on small random models and files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergevq import __version__
from mergevq.cli.main import VERBS, main
from mergevq.data.images import read_images, write_images
from mergevq.files import load_tensors, save_tensors
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import load_tokens, save_tokens


@pytest.fixture
def model(tiny_tokenizer: MergeVQ, tmp_path: Path) -> Path:
    return tiny_tokenizer.save_pretrained(tmp_path / "model.safetensors")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five images of 40 x 50 pixels."""
    coarse = torch.rand(5, 3, 4, 5, generator=torch.Generator().manual_seed(3)) * 2 - 1
    write_images(tmp_path / "photos", torch.nn.functional.interpolate(coarse, (40, 50), mode="bicubic").clamp(-1, 1))
    return tmp_path / "photos"


def _run(*words: str | Path) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_options_and_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb.split(), "--help"])
    assert not stop.value.code
    out, err = capsys.readouterr()
    assert f"usage: mergevq {verb}" in out and err == ""
    if verb != "info":
        assert "default: " in out and "--force" in out
    text = " ".join(out.replace("│", " ").split())
    assert not re.search(r"--[a-z-]+ \S+ \((required|default)", text), "every option is explained"


def test_help_lists_the_verbs_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    _run("--help")
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out and what in out for verb, (_, what) in VERBS.items())
    _run("--version")
    assert capsys.readouterr().out == f"mergevq {__version__}\n"
    _run("train", "--help")
    assert "train tokenizer" in capsys.readouterr().out


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "mergevq", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mergevq {__version__}\n")


def test_ctrl_c_while_the_parser_is_imported_is_one_line() -> None:
    code = (
        "import sys, mergevq.cli.main as m\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tyro': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.exit(m.main(['encode', '-h']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "mergevq: interrupted\n")


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, mergevq.cli.main as m\n"
        "try: m.main(['encode', '-h'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_encode_then_decode_gives_what_the_model_gives(
    tiny_tokenizer: MergeVQ, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "photos.mvq", tmp_path / "back"
    _run("encode", photos, "-o", file, "--model", model, "--num-tokens", "20", "--batch-size", "2")
    out = capsys.readouterr().out
    assert "5 images of 32 x 32 pixels" in out and "20 of 64 tokens an image, 6 bits a token" in out
    assert "440 bits an image: 120 index + 320 source map" in out
    images = read_images(photos, 32)
    assert load_tokens(file).equal(tiny_tokenizer.encode(images, 20))

    _run("decode", file, "-o", folder, "--model", model, "--batch-size", "2")
    assert [path.name for path in sorted(folder.iterdir())] == [f"{i:04d}.png" for i in range(5)]
    expected = tiny_tokenizer.reconstruct(images, 20).clamp(-1, 1)
    # One step of the 256 of a byte, for rounding.
    torch.testing.assert_close(read_images(folder, 32), expected, atol=1.01 / 127.5, rtol=0)

    _run("decode", file, "-o", tmp_path / "guess", "--model", model, "--predict-source")
    guess = tiny_tokenizer.decode(tiny_tokenizer.encode(images, 20).without_source()).clamp(-1, 1)
    torch.testing.assert_close(read_images(tmp_path / "guess", 32), guess, atol=1.01 / 127.5, rtol=0)


def test_encode_takes_one_image_another_size_and_the_models_k(model: Path, photos: Path, tmp_path: Path) -> None:
    _run("encode", photos / "0001.png", "-o", tmp_path / "one.mvq", "--model", model, "--size", "48")
    tokens = load_tokens(tmp_path / "one.mvq")
    assert (len(tokens), tokens.grid, tokens.num_tokens.tolist()) == (1, (12, 12), [20])


def test_encode_names_what_it_left_out(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "0002.png").write_bytes(b"no image")
    _run("encode", photos, "-o", tmp_path / "x.mvq", "--model", model)
    out, err = capsys.readouterr()
    assert "4 images of 32 x 32 pixels, 1 unreadable left out" in out
    assert err.startswith("mergevq: WARNING: ") and "0002.png" in err and err.count("\n") == 1


def test_eval_writes_json_and_a_page(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--network", "none", "--perceptual", "none", "--examples", "2", "--num-tokens", "10,40"]
    _run("eval", "reconstruction", photos, "-o", tmp_path / "result", "--model", model, *options)
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "result" / "reconstruction.json").read_text())
    assert [row["num_tokens"] for row in result["rows"]] == [40, 10]
    assert f"{result['rows'][0]['psnr']['mean']:.2f} ± " in out and "K = 40" in out
    page = (tmp_path / "result" / "report.html").read_text()
    # The plot, and per example an original with a reconstruction and a map for each K.
    assert page.count("<img ") == 1 + 2 * (1 + 2 * 2)


def test_info_tells_models_from_tokens(
    tiny_tokenizer: MergeVQ, model: Path, images: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run("info", model)
    out = capsys.readouterr().out
    assert tiny_tokenizer.fingerprint() in out and "tokenizer/1" in out and "32 x 32 pixels, 8 x 8 patches" in out
    assert f"decoder {sum(p.numel() for p in tiny_tokenizer.decoder.parameters()):,}" in out
    _run("info", model.parent)
    assert capsys.readouterr().out == out
    save_tokens(tmp_path / "x.mvq", tiny_tokenizer.encode(images, [20, 20, 5]))
    _run("info", tmp_path / "x.mvq")
    out = capsys.readouterr().out
    assert tiny_tokenizer.fingerprint() in out and "tokens/1" in out and "20, 5 an image, 6 bits each" in out
    # 15 tokens of 6 bits and (320 + 320 + 192) / 3 bits of source map, on average.
    assert "367 = 90 index + 277 source map (means)" in out
    tensors, header = load_tensors(model)
    del header["version"], header["sha256"]  # As files of old are.
    save_tensors(tmp_path / "other.safetensors", tensors, header)
    _run("info", tmp_path / "other.safetensors")
    assert re.search(r"^mergevq +unknown$", capsys.readouterr().out, re.MULTILINE)


def test_convert_reads_the_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = Path(__file__).parent.parent / "data" / "golden"
    options = json.loads((golden / "tok_meta.json").read_text())["tok_c_z10_nohead"]["ddconfig"]
    (tmp_path / "dd.json").write_text(json.dumps(options))
    weights, out = golden / "tok_c_z10_nohead.weights.safetensors", tmp_path / "m.safetensors"
    _run("convert", "--from", "release", weights, "--config", tmp_path / "dd.json", "-o", out)
    tok = MergeVQ.from_pretrained(out)
    assert tok.config.num_bits == 10 and tok.fingerprint()[:12] in capsys.readouterr().out
