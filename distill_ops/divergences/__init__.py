"""The divergences: what one is, the nine built-in ones, and a user's own."""

from .base import DIVERGENCES, Divergence, Domain, as_divergence, column_parameters
from .built_in import (
    BUILT_IN,
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SoftCrossEntropy,
    SymmetricKL,
    TotalVariation,
)
from .declared import declare_divergence

__all__ = [
    "BUILT_IN",
    "DIVERGENCES",
    "AlphaBeta",
    "Divergence",
    "Domain",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftCrossEntropy",
    "SymmetricKL",
    "TotalVariation",
    "as_divergence",
    "column_parameters",
    "declare_divergence",
]
