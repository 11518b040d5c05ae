"""Checks of single values, and of the tensors that come one entry a token.

Checks that would wait for the GPU (values of labels) run on CPU tensors, and on the GPU only
under ``set_debug(True)``.
"""

import math
from typing import NamedTuple

import torch

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "triton", "torch")
GRADIENTS = ("auto", "forward", "backward")

_debug = False


def set_debug(enabled: bool) -> None:
    """Switch the checks that wait for the GPU on or off.

    ``True``: calls read ids, labels and parameters on the GPU and refuse those out of range.
    A bool goes in; without it (the default) no call waits for a GPU to look at values.

    Example:
        >>> import distill_ops
        >>> distill_ops.set_debug(True)
        >>> distill_ops.set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


# modes in which tensors stand for values: torch.compile's parts, FakeTensorMode, make_fx
TRACING = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


def traced(tensors: list[torch.Tensor]) -> bool:
    """Whether tensors stand for values, which no branch can depend on: while tracing, or of a batch
    under vmap."""
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, TRACING)):
        return True
    batched = torch._C._functorch.is_batchedtensor
    return any(x.is_meta or batched(x) or hasattr(x, "fake_mode") for x in tensors)


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether values of all of them may be checked: where that waits for no GPU, or in debug mode."""
    if torch.compiler.is_compiling():
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    if traced(given):
        return False
    return _debug or all(tensor.device.type == "cpu" for tensor in given)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def number(name: str, value: float, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return float(value)


def check_share(name: str, value: float, expected: str = "a number in [0, 1]") -> float:
    share = number(name, value, expected)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return share


def check_integer(name: str, value: int, low: int, high: int | None = None) -> int:
    expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int {expected}, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_temperature(temperature: float) -> float:
    temperature = number("temperature", temperature, "a positive number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 1e-18 <= temperature <= 1e18:  # its square and inverse must be float32 numbers
        raise ValueError(f"temperature must lie in [1e-18, 1e18], got {temperature}")
    return temperature


def constant(name: str, tensor: torch.Tensor, advice: str = "detach it") -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient here: {advice}")


def of_teacher(name: str, tensor: torch.Tensor) -> None:
    """What a teacher's forward gave, which is a constant; where no graph is made it may require grad."""
    if torch.is_grad_enabled():
        constant(name, tensor, "detach it, or run the teacher under torch.no_grad()")


class TokenRows(NamedTuple):
    """The tensor ``[..., n]`` whose rows are the tokens, with the user's name for it."""

    name: str
    tensor: torch.Tensor

    def check_leading(self, name: str, leading: torch.Size) -> None:
        expected = self.tensor.shape[:-1]
        if leading != expected:
            raise ValueError(
                f"{name} must have the leading shape of {self.name}, "
                f"{tuple(expected)}, got {tuple(leading)}"
            )

    def check_device(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.tensor.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but {self.name} on {self.tensor.device}: "
                f"move one of them"
            )

    def check_per_token(self, name: str, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor [...], got {type(tensor).__name__}")
        self.check_leading(name, tensor.shape)
        self.check_device(name, tensor)
