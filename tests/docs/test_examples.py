"""What prose claims is executed: examples, code blocks, links, and tables that repeat what the code says."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import mergevq
from mergevq import presets
from mergevq.convert import config_from_release
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.merging import merge_schedule
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import LossWeights, flat_config
from mergevq.training.dry_run import count_parameters

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Pages whose code needs nothing but the package.
EXECUTED = ("docs/method.md", "docs/evaluation.md")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def table_rows(page: str) -> list[list[str]]:
    """The cells of every table row of a page."""
    lines = (ROOT / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


# ------------------------------------------------------------------------------------------------------------- examples


@pytest.fixture
def model_file(tiny_config: TokenizerConfig, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    return MergeVQ(tiny_config).save_pretrained(tmp_path / "model.safetensors")


def run_example(name: str, *arguments: object) -> None:
    runpy.run_path(str(ROOT / "examples" / name))["main"]([str(argument) for argument in arguments])


def test_round_trip_draws_what_the_model_draws(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_example("round_trip.py", "--model", model_file, "--num-tokens", "20,5", "--images", 2, "--out", out)
    tok = MergeVQ.from_pretrained(model_file)
    originals = mergevq.read_images(out / "original", size=32)
    for k in (20, 5):
        tokens = mergevq.load_tokens(out / f"{k}.mvq")
        # The originals were bytes, so their PNG files hold exactly what was encoded.
        assert tokens.equal(tok.encode(originals, k))
        mergevq.write_images(tmp_path / f"again_{k}", tok.decode(tokens))
        drawn = mergevq.read_images(out / str(k), size=32)
        assert torch.equal(drawn, mergevq.read_images(tmp_path / f"again_{k}", size=32))
    # 20 tokens of 6 bits; a map of 64 patches to 20 tokens takes 5 bits each.
    assert "K = 20: 120 + 320 bits" in capsys.readouterr().out


def test_round_trip_runs_without_a_model(tmp_path: Path) -> None:
    run_example("round_trip.py", "--num-tokens", "16", "--images", 1, "--out", tmp_path / "out")
    tokens = mergevq.load_tokens(tmp_path / "out" / "16.mvq")
    assert tokens.num_tokens.tolist() == [16]
    assert tokens.grid == (16, 16)


@pytest.fixture
def generator_file(model_file: Path, tmp_path: Path) -> Path:
    config = MergeVQ.from_pretrained(model_file).config
    groups = (config.num_bits // 2, config.num_bits - config.num_bits // 2)
    torch.manual_seed(2)
    model = MergeAR(
        GeneratorConfig(
            grid=(8, 8),
            num_bits=config.num_bits,
            groups=groups,
            num_classes=2,
            class_names=("a", "b"),
            num_tokens=16,
            width=32,
            depth=1,
            group_depth=1,
            heads=2,
        )
    )
    for head in model.transformer.heads.parameters():
        torch.nn.init.normal_(head)
    return model.save_pretrained(tmp_path / "generator.safetensors")


def test_generate_draws_the_same_images_from_both_caches(
    model_file: Path, generator_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheets" / "generated.png"
    models = ("--generator", generator_file, "--tokenizer", model_file)
    run_example("generate.py", *models, "--classes", "b,0", "--guidance", "1,3", "--out", out)
    printed = capsys.readouterr().out
    assert printed.count("2 of 2 images equal") == 2
    with Image.open(out) as sheet:
        assert sheet.width > 2 * 136 and sheet.height > 2 * 136


def test_compare_masks_trains_each_rule_once(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "masks"
    words = ("--tokenizer", model_file, "--num-tokens", "20,10", "--preset", "tiny", "--steps", 2, "--batch-size", 2)
    words = (*words, "--seeds", 2, "--only", "paper,keep last,plain", "--images", 4, "--out", out)
    run_example("compare_masks.py", *words)
    first = capsys.readouterr().out
    rows = {row["rule"]: row for row in json.loads((out / "masks.json").read_text())["rows"]}
    assert set(rows) == {"R = 2, first (paper)", "keep last", "R = 8, keep last", "plain causal"}
    assert sorted(row["seeds"] for row in rows.values()) == [1, 1, 2, 2]
    assert rows["plain causal"]["keys seen"] == 1.0 > rows["keep last"]["keys seen"]
    run_example("compare_masks.py", *words)  # All runs are finished: they are read.
    assert capsys.readouterr().out.splitlines()[-6:] == first.splitlines()[-6:]


def test_a_shorter_compared_run_keeps_the_shares_of_its_parts() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "compare_variants.py"))
    for name, disc_start in (("g_64", 500), ("gr_64_d32", 5000)):  # The second has no discriminator.
        run = presets.tokenizer(name)
        short = example["of_length"](run, run.loop.steps // 10, 8)
        assert (short.loop.steps, short.loop.batch_size) == (run.loop.steps // 10, 8)
        assert (short.optim.warmup_steps, short.loss.disc_start) == (run.optim.warmup_steps // 10, disc_start)
        assert short.optim.ema_decay == pytest.approx(run.optim.ema_decay**10)


@pytest.mark.slow
def test_compare_variants_trains_each_once_and_measures_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 12), ("val", 6)):
        noise = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count)) * 2 - 1
        noise[::2, 0] = 1  # Every other image is red.
        for i, image in enumerate(noise):
            mergevq.write_images(tmp_path / part / "ab"[i % 2], image[None], [f"{i}.png"], force=True)
    words = ("--train", tmp_path / "train", "--val", tmp_path / "val", "--steps", 2, "--batch-size", 2, "--epochs", 5)
    words = (*words, "--only", "G+R; G+R, neither", "--images", 5, "--out", tmp_path / "out", "--device", "cpu")
    run_example("compare_variants.py", *words)
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "variants.json").read_text())["runs"]
    assert [row["run"] for row in rows] == ["G+R", "G+R, neither"]
    logs = [(tmp_path / "out" / name / "log.jsonl").read_text() for name in ("G_R", "G_R__neither")]
    assert ["alignment" in log for log in logs] == [True, False]
    assert [line.split(" | ")[1] for line in (tmp_path / "out" / "variants.md").read_text().splitlines()[4:7]] == [
        "64", "36", "16",
    ]  # fmt: skip
    assert first.count("random weights, class token, K = 64") == first.count("teacher lite0") == 1
    assert [row["reconstruction"]["protocol"]["images"] for row in rows] == [5, 5]
    warmup, ema = (json.loads((tmp_path / "out" / "G_R__neither" / "run.json").read_text())["config"]["optim"][name]
                   for name in ("warmup_steps", "ema_decay"))  # fmt: skip
    assert (warmup, round(ema, 3)) == (0, 0.082)  # Of 2,500 steps 200, and a memory of 500.
    assert set(rows[0]["speed"]) == {"64", "36", "16"} and all(x["encode"] > 0 for x in rows[0]["speed"].values())
    example = runpy.run_path(str(ROOT / "examples" / "compare_variants.py"))
    for row in rows:
        for value, place in (("psnr", 0), ("perceptual", 2), ("alignment", None)):
            aligned = row["run"] == "G+R" or value != "alignment"
            assert len(example["curve"](row["log"], value, place)) == (1 if aligned else 0), (row["run"], value)
    with Image.open(tmp_path / "out" / "curves.png") as curves:
        colours = {colour for _, colour in curves.convert("RGB").getcolors(1 << 24)}
        assert {(31, 119, 180), (255, 127, 14)} <= colours, "a curve of each run"
    run_example("compare_variants.py", *words)  # All is finished: it is read.
    assert capsys.readouterr().out.splitlines()[-6:] == first.splitlines()[-6:]
    run_example("compare_variants.py", *words, "--epochs", 6)  # Measured otherwise: it is measured again.
    rows = json.loads((tmp_path / "out" / "variants.json").read_text())["runs"]
    assert [row["measured"]["epochs"] for row in rows] == [6, 6]
    with pytest.raises(SystemExit, match="a run of other settings"):  # Nor is it taken for one of three images a step.
        run_example("compare_variants.py", *words[:6], "--batch-size", 3, *words[8:])


def test_token_map_shows_larger_tokens_at_smaller_k(model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps" / "map.png"
    run_example("token_map.py", "--model", model_file, "--num-tokens", "64,4", "--images", 2, "--out", out)
    with Image.open(out) as sheet:
        width, height = sheet.size
        # The last two columns of the first row: nothing merged, and four tokens.
        cells = [sheet.crop((width - n * 200, height - 400, width - n * 200 + 192, height - 208)) for n in (2, 1)]
    full, merged = (len(cell.quantize(64, dither=Image.Dither.NONE).getcolors()) for cell in cells)
    assert merged < full


# ------------------------------------------------------------------------------------------------------- code and links


def code_blocks(path: Path) -> list[tuple[int, str]]:
    """Line and text of every Python block."""
    text = path.read_text()
    found = re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1]) for match in found]


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_code_blocks_compile(path: Path) -> None:
    for line, code in code_blocks(path):
        compile("\n" * (line - 1) + code, str(path), "exec")


@pytest.mark.parametrize("page", EXECUTED)
def test_code_blocks_run(page: str) -> None:
    blocks = code_blocks(ROOT / page)
    assert blocks
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, page, "exec"), {})


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, root: Path = ROOT) -> list[str]:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"<(?:img|a)[^>]*(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (path.parent / name).resolve() if name else path
        inside = linked == root or root in linked.parents
        if not inside or not linked.exists() or (anchor and linked.suffix == ".md" and anchor not in anchors(linked)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_relative_links_resolve(path: Path) -> None:
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Laws of *K*\n[a](nowhere.md) [b](#nothing) [c](https://example.org) `[d](code.md)` [e](#laws-of-k)\n"
        '[f](page.md#laws-of-k) [g](../page.md) <img src="picture.png">\n'
    )
    assert broken_links(page, tmp_path) == ["nowhere.md", "#nothing", "../page.md", "picture.png"]


# ---------------------------------------------------------------------------------------------- tables against the code


def test_presets_table_is_the_presets() -> None:
    rows = {row[0].strip("`"): row[1:] for row in table_rows("docs/method.md") if len(row) == 10}
    names = set(presets.tokenizer_names())
    assert names <= rows.keys()
    for name in names:
        run = presets.tokenizer(name)
        model, counts = run.model, count_parameters(run)
        numbers = [model.image_size, model.downsampling, model.num_patches, model.num_tokens, model.num_bits]
        parts = [
            f"{counts[part]:,}" if part in counts else "–" for part in ("encoder", "decoder", "recovery", "alignment")
        ]
        assert rows[name] == [f"{number:,}" for number in numbers] + parts, name


def test_laws_of_k_are_the_presets() -> None:
    found = set()
    for row in table_rows("docs/method.md"):
        if len(row) == 2 and re.match(r"\d+ 0\.\d+,", row[1]):
            law = [pair.split() for pair in row[1].split(", ")]
            for name in re.findall(r"`(\w+)`", row[0]):
                loop = presets.tokenizer(name).loop
                probs = loop.num_tokens_probs or (1 / len(loop.num_tokens),) * len(loop.num_tokens)
                assert tuple(int(k) for k, _ in law) == loop.num_tokens, name
                assert [float(p) for _, p in law] == pytest.approx(probs, abs=6e-4), name
                assert presets.tokenizer(name).model.num_patches in loop.num_tokens
                found.add(name)
    assert found == set(presets.tokenizer_names())


def test_generator_table_is_the_presets() -> None:
    found = set()
    for row in table_rows("docs/method.md"):
        name = row[0].strip("`")
        if name in presets.generator_names() and len(row) == 8:
            run = presets.generator(name)
            model = run.model
            parts = [model.order, f"{model.depth} + {model.group_depth}", f"{model.width:,}", str(model.heads)]
            parts += [f"{model.ffn_width:,}", ", ".join(map(str, model.groups))]
            assert row[1:] == [*parts, f"{count_parameters(run)['generator']:,}"], name
            found.add(name)
    assert found == set(presets.generator_names())


def test_loss_table_is_the_presets_weights() -> None:
    rows = {row[0].strip("`"): row[1] for row in table_rows("docs/method.md") if len(row) == 3}
    weights = {name: presets.tokenizer(f"{name}_256").loss.weights for name in ("g", "gr", "r")}
    for name in LossWeights.__dataclass_fields__:
        values = {variant: getattr(weights[variant], name) for variant in weights}
        told = {float(number) for number in re.findall(r"\d+\.\d+", rows[name])}
        assert told == set(values.values()), name
    assert rows["recovery"].endswith(f"R {weights['r'].recovery}")
    assert rows["alignment"].endswith(f"G {weights['g'].alignment}")


def test_schedule_table_is_the_schedules() -> None:
    rows = {row[0]: row[2] for row in table_rows("docs/method.md") if len(row) == 3}
    for title, kind in (("`linear` (default)", "linear"), ("`constant`", "constant"), ("`squared`", "squared")):
        assert tuple(map(int, rows[title].split())) == merge_schedule(256, 144, 12, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(("preset", "kind"), [("gr_256", {}), ("r_256", {"isotropic": 768, "head_dim": 64})])
def test_table_of_converted_fields_is_the_conversion(preset: str, kind: dict[str, int]) -> None:
    options = {"z_channels": 18, "resolution": 256, "ch": 64, "ch_mult": (1, 1, 2, 4, 8), "num_att_blocks": 12}
    options |= {"num_res_blocks": 4, "dist_head": "layer3", "num_classes": 768, **kind}
    default = presets.tokenizer(preset).model
    options["merge_num"] = default.num_patches - default.num_tokens
    ours, theirs = flat_config(default), flat_config(config_from_release(options))
    rows = {row[0].strip("`"): row[1:3] for row in table_rows("docs/differences.md") if len(row) == 4 and "." in row[0]}
    rows = {name: row for name, row in rows.items() if name in ours}
    for name in ours:
        if ours[name] != theirs[name] and not (name.startswith("encoder.") and name != "encoder.position"):
            assert rows[name][0].strip("`") == str(theirs[name]).lower(), name
            assert rows[name][1].split()[-1].strip("`") == str(ours[name]).lower(), name
    always = {"merging.order", "merging.overflow", "quantizer.scope", "quantizer.eps", "recovery.enabled"}
    assert always <= {name for name in rows if ours[name] != theirs[name]}


# ------------------------------------------------------------------------------------------------ the tree and the rows


def tree_files() -> list[str]:
    """The files that the tree in docs/design.md names, relative to mergevq/."""
    block = re.search(r"```\nmergevq/\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    assert block is not None
    files, folder = [], ""
    for line in block[1].splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if indent == 2:
            folder = text if text.endswith("/") else ""
        files += [folder + name for name in re.findall(r"(?:(?<=^)|(?<=  ))(\w+\.py)(?= |$)", text)]
    return files


def test_the_tree_names_every_module_once() -> None:
    package = Path(mergevq.__file__).parent
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    modules = {name for name in modules if not name.endswith("/__init__.py")}
    assert sorted(tree_files()) == sorted(modules), "bring the tree in docs/design.md up to date"


def test_the_import_rows_are_the_enforced_ones() -> None:
    rows = re.search(r"```\n(__main__ > .*?)\n```", (ROOT / "docs" / "design.md").read_text())
    assert rows is not None
    told = [set(row.split(", ")) for row in rows[1].split(" > ")]
    for node in ast.parse((ROOT / "tests" / "unit" / "test_layering.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ROWS":
            assert told == [set(row.split()) for row in ast.literal_eval(node.value)]
            return
    pytest.fail("test_layering.py has no ROWS")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mergevq.__version__
    paper = citation["preferred-citation"]
    assert paper["title"].startswith("MergeVQ: ")
    assert len(paper["authors"]) == 11
    assert paper["url"].endswith("/2504.00999")
