"""One text for two machines: device functions that also run on PyTorch tensors.

``device_function`` compiles a function with Triton where Triton is installed and leaves it alone
elsewhere; ``on_tensors`` rebuilds the same body with ``tl`` replaced by a table of PyTorch
operations, so that a formula written once serves the GPU kernel, the CPU path and the tests.
"""

import functools
import types

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU path and the reference need no Triton
    triton = None
    tl = None


def _extreme(of_numbers, of_tensors, side):
    """Maximum or minimum, where the second or both may be numbers."""

    def extreme(x, y):
        if not isinstance(x, torch.Tensor):
            return of_numbers(x, y)
        return of_tensors(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, **{side: y})

    return extreme


def _where(condition, x, y):
    if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
        x = torch.tensor(x, dtype=torch.float64, device=condition.device)  # not rounded to float32
    return torch.where(condition, x, y)


class _TensorLanguage(types.SimpleNamespace):
    def __getattr__(self, name):
        known = ", ".join(sorted(vars(self)))
        raise AttributeError(
            f"tl.{name} has no PyTorch counterpart here; a formula that runs on every path may use "
            f"tl.{{{known}}}"
        )


SAME_NAME = (
    "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sigmoid", "erf", "sin", "cos", "floor",
    "clamp", "zeros_like", "float32",
)  # fmt: skip
# What a device function may take from ``tl`` and still run on tensors.
TENSOR_LANGUAGE = _TensorLanguage(
    **{name: getattr(torch, name) for name in SAME_NAME},
    where=_where,
    maximum=_extreme(max, torch.maximum, "min"),
    minimum=_extreme(min, torch.minimum, "max"),
    fma=lambda x, y, z: x * y + z,
)
LANGUAGES = (tl, getattr(tl, "math", None))  # modules that the table stands for

_TENSOR_TWINS = {}  # plain function -> its own PyTorch text, or None to rebuild its body


def device_function(function=None, *, tensor_twin=None):
    """Compile a function that a divergence's own function may call.

    ``function`` by Triton for a GPU, and its text on PyTorch tensors; ``tensor_twin`` replaces that.
    A function of a file goes in; what device functions and divergences call comes out.

    Example:
        In a file, as Triton reads the function's text there::

            import torch
            from distill_ops import declare_divergence, distillation_loss
            from distill_ops.language import device_function, tl

            @device_function
            def geometric_mean(log_q, log_p):
                return tl.exp(0.5 * (log_q + log_p))

            @declare_divergence
            def bhattacharyya(log_q, log_p, q, p):
                mean = geometric_mean(log_q, log_p)
                return 0.5 * (q + p) - mean, 0.5 * (q - mean)

            student, teacher = torch.zeros(3, 40), torch.randn(3, 40)
            loss = distillation_loss(student, teacher, divergence=bhattacharyya())
    """
    if function is None:
        return functools.partial(device_function, tensor_twin=tensor_twin)
    _TENSOR_TWINS[function] = tensor_twin
    if triton is None:
        return function
    # the interpreter wants triton.language among the module's names, used or not
    function.__globals__.setdefault("tl", tl)
    return triton.jit(function)


def constant(number):
    """A number of a module that device functions use."""
    return number if tl is None else tl.constexpr(number)


def plain_function(function):
    """The Python function behind a (possibly compiled or interpreted) device function."""
    return getattr(function, "fn", function)


@functools.cache
def on_tensors(function):
    """``function``'s body as a function of PyTorch tensors, float64 included."""
    plain = plain_function(function)
    twin = _TENSOR_TWINS.get(plain)
    if twin is not None:
        return twin
    names = dict(plain.__globals__, tl=TENSOR_LANGUAGE)
    for name in plain.__code__.co_names:
        value = names.get(name)
        if value is not None and any(value is language for language in LANGUAGES):
            names[name] = TENSOR_LANGUAGE
        elif tl is not None and isinstance(value, tl.constexpr):
            names[name] = value.value
        elif isinstance(plain_function(value), types.FunctionType):
            if plain_function(value) in _TENSOR_TWINS:
                names[name] = on_tensors(value)
    return types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
