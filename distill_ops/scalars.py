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
        try:
            if not torch.compiler.is_compiling() and value.is_cpu:
                return value.item()
        except RuntimeError:  # of a tensor that stands for values, in its own words
            pass
        raise TypeError(
            f"{name} must be {expected}, got a 0-d tensor on {value.device} or one that is traced or "
            f"mapped, whose value cannot be read: pass a Python number"
        )
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    try:
        return float(value) if isinstance(value, numbers.Real) else value
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}") from None


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
    """``value`` where it lies in ``[low, high]``; without ``high`` 64 bits hold it."""
    expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if not isinstance(value, (int, torch.SymInt)):
        value = _python(name, value, f"an int {expected}")
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int {expected}, got {type(value).__name__}")
    if not low <= value <= (INT64[1] if high is None else high):
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
        word = value.lower().replace("-", "").replace("_", "") if isinstance(value, str) else ""
        hint = hints.get(word, "") if hints else ""
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}"
            + (f": {hint}" if hint else meant(value, allowed))
        )
    return value


def meant(value: object, allowed) -> str:
    """The end of an error: the word that was meant, if one is near."""
    if not isinstance(value, str) or torch.compiler.is_compiling():  # which cannot trace difflib
        return ""
    near = difflib.get_close_matches(value.lower(), allowed, 1)
    return f": did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """A value in an error, not longer than a line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print the largest
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
