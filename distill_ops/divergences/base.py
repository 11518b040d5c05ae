"""What a divergence is: a frozen dataclass with its parameters, device function and facts.

Units are nats. ``q`` is the student's distribution, ``p`` the teacher's, both at the loss's
temperature.

A parameter is a number, or a tensor: 0-d, or one value a token, ``[...]``. Numbers and tensors
alike are run-time values of the kernels; a tensor's values may change without a trace of it in a
graph of ``torch.compile`` or a captured CUDA graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..kernels.portable import on_tensors
from ..scalars import meant, number, shown

DIVERGENCES: dict[str, type["Divergence"]] = {}

Parameter = float | torch.Tensor
PARAMETER_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64

KL = "'forward_kl' (of the teacher from the student) or 'reverse_kl' (of the student from the teacher)"
JSD = "'jensen_shannon', or JensenShannon(beta=...)"
# what others, and the literature, call the divergences
NAMES_ELSEWHERE = {
    "kl": KL, "kld": KL, "kl_div": KL, "kl_divergence": KL,
    "fkl": "'forward_kl'", "kd": "'forward_kl'", "rkl": "'reverse_kl'",
    "js": JSD, "jsd": JSD, "gjs": JSD, "generalized_jsd": JSD, "js_divergence": JSD,
    "tv": "'total_variation'", "tvd": "'total_variation'",
    "ce": "'soft_cross_entropy', or hard_label_weight=1 for the labels alone",
    "cross_entropy": "'soft_cross_entropy', or hard_label_weight=1 for the labels alone",
    "soft_ce": "'soft_cross_entropy'", "sce": "'soft_cross_entropy'",
    "jeffreys": "'symmetric_kl'", "skl": "'symmetric_kl'", "sym_kl": "'symmetric_kl'",
    "sfkl": "'skew_forward_kl'", "skew_kl": "'skew_forward_kl'",
    "srkl": "'skew_reverse_kl'", "skew_rkl": "'skew_reverse_kl'",
    "ab": "'alpha_beta'", "abkd": "'alpha_beta'", "ab_divergence": "'alpha_beta'",
}  # fmt: skip


class Domain(NamedTuple):
    """Where a parameter's values lie: between ``low`` and ``high``; whether a number, and whether a
    tensor's value, may be at an end. An end that is another divergence is for numbers alone: it is
    routed there before any kernel runs."""

    low: float = -math.inf
    high: float = math.inf
    number_ends: bool = False
    tensor_ends: bool = False

    def __str__(self) -> str:
        return self.text(self.number_ends)

    def text(self, ends: bool) -> str:
        if self.high == math.inf:
            return "finite" if self.low == -math.inf else f"greater than {self.low:g} and finite"
        left, right = "[]" if ends else "()"
        return f"in {left}{self.low:g}, {self.high:g}{right}"


SHARE = Domain(0, 1, number_ends=True)


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: a device function and the facts that the kernels need.

    The nine built-in ones are subclasses; :func:`distill_ops.declare_divergence` makes one from a
    function.

    Attributes:
        name: its name as a string argument, ``divergence="forward_kl"``.
        value_and_slope: device function ``(log_q, log_p, q, p, *parameters) -> (value, slope)``.
        moment: which sum over the first sweep gives the loss ("soft", "forward", "reverse",
            "symmetric"), or "none"; semantics of closed moments in ``kernels/sweeps.py``.
        operands: what the function takes before its parameters (``kernels/terms.py``): "logs", as
            above, "ratio", "difference", "pair", "student" or "powers".
        infinite_at_student_zero: the value is infinite where q = 0 < p.
        infinite_at_teacher_zero: the value is infinite where p = 0 < q.
        additive_at_teacher_zero: where p = 0, or restricted to where it is not, the value is
            proportional to q, so that columns of p = 0 can be summed to one.
        domains: where each parameter's values lie.

    Example:
        >>> from distill_ops import Divergence, JensenShannon
        >>> divergence = JensenShannon(beta=0.1)
        >>> isinstance(divergence, Divergence), divergence.name, divergence.parameters
        (True, 'jensen_shannon', (0.1,))
    """

    name: ClassVar[str]
    value_and_slope: ClassVar[Callable]
    moment: ClassVar[str] = "none"
    operands: ClassVar[str] = "logs"
    infinite_at_student_zero: ClassVar[bool] = False
    infinite_at_teacher_zero: ClassVar[bool] = False
    additive_at_teacher_zero: ClassVar[bool] = False
    domains: ClassVar[dict[str, Domain]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if not isinstance(name, str):
            raise TypeError(f"{cls.__name__} needs a class attribute name, a string of its own")
        other = DIVERGENCES.get(name)
        place = lambda kind: f"{kind.__module__}.{kind.__qualname__}"
        # the same text again is a module loaded again
        if other is not None and place(other) != place(cls):
            raise ValueError(
                f"{cls.__name__}: a divergence is called {name!r} already, {place(other)}; "
                f"choose another name"
            )
        DIVERGENCES[name] = cls

    def __post_init__(self) -> None:
        if type(self) is Divergence:
            raise TypeError(
                "Divergence is what the divergences have in common: pass one of them, such as "
                "JensenShannon(beta=0.5), or make one by declare_divergence"
            )
        for name, value in zip(self.__match_args__, self.parameters, strict=True):
            domain = self.domain(name)
            if isinstance(value, torch.Tensor):
                _check_tensor(name, value)
                continue
            expected = f"a number {domain}, or a tensor of them (0-d, or one a token)"
            value = number(name, value, expected)
            self.check_number(name, value, domain)
            object.__setattr__(self, name, value)  # a NumPy scalar is Python's from here on

    def check_number(self, name: str, value: float, domain: Domain) -> None:
        inside = domain.low < value < domain.high
        at_end = value in (domain.low, domain.high) and math.isfinite(value)
        if not inside and not (domain.number_ends and at_end):  # also refuses NaN
            raise ValueError(f"{name} must lie {domain}, got {value}")

    @classmethod
    def domain(cls, name: str) -> Domain:
        return cls.domains.get(name, Domain())

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)

    @property
    def numbers(self) -> tuple[float | None, ...]:
        """The parameters, None for those that are tensors."""
        return tuple(None if isinstance(p, torch.Tensor) else float(p) for p in self.parameters)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The parameters that are tensors, in order."""
        return [p for p in self.parameters if isinstance(p, torch.Tensor)]

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Divergence":
        """The same with ``function`` applied to the parameters that are tensors."""
        of_tensor = lambda x: function(x) if isinstance(x, torch.Tensor) else x
        return type(self)(*map(of_tensor, self.parameters))

    def column_parameters(self, dtype: torch.dtype) -> list[Parameter]:
        """The parameters as they go with ``[..., vocab]`` columns."""
        return column_parameters(self.parameters, dtype)

    @classmethod
    def on_columns(
        cls, log_q: torch.Tensor, log_p: torch.Tensor, parameters: list[Parameter]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope of columns whose log-probabilities are these: the text of
        ``value_and_slope`` on tensors. The logarithm of a zero is the lowest finite number."""
        q, p = log_q.exp(), log_p.exp()
        columns = cls._operands(log_q, log_p, q, p)
        terms = on_tensors(cls.value_and_slope)(*columns, *parameters)
        if not (isinstance(terms, tuple) and len(terms) == 2):
            raise TypeError(f"{cls.name} must return (value, slope), got {type(terms).__name__}")
        return tuple(torch.as_tensor(x, device=q.device, dtype=q.dtype) for x in terms)

    @classmethod
    def _operands(cls, log_q, log_p, q, p) -> tuple[torch.Tensor, ...]:
        if cls.operands == "logs":
            return log_q, log_p, q, p
        log_ratio = log_p - log_q
        if cls.operands == "ratio":
            return log_ratio, q, p
        if cls.operands == "difference":
            return log_ratio, p - q, q
        lowest = torch.finfo(q.dtype).min
        log2_ratio = (log_ratio / math.log(2)).clamp(lowest, -lowest)
        if cls.operands == "powers":
            return log2_ratio, torch.maximum(log_q, log_p) / math.log(2)
        ratio = torch.exp(-log_ratio.abs())
        return (log2_ratio, ratio, q) if cls.operands == "student" else (log2_ratio, ratio, q, p)

    def canonical(self) -> "Divergence":
        """The divergence that this one is at an end point of its parameters, or itself."""
        return self


def column_parameters(parameters: tuple[Parameter, ...], dtype: torch.dtype) -> list[Parameter]:
    """As they go with ``[..., vocab]`` columns: numbers, ``[]``, or those of rows ``[..., 1]``."""
    found = []
    for value in parameters:
        if isinstance(value, torch.Tensor):
            value = value.to(dtype)[..., None] if value.dim() else value.to(dtype)
        found.append(value)
    return found


def is_number(parameter: Parameter, value: float) -> bool:
    return not isinstance(parameter, torch.Tensor) and parameter == value


def _check_tensor(name: str, value: torch.Tensor) -> None:
    if value.dtype not in PARAMETER_DTYPES:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {value.dtype}")
    if value.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient here: detach it")


def _by_name(name: str) -> Divergence:
    """A divergence with its defaults.

    Raises:
        ValueError: a parameter has none."""
    kind = DIVERGENCES[name]
    try:
        return kind()
    except TypeError as error:
        raise ValueError(
            f"divergence={name!r} has parameters without a default ({', '.join(kind.__match_args__)}): "
            f"pass {kind.__qualname__}(...)"
        ) from error


def as_divergence(divergence: "Divergence | str") -> Divergence:
    """A divergence from itself or its name, routed to the one that it is at an end point."""
    if isinstance(divergence, str):
        if divergence not in DIVERGENCES:
            other = NAMES_ELSEWHERE.get(divergence.lower().replace("-", "_"))
            hint = f": pass {other}" if other else meant(divergence, DIVERGENCES)
            raise ValueError(
                f"divergence must be one of {', '.join(sorted(DIVERGENCES))} "
                f"or a Divergence, got {shown(divergence)}{hint}"
            )
        divergence = _by_name(divergence)
    if not isinstance(divergence, Divergence):
        raise TypeError(
            f"divergence must be a name or a Divergence such as JensenShannon(beta=0.5), "
            f"got {type(divergence).__name__}"
        )
    return divergence.canonical()
