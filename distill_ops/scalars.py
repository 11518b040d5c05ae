"""Single values as users pass them: numbers, integers, flags and words, refused or made Python's own.

A NumPy scalar and a 0-d CPU tensor serve where a Python number does."""

import difflib
import numbers

import torch

INT64 = -(2**63), 2**63 - 1


def _python(name: str, value, expected: str):
    """A number of another library as Python's; what is no number is returned as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        if value.requires_grad:
            raise ValueError(f"{name} requires grad, but gets no gradient here: detach it")
        if torch.compiler.is_compiling() or type(value) is not torch.Tensor or not value.is_cpu:
            raise TypeError(
                f"{name} must be {expected}, got a 0-d tensor on {value.device}, whose value cannot be "
                f"read without waiting for it (or while tracing): pass a Python number"
            )
        return value.item()
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def number(name: str, value: float, expected: str) -> float:
    """Raises TypeError for what is no real number, ValueError for one that no float holds."""
    if not isinstance(value, (int, float)):
        value = _python(name, value, expected)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be {expected}, got an integer of {value.bit_length()} bits"
        ) from None


def integer(name: str, value: int, low: int, high: int | None = None) -> int:
    """``value`` where it lies in ``[low, high]``."""
    expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if not isinstance(value, (int, torch.SymInt)):
        value = _python(name, value, f"an int {expected}")
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int {expected}, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value``, which is True or False: the truth of a word such as "false" is not what it says."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def one_of(name: str, value: str, allowed: tuple[str, ...], hints: dict[str, str] | None = None):
    """``value``, one of the words allowed; ``hints`` say what is meant by others."""
    if not isinstance(value, str) or value not in allowed:
        hint = hints.get(value, "") if hints and isinstance(value, str) else ""
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}"
            + (f": {hint}" if hint else meant(value, allowed))
        )
    return value


def meant(value: object, allowed) -> str:
    """The end of an error: the word that was meant, if one is near."""
    near = difflib.get_close_matches(value.lower(), allowed, 1) if isinstance(value, str) else []
    return f": did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value in an error, not longer than a line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print the largest
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
