"""The nine built-in divergences. Their formulas are in ``kernels/divergences.py``, once, for the GPU and
the CPU alike; MiniLLM (arXiv:2306.08543), GKD (arXiv:2306.13649) and Hinton et al. (arXiv:1503.02531)
are their sources.
"""

from dataclasses import dataclass

from ..kernels import divergences as formulas
from .base import DIVERGENCES, SHARE, Divergence, Domain, Parameter, is_number


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """``-sum(p log q)``: MiniLLM's fine-tuning loss.

    Forward KL plus the teacher's entropy, which has no gradient.

    Example:
        >>> import torch
        >>> from distill_ops import SoftCrossEntropy, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=SoftCrossEntropy()).item(), 4)
        1.001
    """

    name = "soft_cross_entropy"
    value_and_slope = staticmethod(formulas.soft_cross_entropy)
    additive_at_teacher_zero = True
    moment = "soft"
    infinite_at_student_zero = True


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``sum(p log(p / q))``, KL(teacher || student): covers the teacher's modes.

    Example:
        >>> import torch
        >>> from distill_ops import ForwardKL, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=ForwardKL()).item(), 4)
        0.095
    """

    name = "forward_kl"
    value_and_slope = staticmethod(formulas.forward_kl)
    additive_at_teacher_zero = True
    moment = "forward"
    operands = "ratio"
    infinite_at_student_zero = True


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``sum(q log(q / p))``, KL(student || teacher): seeks the teacher's modes.

    Example:
        >>> import torch
        >>> from distill_ops import ReverseKL, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=ReverseKL()).item(), 4)
        0.0627
    """

    name = "reverse_kl"
    value_and_slope = staticmethod(formulas.reverse_kl)
    additive_at_teacher_zero = True
    moment = "reverse"
    operands = "ratio"
    infinite_at_teacher_zero = True


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    GKD's generalised Jensen-Shannon divergence. By its convention ``beta=0`` is the forward and
    ``beta=1`` the reverse KL (the formula itself goes to 0 there); outside of [0, 1], ValueError.

    Example:
        >>> import torch
        >>> from distill_ops import JensenShannon, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=JensenShannon(beta=0.1)).item(), 4)
        0.008
    """

    beta: Parameter = 0.5

    name = "jensen_shannon"
    value_and_slope = staticmethod(formulas.jensen_shannon)
    additive_at_teacher_zero = True
    operands = "pair"
    domains = {"beta": SHARE}

    def canonical(self) -> Divergence:
        if is_number(self.beta, 0):
            return ForwardKL()
        return ReverseKL() if is_number(self.beta, 1) else self


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """``(1 - weight) KL(p || q) + weight KL(q || p)``: Jeffreys' divergence, halved, at 0.5.

    A weight outside of [0, 1] is a ValueError.

    Example:
        >>> import torch
        >>> from distill_ops import SymmetricKL, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=SymmetricKL(weight=0.25)).item(), 4)
        0.0869
    """

    weight: Parameter = 0.5

    name = "symmetric_kl"
    value_and_slope = staticmethod(formulas.symmetric_kl)
    additive_at_teacher_zero = True
    moment = "symmetric"
    operands = "difference"
    infinite_at_student_zero = True
    infinite_at_teacher_zero = True
    domains = {"weight": SHARE._replace(tensor_ends=True)}


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """``KL(p || alpha p + (1 - alpha) q)``: DistiLLM's skew KL (arXiv:2402.03898).

    ``alpha=0`` is the forward KL; outside of [0, 1], ValueError.

    Example:
        >>> import torch
        >>> from distill_ops import SkewForwardKL, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=SkewForwardKL(alpha=0.2)).item(), 4)
        0.0482
    """

    alpha: Parameter = 0.1

    name = "skew_forward_kl"
    value_and_slope = staticmethod(formulas.skew_forward_kl)
    additive_at_teacher_zero = True
    operands = "pair"
    domains = {"alpha": SHARE}

    def canonical(self) -> Divergence:
        return ForwardKL() if is_number(self.alpha, 0) else self


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """``KL(q || alpha q + (1 - alpha) p)``: DistiLLM's skew reverse KL (arXiv:2402.03898).

    ``alpha=0`` is the reverse KL; outside of [0, 1], ValueError.

    Example:
        >>> import torch
        >>> from distill_ops import SkewReverseKL, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=SkewReverseKL(alpha=0.2)).item(), 4)
        0.0451
    """

    alpha: Parameter = 0.1

    name = "skew_reverse_kl"
    value_and_slope = staticmethod(formulas.skew_reverse_kl)
    additive_at_teacher_zero = True
    operands = "student"
    domains = {"alpha": SHARE}

    def canonical(self) -> Divergence:
        return ReverseKL() if is_number(self.alpha, 0) else self


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """``sum(abs(q - p)) / 2``; the subgradient is 0 where q = p.

    Example:
        >>> import torch
        >>> from distill_ops import TotalVariation, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=TotalVariation()).item(), 4)
        0.1051
    """

    name = "total_variation"
    value_and_slope = staticmethod(formulas.total_variation)
    additive_at_teacher_zero = True


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """ABKD's alpha-beta divergence (arXiv:2505.04560).

    ``-sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b)``. Its limits ``(1, 0)`` and
    ``(0, 1)`` are the forward and the reverse KL.

    Example:
        >>> import torch
        >>> from distill_ops import AlphaBeta, distillation_loss
        >>> student, teacher = torch.tensor([[[1.0, 2.0, -1.0]], [[0.5, 1.5, 0.0]]])
        >>> round(distillation_loss(student, teacher, divergence=AlphaBeta(alpha=0.5, beta=0.5)).item(), 4)
        0.0761

    Raises:
        ValueError: alpha or beta is not positive and finite, and they are not one of the limits.
    """

    alpha: Parameter = 0.2
    beta: Parameter = 0.7

    name = "alpha_beta"
    value_and_slope = staticmethod(formulas.alpha_beta)
    operands = "powers"
    domains = {"alpha": Domain(0), "beta": Domain(0)}

    def check_number(self, name: str, value: float, domain: Domain) -> None:
        limits = ((1, 0), (0, 1))
        if not any(all(map(is_number, self.parameters, limit)) for limit in limits):
            super().check_number(name, value, domain)

    def canonical(self) -> Divergence:
        if is_number(self.beta, 0):
            return ForwardKL()
        return ReverseKL() if is_number(self.alpha, 0) else self


BUILT_IN = dict(DIVERGENCES)  # by name, before a user declares any
