"""Methods of pruning side by side, on the same footing."""

from attrfast.compare.comparison import ClassRow, Comparison, Row, Spread
from attrfast.compare.published import Published, published
from attrfast.compare.records import Cell, CellKey, ClassCount, Failure, Measured, Start, StartKey
from attrfast.compare.run import compare

__all__ = [
    "Cell",
    "CellKey",
    "ClassCount",
    "ClassRow",
    "Comparison",
    "Failure",
    "Measured",
    "Published",
    "Row",
    "Spread",
    "Start",
    "StartKey",
    "compare",
    "published",
]
