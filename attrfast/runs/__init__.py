"""A pruning run as a folder: `attrfast prune` makes it, and `attrfast.report` reads it."""

from attrfast.runs.folder import RunFolder
from attrfast.runs.settings import PruneSettings
from attrfast.runs.work import Outcome, carry_out

__all__ = ["Outcome", "PruneSettings", "RunFolder", "carry_out"]
