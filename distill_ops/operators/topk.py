"""The operator of the loss against a top-k teacher."""

from ..problem import TopKInputs
from .logits import loss_operator

topk_loss = loss_operator("topk_loss", TopKInputs)
