"""Criteria: from the score matrix S, feature maps, weights or training to one importance a unit."""

from attrfast.criteria.activation import ActivationCriterion, APoZ, HRank
from attrfast.criteria.base import (
    Criterion,
    OwnPass,
    criterion_names,
    get_criterion,
    has_own_pass,
    register_criterion,
    same_objective,
)
from attrfast.criteria.batch_norm import BNScale
from attrfast.criteria.causal_map import CausalMap
from attrfast.criteria.curvature import OBD
from attrfast.criteria.gradient import Attribution, Taylor, TaylorFO, TaylorGuided
from attrfast.criteria.iba import InformationBottleneck
from attrfast.criteria.reductions import MEAN, REDUCTIONS, Reduction
from attrfast.criteria.soft import Soft
from attrfast.criteria.sss import SSS
from attrfast.criteria.trained import Learnt, Phase, TrainedCriterion, Trainee
from attrfast.criteria.variational import Variational
from attrfast.criteria.weights import FPGM, L1, L2, Random, WeightNorm

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "MEAN",
    "OBD",
    "REDUCTIONS",
    "SSS",
    "APoZ",
    "ActivationCriterion",
    "Attribution",
    "BNScale",
    "CausalMap",
    "Criterion",
    "HRank",
    "InformationBottleneck",
    "Learnt",
    "OwnPass",
    "Phase",
    "Random",
    "Reduction",
    "Soft",
    "Taylor",
    "TaylorFO",
    "TaylorGuided",
    "TrainedCriterion",
    "Trainee",
    "Variational",
    "WeightNorm",
    "criterion_names",
    "get_criterion",
    "has_own_pass",
    "register_criterion",
    "same_objective",
]
