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


def _maximum(x, y):
    if not isinstance(x, torch.Tensor):
        return max(x, y)
    return torch.maximum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, min=y)


def _minimum(x, y):
    if not isinstance(x, torch.Tensor):
        return min(x, y)
    return torch.minimum(x, y) if isinstance(y, torch.Tensor) else torch.clamp(x, max=y)


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


# What a device function may take from ``tl`` and still run on tensors.
TENSOR_LANGUAGE = _TensorLanguage(
    where=_where,
    exp=torch.exp,
    exp2=torch.exp2,
    log=torch.log,
    log2=torch.log2,
    sqrt=torch.sqrt,
    rsqrt=torch.rsqrt,
    abs=torch.abs,
    sigmoid=torch.sigmoid,
    erf=torch.erf,
    sin=torch.sin,
    cos=torch.cos,
    floor=torch.floor,
    maximum=_maximum,
    minimum=_minimum,
    clamp=torch.clamp,
    fma=lambda x, y, z: x * y + z,
    zeros_like=torch.zeros_like,
    float32=torch.float32,
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
