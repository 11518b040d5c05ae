"""The divergences: frozen dataclasses with their parameters, device function and facts.

Units are nats. ``q`` is the student's distribution, ``p`` the teacher's, both at the loss's
temperature. The formulas and their gradients are in ``kernels/divergences.py``, once, for the
GPU and the CPU alike; MiniLLM (arXiv:2306.08543), GKD (arXiv:2306.13649) and Hinton et al.
(arXiv:1503.02531) are their sources.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from .kernels import divergences as formulas

DIVERGENCES: dict[str, type["Divergence"]] = {}


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: a device function and the facts that the kernels need.

    Attributes:
        name: its name as a string argument, ``divergence="forward_kl"``.
        value_and_slope: device function ``(log_q, log_p, q, p, *parameters) -> (value, slope)``.
        moment: which sum over the first sweep gives the loss ("soft", "forward", "reverse"), or
            "none"; semantics of closed moments in ``kernels/sweeps.py``.
        infinite_at_student_zero: the value is infinite where q = 0 < p.
        infinite_at_teacher_zero: the value is infinite where p = 0 < q.
    """

    name: ClassVar[str]
    value_and_slope: ClassVar[Callable]
    moment: ClassVar[str] = "none"
    infinite_at_student_zero: ClassVar[bool] = False
    infinite_at_teacher_zero: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if not isinstance(name, str):
            raise TypeError(f"{cls.__name__} needs a class attribute name, a string of its own")
        if name in DIVERGENCES:
            raise ValueError(
                f"{cls.__name__}: a divergence is called {name!r} already, "
                f"{DIVERGENCES[name].__name__}; choose another name"
            )
        DIVERGENCES[name] = cls

    @property
    def parameters(self) -> tuple[float, ...]:
        return tuple(float(getattr(self, name)) for name in self.__match_args__)

    def canonical(self) -> "Divergence":
        """The divergence that this one is at an end point of its parameters, or itself."""
        return self


def _check_number(name: str, value: float, expected: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def _check_share(name: str, value: float) -> None:
    _check_number(name, value, "a number in [0, 1]")
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """``-sum(p log q)``: MiniLLM's fine-tuning loss.

    Forward KL plus the teacher's entropy, which has no gradient."""

    name = "soft_cross_entropy"
    value_and_slope = staticmethod(formulas.soft_cross_entropy)
    moment = "soft"
    infinite_at_student_zero = True


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``sum(p log(p / q))``, KL(teacher || student): covers the teacher's modes."""

    name = "forward_kl"
    value_and_slope = staticmethod(formulas.forward_kl)
    moment = "forward"
    infinite_at_student_zero = True


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``sum(q log(q / p))``, KL(student || teacher): seeks the teacher's modes."""

    name = "reverse_kl"
    value_and_slope = staticmethod(formulas.reverse_kl)
    moment = "reverse"
    infinite_at_teacher_zero = True


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q``.

    GKD's generalised Jensen-Shannon divergence. By its convention ``beta=0`` is the forward and
    ``beta=1`` the reverse KL (the formula itself goes to 0 there).

    Raises:
        ValueError: beta is not a number in [0, 1].
    """

    beta: float = 0.5

    name = "jensen_shannon"
    value_and_slope = staticmethod(formulas.jensen_shannon)

    def __post_init__(self) -> None:
        _check_share("beta", self.beta)

    def canonical(self) -> Divergence:
        if self.beta == 0:
            return ForwardKL()
        return ReverseKL() if self.beta == 1 else self


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """``(1 - weight) KL(p || q) + weight KL(q || p)``: Jeffreys' divergence, halved, at 0.5.

    Raises:
        ValueError: weight is not a number in [0, 1].
    """

    weight: float = 0.5

    name = "symmetric_kl"
    value_and_slope = staticmethod(formulas.symmetric_kl)
    infinite_at_student_zero = True
    infinite_at_teacher_zero = True

    def __post_init__(self) -> None:
        _check_share("weight", self.weight)


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """``KL(p || alpha p + (1 - alpha) q)``: DistiLLM's skew KL (arXiv:2402.03898).

    ``alpha=0`` is the forward KL.

    Raises:
        ValueError: alpha is not a number in [0, 1].
    """

    alpha: float = 0.1

    name = "skew_forward_kl"
    value_and_slope = staticmethod(formulas.skew_forward_kl)

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)

    def canonical(self) -> Divergence:
        return ForwardKL() if self.alpha == 0 else self


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """``KL(q || alpha q + (1 - alpha) p)``: DistiLLM's skew reverse KL (arXiv:2402.03898).

    ``alpha=0`` is the reverse KL.

    Raises:
        ValueError: alpha is not a number in [0, 1].
    """

    alpha: float = 0.1

    name = "skew_reverse_kl"
    value_and_slope = staticmethod(formulas.skew_reverse_kl)

    def __post_init__(self) -> None:
        _check_share("alpha", self.alpha)

    def canonical(self) -> Divergence:
        return ReverseKL() if self.alpha == 0 else self


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """``sum(abs(q - p)) / 2``; the subgradient is 0 where q = p."""

    name = "total_variation"
    value_and_slope = staticmethod(formulas.total_variation)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """ABKD's alpha-beta divergence (arXiv:2505.04560).

    ``-sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b)``. Its limits ``(1, 0)`` and
    ``(0, 1)`` are the forward and the reverse KL.

    Raises:
        ValueError: alpha and beta are neither both positive nor one of the two limits.
    """

    alpha: float = 0.2
    beta: float = 0.7

    name = "alpha_beta"
    value_and_slope = staticmethod(formulas.alpha_beta)

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            _check_number(name, value, "a positive number")
        positive = 0 < self.alpha < math.inf and 0 < self.beta < math.inf
        if not positive and (self.alpha, self.beta) not in ((1, 0), (0, 1)):
            raise ValueError(
                f"alpha and beta must both be positive and finite, or (1, 0) or (0, 1), "
                f"got ({self.alpha}, {self.beta})"
            )

    def canonical(self) -> Divergence:
        if self.beta == 0:
            return ForwardKL()
        return ReverseKL() if self.alpha == 0 else self


def as_divergence(divergence: "Divergence | str") -> Divergence:
    """A divergence from itself or its name.

    Raises:
        ValueError: no divergence has this name.
        TypeError: neither a name nor a Divergence.
    """
    if isinstance(divergence, Divergence):
        return divergence.canonical()
    if isinstance(divergence, str):
        if divergence in DIVERGENCES:
            return DIVERGENCES[divergence]().canonical()
        raise ValueError(
            f"divergence must be one of {', '.join(sorted(DIVERGENCES))} "
            f"or a Divergence, got {divergence!r}"
        )
    raise TypeError(
        f"divergence must be a name or a Divergence such as JensenShannon(beta=0.5), "
        f"got {type(divergence).__name__}"
    )
