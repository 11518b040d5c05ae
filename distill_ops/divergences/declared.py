"""Divergences of a user's own: one function, and every path has them."""

import dataclasses
import inspect
import types
from collections.abc import Callable

from ..kernels.portable import device_function
from ..scalars import flag, number, shown
from .base import Divergence, Domain

COLUMN = ("log_q", "log_p", "q", "p")


def _numbers(function: Callable) -> list[inspect.Parameter]:
    """The function's parameters after the four of a column."""
    arguments = list(inspect.signature(function).parameters.values())
    positional = all(a.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for a in arguments)
    if not positional or tuple(a.name for a in arguments[:4]) != COLUMN:
        raise TypeError(
            f"{function.__name__} must take (log_q, log_p, q, p, *parameters by name), "
            f"got {inspect.signature(function)}"
        )
    return arguments[4:]


def _require_source(function: Callable) -> None:
    """Triton reads a function's text, and its names from its module."""
    if function.__name__ == "<lambda>":
        raise ValueError(
            "declare_divergence got a lambda, which has no name and no text of its own: define the "
            "function by def"
        )
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        raise ValueError(
            f"{function.__name__} uses local variables of the function around it ({names}), which a "
            f"GPU kernel cannot: make them parameters of the divergence"
        )
    try:
        inspect.getsource(function)
    except (OSError, TypeError):
        raise ValueError(
            f"{function.__name__} has no source file, which a GPU kernel is compiled from: define "
            f"it in a file and import it"
        ) from None


def _intervals(domains: dict[str, tuple[float, float]] | None) -> dict[str, Domain]:
    if domains is None:
        return {}
    if not isinstance(domains, dict):
        raise TypeError(f"domains must be a dict of intervals, got {type(domains).__name__}")
    intervals = {}
    for name, ends in domains.items():
        if not isinstance(name, str):
            raise TypeError(f"domains must be by the parameters' names, got {shown(name)}")
        if not isinstance(ends, (tuple, list)) or len(ends) != 2:
            raise ValueError(
                f"domains[{name!r}] must be an interval (low, high), got {shown(ends)}"
            )
        low, high = (number(f"domains[{name!r}]", end, "a pair of numbers") for end in ends)
        if not low < high:
            raise ValueError(f"domains[{name!r}] must be (low, high), low below high, got {ends}")
        intervals[name] = Domain(low, high)
    return intervals


def declare_divergence(
    function: Callable | None = None,
    *,
    name: str | None = None,
    domains: dict[str, tuple[float, float]] | None = None,
    infinite_at_student_zero: bool = False,
    infinite_at_teacher_zero: bool = False,
) -> type[Divergence] | Callable[[Callable], type[Divergence]]:
    """Make a divergence of a function, for every loss here, on the CPU and on the GPU.

    ``sum(value)`` over the vocabulary is the divergence, and ``slope = d value / d log_q``.
    A function of one column goes in; a :class:`Divergence` class with its parameters comes out.

    Example:
        In a file, as Triton reads the function's text there::

            import torch
            from distill_ops import declare_divergence, distillation_loss
            from distill_ops.language import tl

            @declare_divergence
            def squared_hellinger(log_q, log_p, q, p):
                root = tl.exp(0.5 * (log_q + log_p))
                return 0.5 * (q + p) - root, 0.5 * (q - root)

            student, teacher = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
            loss = distillation_loss(student, teacher, divergence=squared_hellinger())
            loss.backward()

    ``log_q``, ``q`` are the student's and ``log_p``, ``p`` the teacher's log-probability (nats) and
    probability of a column; the slope goes through ``q`` too (``dq / dlog_q = q``).

    The function is compiled for the GPU and run on PyTorch tensors alike: it may use arithmetic,
    ``tl`` and what else :mod:`distill_ops.language` offers, other functions decorated with
    ``device_function`` and module-level ``tl.constexpr`` numbers, but no Python control flow. Where
    a probability underflows to 0 its logarithm is the lowest finite number, so ``q * log_q`` is 0;
    prefer ``tl.exp(0.5 * log_q)`` to ``tl.sqrt(q)``, whose derivative is infinite at 0. Verify it by
    :func:`distill_ops.check_divergence`.

    Args:
        function: ``(log_q, log_p, q, p, *parameters) -> (value, slope)``, defined in a file.
            Parameters after the fourth are the divergence's own, with their defaults.
        name: for ``divergence="name"``; the function's own name by default.
        domains: for a parameter's name, the open interval in which its values lie.
        infinite_at_student_zero: value is infinite where q = 0 < p; ``infinities="drop"`` leaves
            these columns out.
        infinite_at_teacher_zero: value is infinite where p = 0 < q; ``infinities="drop"`` restricts
            the student to the teacher's support.

    Returns:
        A :class:`Divergence` subclass, called like the function: ``squared_hellinger()``, or
        ``my_divergence(alpha=0.3)``; its parameters may be numbers or tensors.

    Raises:
        TypeError: the signature is another, or an argument's type.
        ValueError: the function has no name (a lambda) or no source file, or uses local variables; the
            name is taken or no word; domains name no parameter, or no interval.
    """

    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name must be a word such as 'my_divergence', got {shown(name)}")
    intervals = _intervals(domains)
    flag("infinite_at_student_zero", infinite_at_student_zero)
    flag("infinite_at_teacher_zero", infinite_at_teacher_zero)

    def declare(function: Callable) -> type[Divergence]:
        if not isinstance(function, types.FunctionType):
            raise TypeError(f"declare_divergence takes a function, got {type(function).__name__}")
        numbers = _numbers(function)
        _require_source(function)
        unknown = set(intervals) - {parameter.name for parameter in numbers}
        if unknown:
            raise ValueError(f"domains names no parameter: {', '.join(sorted(unknown))}")
        defaults = [dataclasses.MISSING if x.default is x.empty else x.default for x in numbers]
        fields = [
            (x.name, object, dataclasses.field(default=default))
            for x, default in zip(numbers, defaults, strict=True)
        ]
        namespace = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "name": name or function.__name__,
            "value_and_slope": staticmethod(device_function(function)),
            "domains": intervals,
            "infinite_at_student_zero": infinite_at_student_zero,
            "infinite_at_teacher_zero": infinite_at_teacher_zero,
        }
        return dataclasses.make_dataclass(
            function.__name__, fields, bases=(Divergence,), namespace=namespace, frozen=True
        )

    return declare if function is None else declare(function)
