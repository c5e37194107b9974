"""The reference is what the sources say, and explains every argument."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

griffe = pytest.importorskip("griffe", reason="needs the extra attrfast[dev]")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(maker: ModuleType) -> None:
    expected = maker.pages(maker.load())
    written = {path.name: path.read_text() for path in maker.FOLDER.iterdir()}
    assert written.keys() == expected.keys()
    stale = [name for name in expected if written[name] != expected[name]]
    assert not stale, f"run python docs/make_reference.py: {stale}"


def test_every_argument_of_a_public_function_is_explained(maker: ModuleType) -> None:
    package = maker.load()
    unexplained = []
    functions = 0
    for path in maker.MODULES:
        for item in maker.public(maker._module(package, path)):
            # What an op means stands with its definition, once.
            text = " ".join(item.docstring.value.lower().split())
            if not item.is_function or "see `attrfast.reference." in text:
                continue
            functions += 1
            explained = {
                name.strip()
                for section in item.docstring.parsed
                if section.kind is griffe.DocstringSectionKind.parameters
                for entry in section.value
                for name in entry.name.split(",")
            }
            names = {p.name for p in item.parameters}
            unexplained += [f"{item.path}: {name}" for name in names - explained]
    assert functions >= 25
    assert not unexplained
