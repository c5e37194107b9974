"""Criteria: from the score matrix S, from feature maps or from the weights to one importance a unit."""

from attrfast.criteria.base import (
    Criterion,
    OwnPass,
    criterion_names,
    get_criterion,
    register_criterion,
)
from attrfast.criteria.causal_map import CausalMap
from attrfast.criteria.gradient import Attribution, Taylor, TaylorFO, TaylorGuided
from attrfast.criteria.iba import InformationBottleneck
from attrfast.criteria.reductions import REDUCTIONS, Reduction
from attrfast.criteria.weights import L1, L2, Random, WeightNorm

__all__ = [
    "L1",
    "L2",
    "REDUCTIONS",
    "Attribution",
    "CausalMap",
    "Criterion",
    "InformationBottleneck",
    "OwnPass",
    "Random",
    "Reduction",
    "Taylor",
    "TaylorFO",
    "TaylorGuided",
    "WeightNorm",
    "criterion_names",
    "get_criterion",
    "register_criterion",
]
