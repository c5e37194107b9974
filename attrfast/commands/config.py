"""Options from a TOML file: a table a command, keys under the options' names."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from attrfast.errors import InputError

_TABLES = "attrfast.tables"


def tables(ctx: typer.Context) -> dict[str, dict[str, Any]]:
    """The sub-tables of the command's table, such as `[prune.finetune]`, without their `epochs`."""
    found: dict[str, dict[str, Any]] = ctx.meta.get(_TABLES, {})
    return found


def read_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Makes the values of a file the defaults of the command's options.

    Raises:
        InputError: the file can't be read, or has a key that is no option.
    """
    if file is None or ctx.resilient_parsing:
        return file
    try:
        tree = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read as TOML: {error}") from error
    group = ctx.parent.command if ctx.parent is not None else ctx.command
    for name, table in tree.items():
        _require_known(file, f"[{name}]" if isinstance(table, dict) else name, name, _commands(group))
    command = str(ctx.info_name)
    values = tree.get(command)
    if not isinstance(values, dict):
        raise InputError(f"{file} has no table [{command}]")
    options = {str(p.name): p for p in ctx.command.params if p.name not in ("config", "help")}
    defaults: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for written, value in values.items():
        key = written.replace("-", "_")
        _require_known(file, f"[{command}] {written}", key, options)
        if isinstance(value, dict):
            value = _table(file, command, key, value, inner)
            if value is None:
                continue
        several = getattr(options[key], "nargs", 1) == -1 or getattr(options[key], "multiple", False)
        defaults[key] = ",".join(map(str, value)) if isinstance(value, list) and not several else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    ctx.meta[_TABLES] = inner
    return file


def _table(
    file: Path, command: str, key: str, value: dict[str, Any], inner: dict[str, dict[str, Any]]
) -> Any:
    """Sorts a sub-table into `inner`, and gives its `epochs`, the value of the option itself."""
    from attrfast.runs.settings import TABLES

    if command != "prune" or key not in TABLES:
        raise InputError(f"{file}: [{command}.{key}] must be one value, and is a table")
    for name in value:
        _require_known(file, f"[{command}.{key}] {name}", name, vars(TABLES[key]))
    inner[key] = {name: v for name, v in value.items() if name != "epochs"}
    return value.get("epochs")


def _require_known(file: Path, written: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise InputError(f"{file}: {written} is not known; did you mean {near[0]!r}?")


def _commands(group: Any) -> list[str]:
    return list(getattr(group, "commands", {}))
