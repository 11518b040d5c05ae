"""The operator of the dense loss."""

from ..problem import DenseInputs, Options
from . import logits
from .register import LossOperator

dense_loss = LossOperator(
    "dense_loss",
    DenseInputs,
    Options,
    forward=logits.forward,
    gradient=logits.gradient,
    fake=logits.fake,
    students=("student",),
    outputs=2,
    kept=1,
    inplace=True,
)
