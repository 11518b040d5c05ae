"""Checks of single values, and of the tensors that come one entry a token.

Checks that would wait for the GPU (values of labels) run on CPU tensors, and on the GPU only
under ``set_debug(True)``.
"""

import math
import os
from typing import NamedTuple

import torch

from ..problem import leading_of_all
from ..scalars import INT64, flag, integer, number

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# floats of 8 bits have no arithmetic, quantized and complex numbers are no weights
WEIGHT_DTYPES = (
    *LOGIT_DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
PLAIN = (torch.Tensor, torch.nn.Parameter)
BACKENDS = ("auto", "triton", "torch")


def debug_of_environment() -> bool:
    given = os.environ.get("DISTILL_OPS_DEBUG", "0")
    if given not in ("", "0", "1"):
        raise ValueError(f"the environment's DISTILL_OPS_DEBUG must be 0 or 1, got {given!r}")
    return given == "1"


_debug = debug_of_environment()


def set_debug(enabled: bool) -> None:
    """Switch the checks that wait for the GPU on or off.

    ``True``: calls read masks, labels, ids, parameters and a teacher's slots there and refuse wrong ones.
    A bool goes in; without it (the default) no call waits for a GPU to look at values.

    Example:
        >>> import distill_ops
        >>> distill_ops.set_debug(True)
        >>> distill_ops.set_debug(False)

    Ranks that split a vocabulary then compare their arguments before each call, one collective more.

    ``DISTILL_OPS_DEBUG=1`` in the environment does it from the start. On a CPU these checks are always
    on, under ``torch.compile`` and ``vmap`` too: weights and normalizer that are no finite numbers, ids and
    labels outside the vocabulary, indices outside the teacher's rows, repeated ids, log-probabilities above
    0 or whose probabilities add up to more than rounding leaves, parameters outside of their domain, and
    more tokens than ``kept_tokens``.
    """
    global _debug
    _debug = flag("enabled", enabled)


def debug() -> bool:
    """Whether the checks that wait are on."""
    return _debug


# modes in which tensors stand for values: torch.compile's parts, FakeTensorMode, make_fx
TRACING = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


def traced(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for values, on which no branch can depend."""
    return tensor.is_meta or (type(tensor) not in PLAIN and hasattr(tensor, "fake_mode"))


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether values of all of them may be checked: where that waits for no GPU, or in debug mode."""
    if torch.compiler.is_compiling():
        return False
    transform = torch._C._functorch.peek_interpreter_stack()  # which wraps what it is given
    if transform is not None:
        return False
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, TRACING)):
        return False
    for tensor in tensors:
        if tensor is not None and (traced(tensor) or not (_debug or tensor.is_cpu)):
            return False
    return True


def check_share(name: str, value: float, expected: str = "a number in [0, 1]") -> float:
    share = number(name, value, expected)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return share


def check_temperature(temperature: float) -> float:
    temperature = number("temperature", temperature, "a positive number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not 1e-18 <= temperature <= 1e18:  # its square and inverse must be float32 numbers
        raise ValueError(f"temperature must lie in [1e-18, 1e18], got {temperature}")
    return temperature


def check_ignore_index(ignore_index: int) -> int:
    return integer("ignore_index", ignore_index, *INT64)


def check_plain(name: str, tensor: torch.Tensor, whole: str | None = None) -> None:
    """A tensor is one of numbers in memory, at strides; ``whole`` says what serves for a DTensor.

    Raises:
        TypeError: it is another thing, a DTensor, nested, sparse or a negative view.
    """
    if type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_nested:
        # whose memory, which the kernels read, holds the negatives; a graph resolves them itself
        if not torch.compiler.is_compiling() and tensor.is_neg():
            raise TypeError(f"{name} is a lazily negated view: pass {name}.resolve_neg()")
        return
    if hasattr(tensor, "full_tensor"):  # a DTensor, without the import of torch.distributed
        advice = whole or "pass {name}.full_tensor(), or this rank's tokens as a plain tensor"
        raise TypeError(f"{name} is a DTensor, but must be whole: {advice.format(name=name)}")
    if tensor.is_nested:
        raise TypeError(f"{name} is nested (jagged): pass {name}.values(), the tokens of all rows")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}: pass {name}.to_dense()")


def check_float_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_id_dtype(name: str, ids: torch.Tensor, what: str = "token ids") -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32 {what}, got {ids.dtype}")


def constant(name: str, tensor: torch.Tensor, advice: str = "detach it") -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but gets no gradient here: {advice}")


def of_teacher(name: str, tensor: torch.Tensor) -> None:
    """What a teacher's forward gave, which is a constant; where no graph is made it may require grad."""
    if torch.is_grad_enabled():
        constant(name, tensor, "detach it, or run the teacher under torch.no_grad()")


class TokenRows(NamedTuple):
    """The tensor ``[..., n]`` whose rows are the tokens, with the user's name for it.

    ``ranks``: how many split the tokens in its first dimension, where each has as many."""

    name: str
    tensor: torch.Tensor
    ranks: int = 1

    def check_leading(self, name: str, leading: torch.Size) -> None:
        expected = leading_of_all(self.tensor.shape[:-1], self.ranks)
        if leading != expected:
            of = self.name if self.ranks == 1 else f"{self.name} of all {self.ranks} ranks"
            raise ValueError(
                f"{name} must have the leading shape of {of}, {tuple(expected)}, got {tuple(leading)}"
            )

    def check_teacher_leading(
        self, name: str, leading: torch.Size, teacher_rows: torch.Tensor | None
    ) -> None:
        """Of a teacher's tensor: one row a token, or any where ``teacher_rows`` choose among them."""
        if teacher_rows is None:
            self.check_leading(name, leading)
        elif 0 in leading and 0 not in self.tensor.shape[:-1]:
            raise ValueError(
                f"{name} has no row that teacher_rows could choose, got the leading shape "
                f"{tuple(leading)}"
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
        check_plain(name, tensor)
        self.check_leading(name, tensor.shape)
        self.check_device(name, tensor)
