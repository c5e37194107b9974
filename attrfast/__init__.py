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
    InputError,
    ModelError,
    NumericalError,
    TargetError,
)
from attrfast.evaluate import Evaluation, evaluate
from attrfast.finetune import FineTune
from attrfast.pruner import prune
from attrfast.result import PruneResult, Step
from attrfast.scores import Scores

__version__ = "0.1.0"

__all__ = [
    "AttrfastError",
    "BackendError",
    "Comparison",
    "Criterion",
    "Evaluation",
    "FineTune",
    "InputError",
    "ModelError",
    "NumericalError",
    "PruneResult",
    "Scores",
    "Step",
    "TargetError",
    "attribute",
    "compare",
    "criterion_names",
    "evaluate",
    "prune",
    "register_criterion",
]
