"""The few elementary functions whose default lowering is slow or that the interpreter lacks."""

import torch

from .portable import constant, device_function, tl, triton

LN2 = constant(0.6931471805599453)
LOG2E = constant(1.4426950408889634)
INFINITY = constant(float("inf"))
SERIES_BELOW = constant(0.02)  # where the next term of the series is 3e-7 of it

if triton is not None:
    INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
    SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)

    @tl.core.builtin
    def is_cuda(_semantic=None):
        """Whether the kernel is being compiled for NVIDIA.

        ``tl.target_info`` asks the driver instead, and ahead of time there is none."""
        return tl.constexpr(_semantic.builder.options.backend_name == "cuda")

    @device_function
    def instruction(x, OF_NVIDIA: tl.constexpr, OF_AMD: tl.constexpr):
        """One machine instruction of a float32, by its name on either."""
        if is_cuda():
            return tl.inline_asm_elementwise(
                OF_NVIDIA + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                OF_AMD + " $0, $1", "=v,v", [x], dtype=tl.float32, is_pure=True, pack=1
            )


def _log_of_tensor(x):
    return torch.log(torch.clamp(x, min=torch.finfo(x.dtype).tiny))


def _share_of_tensors(part, whole):
    return part / torch.clamp(whole, min=torch.finfo(whole.dtype).tiny)


@device_function
def fma(x, y, z):
    """``x * y + z`` rounded once. The interpreter's own fma rounds twice."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@device_function
def rounded_product(x, y):
    """``x * y`` rounded, also where a sum follows: the compiler would fuse the two, and a difference
    of two products of which only one is rounded is wrong by that rounding."""
    return fma(x, y, 0.0)


@device_function
def to_float32(x):
    """A tile of logits as float32.

    bfloat16 is the upper half of float32; the compiler's own conversion takes three instructions
    for two values, this one two."""
    if INTERPRETED:
        return x.to(tl.float32)
    elif x.dtype == tl.bfloat16 and is_cuda():
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@device_function
def from_float32(x, dtype):
    """A tile of float32 rounded to nearest. The interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@device_function
def fast_log2(x):
    """Base-2 logarithm in one instruction: x float32, normal; absolute error 2**-22 near 1.

    ``tl.log2`` compiles to a libdevice routine of about 25 instructions.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return instruction(x, "lg2.approx.ftz.f32", "v_log_f32")


@device_function(tensor_twin=_log_of_tensor)
def log(x):
    """Natural logarithm of ``max(x, smallest normal)``: finite where x underflows to 0."""
    return fast_log2(tl.maximum(x, SMALLEST_NORMAL)) * LN2


@device_function(tensor_twin=torch.log2)
def log2_of_normal(x):
    """Base-2 logarithm of a number that cannot underflow."""
    return fast_log2(x)


@device_function(tensor_twin=torch.reciprocal)
def reciprocal(x):
    """``1 / x`` of a normal number, within a unit in the last place; division takes 8 instructions."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return instruction(x, "rcp.approx.ftz.f32", "v_rcp_f32")


@device_function
def mixture(log_ratio, ratio, of_teacher, of_student):
    """``(of_teacher * p + of_student * q) / max(p, q)``, which neither over- nor underflows, from a
    logarithm of p / q and ``ratio = min(p, q) / max(p, q)``; the weights sum to 1."""
    larger = of_student + of_teacher * ratio
    return tl.where(log_ratio > 0, of_teacher + of_student * ratio, larger)


@device_function(tensor_twin=lambda difference, log_ratio, q: difference)
def uncancelled(difference, log_ratio, q):
    """``difference = p - q``, by the series of ``p / q - 1`` where the two cancel, as they do in most
    columns of a student that has learned."""
    series = log_ratio * (1.0 + log_ratio * (0.5 + log_ratio * (1.0 / 6.0)))
    return tl.where(tl.abs(log_ratio) < SERIES_BELOW, q * series, difference)


@device_function(tensor_twin=_share_of_tensors)
def share(part, whole):
    """``part / whole`` of probabilities, 0 where both underflow to 0."""
    return part / tl.maximum(whole, SMALLEST_NORMAL)


@device_function(tensor_twin=torch.tanh)
def tanh(x):
    """Hyperbolic tangent within 4 units in the last place; libdevice's takes a branch a column.

    Below 1/4, where ``1 - exp(-2 x)`` cancels, the series up to x**9 (the next term is 8e-9 of the
    value); above, an exponential that cannot overflow."""
    size = tl.abs(x)
    square = x * x
    series = fma(square, 62.0 / 2835.0, -17.0 / 315.0)
    series = fma(square, series, 2.0 / 15.0)
    series = fma(square, series, -1.0 / 3.0)
    series = fma(square * x, series, x)
    small = tl.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - small) * reciprocal(1.0 + small)
    return tl.where(size < 0.25, series, tl.where(x < 0.0, -large, large))
