"""What the function of a user's divergence may use besides arithmetic (:func:`declare_divergence`).

``tl`` is ``triton.language`` where Triton is installed; on PyTorch tensors the operations that have
a counterpart there stand for it (``tl.exp``, ``tl.log``, ``tl.sqrt``, ``tl.where``, ``tl.maximum``...).
``log`` is a fast natural logarithm of probabilities, finite at 0; ``share`` a quotient of
probabilities, 0 where both are 0.

Example:
    In a file, as Triton reads the function's text there::

        import torch
        from distill_ops import declare_divergence, distillation_loss
        from distill_ops.language import log, share

        @declare_divergence
        def k_divergence(log_q, log_p, q, p):
            middle = 0.5 * (q + p)
            value = q * (log_q - log(middle))
            return value, value + q - 0.5 * q * share(q, middle)

        student, teacher = torch.zeros(3, 40), torch.randn(3, 40)
        loss = distillation_loss(student, teacher, divergence=k_divergence())
"""

from .kernels.math import log, share
from .kernels.portable import device_function, tl

__all__ = ["device_function", "log", "share", "tl"]
