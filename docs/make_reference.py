"""Writes docs/reference/: a page for each public module, from its signatures and docstrings.

Run from the repository's root: `python docs/make_reference.py`. The sources are read, not imported. Names
are public that a module lists in `__all__`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe
from griffe import DocstringSectionKind as Section

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
MODULES = (
    "attrfast",
    "attrfast.criteria",
    "attrfast.models",
    "attrfast.data",
    "attrfast.pictures",
    "attrfast.ops",
    "attrfast.reference",
)
NOTE = "*Written by `python docs/make_reference.py` from the docstrings.*"


def load() -> griffe.Object | griffe.Alias:
    """The package as its sources describe it."""
    # One line may explain several arguments, which the parser takes for an unknown name.
    quiet = {"warn_unknown_params": False, "warn_missing_types": False}
    return griffe.load(
        "attrfast", search_paths=[ROOT], docstring_parser="google", docstring_options=quiet
    )


def pages(package: griffe.Object | griffe.Alias) -> dict[str, str]:
    """File name -> text of every page."""
    found = {f"{module}.md": page(_module(package, module), module) for module in MODULES}
    found["README.md"] = index(package)
    return found


def _module(package: griffe.Object | griffe.Alias, path: str) -> griffe.Object | griffe.Alias:
    inside = path.partition(".")[2]
    return package[inside] if inside else package


def public(module: griffe.Object | griffe.Alias) -> list[griffe.Object | griffe.Alias]:
    """What a module exports and documents, functions and classes, in alphabetical order."""
    found = []
    for name in sorted(map(str, module.exports or ()), key=str.lower):
        item = _defined(module, name)
        if (item.is_function or item.is_class) and item.has_docstring:
            found.append(item)
    return found


def _defined(module: griffe.Object | griffe.Alias, name: str) -> griffe.Object | griffe.Alias:
    """The definition behind an exported name; a function may have the name of its package."""
    item = module[name]
    item = item.final_target if item.is_alias else item
    return _defined(item, name) if item.is_module and name in item.members else item


def index(package: griffe.Object | griffe.Alias) -> str:
    """The first page: every public name, and what it is for."""
    lines = ["# Reference", "", NOTE, ""]
    for path in MODULES:
        module = _module(package, path)
        lines += [f"## [{path}]({path}.md)", "", "| | |", "|---|---|"]
        for item in public(module):
            lines.append(
                f"| [`{item.name}`]({path}.md#{_anchor(path, item.name)}) | {_cell(_purpose(item))} |"
            )
        lines.append("")
    return "\n".join(lines)


def page(module: griffe.Object | griffe.Alias, path: str) -> str:
    """One module: its own words, then what it exports."""
    lines = [f"# {path}", "", NOTE, "", *_text(module.docstring.value.split("\n\n")[0]), ""]
    for item in public(module):
        lines += [f"## {path}.{item.name}", "", *_described(item)]
        if item.is_class:
            for member in _members(item):
                lines += [f"### {item.name}.{member.name}", "", *_described(member)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _members(item: griffe.Object | griffe.Alias) -> Iterator[griffe.Object | griffe.Alias]:
    for name, member in item.members.items():
        documented = member.has_docstring and not name.startswith("_")
        if documented and (member.is_function or "property" in member.labels):
            yield member


def _described(item: griffe.Object | griffe.Alias) -> Iterator[str]:
    yield from ("```python", _signature(item), "```", "")
    for section in item.docstring.parsed:
        if section.kind is Section.text:
            yield from (*_text(section.value), "")
        elif section.kind in (Section.parameters, Section.attributes):
            heading = "argument" if section.kind is Section.parameters else "attribute"
            yield from (f"| {heading} | |", "|---|---|")
            for entry in section.value:
                yield f"| `{entry.name}` | {_cell(entry.description)} |"
            yield ""
        elif section.kind is Section.returns:
            words = " ".join(_result(entry) for entry in section.value)
            yield from (f"**Returns** {words}", "")
        elif section.kind is Section.raises:
            yield from ("| raises | where |", "|---|---|")
            for entry in section.value:
                yield f"| `{entry.annotation}` | {_cell(entry.description)} |"
            yield ""
        elif section.kind is Section.admonition:
            yield from (f"**{section.title}** {_line(section.value.description)}", "")
        else:
            raise SystemExit(f"{item.path}: a section of kind {section.kind.value} is not written yet")


def _result(entry: griffe.DocstringReturn) -> str:
    # "PruneResult: the smaller model" names a type; the parser gives it apart from the words.
    named = entry.name or (str(entry.annotation) if entry.annotation else "")
    known = named and re.search(rf"\b{re.escape(named)}\b", str(entry.description)) is None
    words = _line(entry.description)
    return f"`{named}`: {words}" if known and entry.name else words


def _signature(item: griffe.Object | griffe.Alias) -> str:
    """As it stands in the source, each argument on a line where one line is too short."""
    if item.is_attribute:
        return f"{item.name}: {item.annotation}" if item.annotation else str(item.name)
    parameters = list(item.parameters)
    if item.is_class or (parameters and parameters[0].name in ("self", "cls")):
        parameters = [p for p in parameters if p.name not in ("self", "cls")]
    words: list[str] = []
    starred = False
    for parameter in parameters:
        kind = parameter.kind
        if kind is griffe.ParameterKind.keyword_only and not starred:
            words.append("*")
            starred = True
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
        starred = starred or kind is griffe.ParameterKind.var_positional
        word = f"{stars.get(kind, '')}{parameter.name}"
        if parameter.annotation is not None:
            word += f": {parameter.annotation}"
        if parameter.default is not None and kind not in stars:
            word += (
                f" = {parameter.default}"
                if parameter.annotation is not None
                else f"={parameter.default}"
            )
        words.append(word)
    end = f" -> {item.returns}" if item.is_function and item.returns is not None else ""
    line = f"{item.name}({', '.join(words)}){end}"
    if len(line) <= 88:
        return line
    inside = "".join(f"    {word},\n" for word in words)
    return f"{item.name}(\n{inside}){end}"


def _purpose(item: griffe.Object | griffe.Alias) -> str:
    return item.docstring.value.split("\n\n")[0]


def _text(words: str) -> list[str]:
    return words.strip().splitlines()


def _line(words: str) -> str:
    return " ".join(words.split())


def _cell(words: str) -> str:
    return _line(words).replace("|", "\\|")


def _anchor(path: str, name: str) -> str:
    return re.sub(r"[^\w-]", "", f"{path}.{name}".lower())


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages(load()).items():
        (FOLDER / name).write_text(text)
        print(FOLDER / name, file=sys.stderr)


if __name__ == "__main__":
    main()
