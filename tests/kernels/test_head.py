"""The elementwise kernels of a head: their numbers."""

import math

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from distill_ops.kernels import logits as head
from distill_ops.kernels.math import tanh

from distill_ops.heads.products import rows_buffer

HALF, WIDE, FP16 = torch.bfloat16, torch.float32, torch.float16


@triton.jit
def tanh_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + position, tanh(tl.load(x_ptr + position)))


@pytest.mark.interpreter
def test_tanh(kernel_device):
    """4 units in the last place, from the smallest normal to where it is 1."""
    sizes = torch.logspace(-37, 1.5, 4093, dtype=torch.float64).float()
    x = torch.cat([sizes, torch.tensor([0.0, math.inf, math.nan])])
    x = torch.cat([x, -x[:-1], torch.tensor([0.25])]).to(kernel_device("triton"))
    assert x.numel() == 8192
    y = torch.empty_like(x)
    tanh_kernel[(8,)](x, y, BLOCK=1024)
    truth = x.double().tanh()
    known = ~truth.isnan()
    assert torch.equal(y.isnan(), ~known)
    error = (y.double() - truth)[known].abs()
    assert (error <= 4 * 2.0**-24 * 2 * truth[known].abs()).all()
    assert y[x == math.inf] == 1
    assert y[x == -math.inf] == -1


def matrix(n_rows, n_cols, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = rows_buffer(n_rows, n_cols, dtype, device, True)
    return out.copy_(torch.randn(n_rows, n_cols, generator=generator) * 4)


@pytest.mark.interpreter
@pytest.mark.parametrize("n_cols", [1, 40, 2049])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [None, WIDE, HALF], ids=str)
@pytest.mark.parametrize(("source", "target"), [(WIDE, WIDE), (HALF, HALF), (WIDE, FP16)], ids=str)
def test_finish(source, target, bias, softcap, n_cols, kernel_device):
    device = kernel_device("triton")
    product = matrix(5, n_cols, source, device)
    if bias is not None:
        bias = torch.linspace(-2, 2, n_cols).to(bias).to(device)
    expected = product.double()
    if bias is not None:
        expected = expected + 0.5 * bias.double()
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    logits = product if source == target else matrix(5, n_cols, target, device)
    head.finish(product, logits, bias, 0.5, softcap)
    eps = torch.finfo(target).eps
    scale = expected.abs().clamp(min=eps)  # a sum may cancel
    assert ((logits.double() - expected).abs() <= 4 * eps * scale + 4e-7).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [WIDE, HALF], ids=str)
def test_softcap_gradient(dtype, kernel_device):
    device = kernel_device("triton")
    gradient, logits = matrix(5, 33, dtype, device), matrix(5, 33, WIDE, device, seed=1).tanh_()
    expected = gradient.double() * (1 - (logits.double() / 1.5) ** 2)
    head.softcap_gradient_(gradient, logits, 1.5)
    error = (gradient.double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * gradient.double().abs() + 1e-6).all()


@pytest.mark.interpreter
def test_rows_that_begin_elsewhere_are_refused(kernel_device):
    x = torch.zeros(4, 33, device=kernel_device("triton"))
    with pytest.raises(ValueError, match="rows must begin at multiples of 8 elements"):
        head.finish(x, x, None, 1.0, 3.0)
