"""attrfast: structured filter pruning by fast attribution.

scores = attrfast.attribute(model, loader)
result = attrfast.prune(model, loader, max_macs=0.5)
"""

from attrfast.compare import Comparison, compare
from attrfast.criteria import Criterion, criterion_names, register_criterion
from attrfast.engine import attribute
from attrfast.errors import (
    AttrfastError,
    BackendError,
    DistributedError,
    InputError,
    ModelError,
    NumericalError,
    OutOfMemoryError,
    TargetError,
)
from attrfast.evaluate import Evaluation, evaluate
from attrfast.finetune import FineTune
from attrfast.history import Step
from attrfast.measure import Measurement
from attrfast.pruner import prune
from attrfast.recipe import Recipe
from attrfast.recorder import ScoreRecorder
from attrfast.reports import report
from attrfast.result import PruneResult
from attrfast.saving import load, read_recipe
from attrfast.scores import Scores

__version__ = "0.1.0"

__all__ = [
    "AttrfastError",
    "BackendError",
    "Comparison",
    "Criterion",
    "DistributedError",
    "Evaluation",
    "FineTune",
    "InputError",
    "Measurement",
    "ModelError",
    "NumericalError",
    "OutOfMemoryError",
    "PruneResult",
    "Recipe",
    "ScoreRecorder",
    "Scores",
    "Step",
    "TargetError",
    "attribute",
    "compare",
    "criterion_names",
    "evaluate",
    "load",
    "prune",
    "read_recipe",
    "register_criterion",
    "report",
]
