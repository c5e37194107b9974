"""A run as one page that needs nothing else, and as pictures."""

from attrfast.reports.page import report

__all__ = ["report"]
