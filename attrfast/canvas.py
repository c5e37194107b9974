"""The look that all pictures share, and the files that they are drawn into.

matplotlib is imported when a picture is drawn, and never opens a window.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from attrfast.errors import BackendError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Path = str | os.PathLike[str]

INK, MUTED, _RULE = "#1f2933", "#7b8794", "#e4e7eb"
KEPT, GONE = "#2166ac", "#d5dde5"
BLANK: Final = {
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 1.0,
}  # hides the grid behind text
_STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


@contextmanager
def figure_for(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` x `height` inches, saved to `path` on leaving.

    Raises:
        BackendError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            f"pictures need matplotlib, which could not be imported ({error}); "
            f'pip install "attrfast[data]"'
        ) from error
    # A figure without pyplot: no global state, and no window system.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path)


@contextmanager
def axes_for(path: Path, width: float, height: float) -> Iterator[Axes]:
    """One set of axes that fills a figure, see `figure_for`."""
    with figure_for(path, width, height) as figure:
        yield figure.add_subplot()
