"""The README's Python runs as it stands, and its commands exist."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

import mergevq
from mergevq import presets
from mergevq.cli.main import VERBS, main
from mergevq.sampling import image_seeds
from mergevq.training.dry_run import count_parameters

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mergevq.write_images(tmp_path / "photos", torch.rand(2, 3, 80, 100) * 2 - 1)
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(.*?)```", README, re.S)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line]) == 8
    names: dict = {}
    exec(block[1], names)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    assert torch.equal(names["same"], names["tok"].decode(names["tokens"]))
    assert names["features"].shape == (2, 96)
    # 100 tokens of 12 bits and 256 patches of 7 bits, as the comment says.
    said = re.search(r"bit-packed: (\d+) bytes", block[1])
    assert said is not None
    assert int(said[1]) == -(-100 * 12 // 8) + 256 * 7 // 8


def test_the_commands_that_need_no_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mergevq.write_images(tmp_path / "photos", torch.rand(2, 3, 80, 100) * 2 - 1, ["cat", "dog"])
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```\n(mergevq encode photos .*?)```", README, re.S)
    assert block is not None
    commands = [line.split("#")[0].split()[1:] for line in block[1].splitlines()]
    assert [words[0] for words in commands] == ["encode", "decode", "show", "generate"]
    for words in commands:
        assert main(words) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.mvq", "decoded", "cat.png", "new"}
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 2


def test_the_block_that_generates_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict = {}
    exec(blocks[1], found)
    assert len([line for line in blocks[1].splitlines() if line]) == 7
    assert len(list((tmp_path / "emoji").glob("*.png"))) == 3
    tokens = found["tokens"]
    assert tokens.tokenizer == found["tok"].fingerprint()
    # An image depends on its seed and class, not on the others.
    seed = image_seeds(torch.Generator().manual_seed(0), 3)[2]
    assert found["gen"].generate([2], num_tokens=100, guidance=2.0, temperature=0.9, seeds=[seed]).equal(tokens[2])


def test_both_set_up_commands_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("make demo", "make test"):
        assert command in README
        assert f"\n{command.removeprefix('make ')}:" in makefile


def test_every_verb_of_the_readme_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = set(re.findall(r"^mergevq ([\w-]+)", README, re.M))
    told = "demo encode decode show cache-tokens cache-teacher generate train finetune eval convert info"
    assert verbs == {*told.split(" ")}
    for verb in verbs:
        # The parser leaves with exit status 0 after the help.
        with contextlib.suppress(SystemExit):
            main([verb, "--help"])
        assert "usage: mergevq" in capsys.readouterr().out


def test_every_verb_with_two_words_is_one() -> None:
    lines = re.search(r"```\n(mergevq demo .*?)```", README, re.S)
    assert lines is not None
    told = [line.split()[1:3] for line in lines[1].splitlines()]
    assert {words[0] if words[0] in VERBS else " ".join(words) for words in told} == set(VERBS)


def preset_rows(head: str) -> dict[str, str]:
    """Name and other cells of each row of the table whose head begins like this."""
    table = README.split(f"\n| preset | {head} |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M))


def test_the_generators_table_is_the_presets() -> None:
    rows = preset_rows("blocks")
    assert {*rows, *(f"{name}_random" for name in rows)} == set(presets.generator_names())
    for name, row in rows.items():
        model = presets.generator(name).model
        sizes = [
            f"{count_parameters(presets.generator(order))['generator'] / 1e6:.1f} M"
            for order in (name, f"{name}_random")
        ]
        assert row.split(" | ")[:4] == [f"{model.depth} + {model.group_depth}", str(model.width), *sizes]


def test_the_presets_table_is_the_presets() -> None:
    rows = preset_rows("pixels")
    assert tuple(rows) == presets.tokenizer_names()
    for name, row in rows.items():
        config = presets.tokenizer(name).model
        with torch.device("meta"):
            model = mergevq.MergeVQ(config)
        encoder, decoder = (
            f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for part in (model.encoder, model.decoder)
        )
        cells = row.split(" | ")
        numbers = [config.image_size, config.downsampling, config.num_patches, config.num_tokens, config.num_bits]
        assert cells[:5] == [str(n) for n in numbers]
        assert cells[5] == f"{encoder} + {decoder}"


def test_the_speed_tables_are_the_measured_ones() -> None:
    speed = README.split("## Speed")[1].split("## How it differs")[0]
    measured = (ROOT / "benchmarks" / "results" / "cpu.md").read_text().splitlines()
    rows = [line for line in speed.splitlines() if line.startswith("|")]
    assert len(rows) >= 3 * 3
    assert set(rows) <= set(measured)
