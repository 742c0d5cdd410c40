"""No field of a run is without effect: the package reads each of them, from what has it."""

import ast
import re
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_type_hints

import pytest

import mergevq
from mergevq.training.config import TokenizerOptimConfig, TokenizerRun
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.recovery_config import RecoveryRun

ROOT = Path(mergevq.__file__).parent


def parts_of(cls: type) -> dict[type, set[str]]:
    """Every dataclass of a run's configuration, with the names of the fields that hold it."""
    hints = get_type_hints(cls)
    found: dict[type, set[str]] = {}
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found.setdefault(hints[f.name], set()).add(f.name)
            for part, names in parts_of(hints[f.name]).items():
                found.setdefault(part, set()).update(names)
    return found


def last_name(node: ast.AST) -> str:
    """`loop` of `self.run.loop`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


class Scope(NamedTuple):
    """A function of the package."""

    module: Path
    node: ast.FunctionDef
    owner: str
    """The class it is a method of; empty for others."""


@cache
def scopes() -> list[Scope]:
    found = []
    for path in ROOT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in tree.body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            owner = node.name if isinstance(node, ast.ClassDef) else ""
            found += [Scope(path, f, owner) for f in inside if isinstance(f, ast.FunctionDef)]
    return found


def fields_read(cls: type, holders: set[str]) -> set[str]:
    """Names that are read from anything that looks like a `cls`: by its field's name, by annotation, by assignment."""
    kinds = {kind.__name__ for kind in cls.__mro__}
    properties = {name for kind in cls.__mro__ for name, value in vars(kind).items() if isinstance(value, property)}
    read: set[str] = set()
    for module, scope, owner in scopes():
        own = owner in kinds
        if module.name.endswith(("config.py", "presets.py", "release.py")) and not (own and scope.name in properties):
            continue
        names = holders | {"self"} if own else set(holders)
        arguments = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]
        names |= {
            a.arg for a in arguments if a.annotation and kinds & set(re.findall(r"\w+", ast.unparse(a.annotation)))
        }
        nodes = list(ast.walk(scope))
        for node in nodes:
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts, strict=True))
                names |= {t.id for t, v in pairs if isinstance(t, ast.Name) and last_name(v) in names}
        read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and last_name(n.value) in names}
        calls = [n for n in nodes if isinstance(n, ast.Call) and last_name(n.func) == "getattr"]
        if any(last_name(call.args[0]) in names for call in calls):
            read |= set(re.findall(r'"(\w+)"', module.read_text()))
    return read


def unread(run: type) -> list[str]:
    found = []
    for cls, holders in parts_of(run).items():
        read = fields_read(cls, holders)
        found += [f"{cls.__name__}.{f.name}" for f in fields(cls) if f.name not in read]
    return found


@pytest.mark.parametrize("run", [TokenizerRun, RecoveryRun, FinetuneRun])
def test_every_field_of_a_run_is_read_somewhere(run: type) -> None:
    assert unread(run) == []


def test_a_field_that_nobody_reads_is_found() -> None:
    @dataclass(frozen=True)
    class More(TokenizerOptimConfig):
        shape: int = 0
        path: str = ""

    # Words that the package is full of, of other things.
    assert {f.name for f in fields(More)} - fields_read(More, {"optim"}) == {"shape", "path"}
