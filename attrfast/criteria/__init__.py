"""Criteria: from the score matrix S, from feature maps or from the weights to one importance a unit."""

from attrfast.criteria.activation import ActivationCriterion, APoZ, HRank
from attrfast.criteria.base import (
    Criterion,
    OwnPass,
    criterion_names,
    get_criterion,
    register_criterion,
    same_objective,
)
from attrfast.criteria.causal_map import CausalMap
from attrfast.criteria.curvature import OBD
from attrfast.criteria.gradient import Attribution, Taylor, TaylorFO, TaylorGuided
from attrfast.criteria.iba import InformationBottleneck
from attrfast.criteria.reductions import MEAN, REDUCTIONS, Reduction
from attrfast.criteria.weights import L1, L2, Random, WeightNorm

__all__ = [
    "L1",
    "L2",
    "MEAN",
    "OBD",
    "REDUCTIONS",
    "APoZ",
    "ActivationCriterion",
    "Attribution",
    "CausalMap",
    "Criterion",
    "HRank",
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
    "same_objective",
]
