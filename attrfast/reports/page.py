"""The page of a run: one HTML file with everything inside, and the pictures beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from attrfast import pictures
from attrfast.errors import BackendError, InputError
from attrfast.map_pictures import draw_maps
from attrfast.reports import parts
from attrfast.reports.gathered import Gathered, gather


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report of a pruning run: one HTML page that needs no network, and pictures.

    The page shows the accuracy and size step by step, the layers' widths, the scores of all filters, the
    accuracy of every class, what extreme filters see, the time and memory spent, and the command that
    repeats the run. What the folder does not hold is left out, with a word.

    Args:
        run: folder of `attrfast prune`; or one that `result.save` or `prune(output_dir=...)` wrote.
        out: the file to write; None: `report.html` in the folder. Its pictures go into a folder of its
            name without the ending, beside it.

    Returns:
        The file.

    Raises:
        InputError: the folder holds no run, or the file can't be written.
        BackendError: jinja2 or matplotlib is not installed.
    """
    found = gather(run)
    file = found.root / "report.html" if out is None else Path(out)
    text = render(found)
    beside = file.with_suffix("")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        for name, draw in _pictures(found):
            draw(beside / f"{name}.png")
        file.write_text(text)
    except OSError as error:
        raise InputError(f"{file} can't be written: {error}; give another file") from error
    return file


def render(found: Gathered) -> str:
    """The page as text."""
    try:
        import jinja2
    except ImportError as error:
        raise BackendError(
            f"reports need jinja2, which could not be imported ({error}); pip install jinja2"
        ) from error
    files = resources.files("attrfast.reports")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files / "page.html").read_text())
    figures = found.figures
    return template.render(
        style=(files / "style.css").read_text(),
        name=found.root.resolve().name,
        criterion=found.criterion,
        stopped=found.stopped,
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        tiles=parts.tiles(found),
        curve=parts.curve(found.history),
        history=found.history,
        widths=parts.widths(found.gates),
        strips=parts.strips(found),
        classes=parts.classes(figures.classes),
        maps=parts.maps(found),
        image=None if found.maps is None else parts.image_uri(found.maps.image),
        image_class=figures.image_class,
        spent=parts.spent(found),
        phases=parts.phases(figures.phases),
        command=shlex.join(figures.command),
        settings=found.settings,
        environment=figures.environment,
    )


def _pictures(found: Gathered) -> Iterator[tuple[str, Any]]:
    """Name and drawer of every picture that there is something for."""
    yield "trade_off", lambda path: pictures.trade_off(found.history, path)
    if found.gates:
        yield "kept_filters", lambda path: pictures.kept_filters(found, path)
    scores = parts.drawable_scores(found.scores)
    if scores is not None:
        yield "score_distributions", lambda path: pictures.score_distributions(scores, path)
    classes = parts.classes(found.figures.classes)
    if classes:
        yield "class_accuracy", lambda path: pictures.class_accuracy(classes, path)
    phases = found.figures.phases
    if phases:
        yield "time_and_memory", lambda path: pictures.time_and_memory(phases, path)
    stored = found.maps
    if stored is not None:
        for seen in stored.layers:
            name = re.sub(r"[^\w.-]", "_", seen.layer)
            yield f"maps-{name}", lambda path, seen=seen: draw_maps(seen, stored.image, path)
