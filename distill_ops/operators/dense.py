"""The operator of the dense loss, which may overwrite the student's logits."""

from ..problem import DenseInputs
from .logits import loss_operator

dense_loss = loss_operator("dense_loss", DenseInputs, inplace=True)
