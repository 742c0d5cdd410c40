"""The names of `import mergevq`: they are there, type checkers see the same ones, and what is told is public."""

import ast
import re
from pathlib import Path

import mergevq


def test_every_public_name_is_there() -> None:
    assert [name for name in mergevq.__all__ if getattr(mergevq, name, None) is None] == []
    assert set(mergevq.__all__) <= set(dir(mergevq))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(mergevq.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == mergevq._PUBLIC | dict.fromkeys(mergevq._SUBMODULES, "mergevq")


def test_what_the_documents_call_is_public() -> None:
    root = Path(__file__).parents[2]
    told = set()
    for page in (root / "README.md", *(root / "docs").glob("*.md")):
        # Calls such as mergevq.read_images(...); paths of modules go on with a dot.
        told |= set(re.findall(r"\bmergevq\.([A-Za-z_]\w*)(?=\()", page.read_text()))
    assert told
    assert told <= set(mergevq.__all__)
