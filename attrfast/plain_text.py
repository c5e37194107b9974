"""Tables as plain text, for summaries that are printed anywhere. Must not know what stands in them."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def as_text(*parts: RenderableType, width: int) -> str:
    """What rich prints without colours, in lines of `width` characters, without blanks at their ends."""
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
