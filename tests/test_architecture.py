"""Imports run one way, as the page on the architecture says, and the page knows every file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "attrfast"
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def layers() -> list[list[str]]:
    """The rows of the page's table, lowest first."""
    table = PAGE.partition("| layer | files |")[2].partition("\n\n")[0]
    return [re.findall(r"`(\w+)`", row.split("|")[2]) for row in table.strip().splitlines()[1:]]


def modules() -> list[str]:
    """Files and folders of the package, by name."""
    inside = [p.stem for p in PACKAGE.glob("*.py")] + [
        p.parent.name for p in PACKAGE.glob("*/__init__.py")
    ]
    return sorted({*inside, "kernels"} - {"__init__"})


def imported(name: str) -> set[str]:
    """What a module, or any file of a package, imports when it is loaded."""
    folder = {"kernels": ROOT / "kernels"}.get(name, PACKAGE / name)
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{name}.py"]
    found: set[str] = set()
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("attrfast"):
                continue
            path = (node.module or "").split(".")[1:]
            found |= {path[0]} if path else {alias.name for alias in node.names}
    return found & set(modules()) - {name}


def test_the_page_names_every_module_once() -> None:
    assert sorted(name for layer in layers() for name in layer) == modules()


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_nothing_above_its_layer(name: str) -> None:
    order = {each: row for row, layer in enumerate(layers()) for each in layer}
    assert {other for other in imported(name) if order[other] > order[name]} == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    left = {name: imported(name) for name in modules()}
    while True:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        if not free:
            break
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left
