"""The operator of the loss against a top-k teacher."""

from ..problem import Options, TopKInputs
from . import logits
from .register import LossOperator

topk_loss = LossOperator(
    "topk_loss",
    TopKInputs,
    Options,
    forward=logits.forward,
    gradient=logits.gradient,
    fake=logits.fake,
    students=("student",),
    outputs=2,
    kept=1,
)
