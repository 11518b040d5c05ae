"""What the function of a user's divergence may use besides arithmetic (:func:`declare_divergence`).

``tl`` is ``triton.language`` where Triton is installed; on PyTorch tensors the operations that have
a counterpart there stand for it (``tl.exp``, ``tl.log``, ``tl.sqrt``, ``tl.where``, ``tl.maximum``...).
``log`` is a fast natural logarithm of probabilities, finite at 0; ``share`` a quotient of
probabilities, 0 where both are 0.
"""

from .kernels.math import log, share
from .kernels.portable import device_function, tl

__all__ = ["device_function", "log", "share", "tl"]
