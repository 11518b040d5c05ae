"""The kernels over tokens alone, against PyTorch: the loss's tests on CPU tensors go past them."""

import pytest
import torch

from tests.support.helpers import make_logits, run

pytest.importorskip("triton")

from distill_ops.kernels import reduction

from distill_ops import distillation_loss

pytestmark = pytest.mark.interpreter


@pytest.fixture
def device(kernel_device):
    return kernel_device("triton")


# none; fewer than a vector; a block is 2048 or 4096: one less, whole blocks, a vector or less behind
LENGTHS = [0, 1, 5, 2047, 2048, 2049, 4095, 4096, 4099, 4104, 8192, 12289]


@pytest.mark.parametrize("n_elements", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [0.3, 1.0, 2.5, -1.0, 0.0])
def test_scale(upstream, dtype, n_elements, device):
    """Every entry once, rounded to nearest; what lies behind the gradient is left alone."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(n_elements + 16, generator=generator).to(dtype).to(device)
    factor = torch.tensor(upstream, device=device)
    expected = (buffer.float() * factor).to(dtype)
    expected[n_elements:] = buffer[n_elements:]
    reduction.scale_(buffer[:n_elements], factor)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("n_elements", [512, 513, 1024, 1529, 4 * 512 + 8, 4 * 512 + 15])
def test_scale_with_several_blocks_a_program(n_elements, device):
    """As for gradients of more blocks than there are programs; here two, of 512 elements a block."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(n_elements + 16, generator=generator).to(torch.bfloat16).to(device)
    factor = torch.tensor(0.3, device=device)
    expected = (buffer.float() * factor).to(torch.bfloat16)
    expected[n_elements:] = buffer[n_elements:]
    reduction.scale_kernel[(2,)](buffer, factor, n_elements, VECTORS=64, WIDTH=8, num_warps=1)
    assert torch.equal(buffer, expected)


@pytest.mark.parametrize("n_rows", [1, 100, 8192, 9001])
def test_token_weights(n_rows, device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 3, (n_rows,), generator=generator).to(device)
    mask = torch.randint(0, 4, (n_rows,), generator=generator).to(device)  # sums are exact
    for loss_mask in (None, mask.bool(), mask, mask.float(), torch.zeros_like(mask)):
        for given in (labels, None):
            if given is None and loss_mask is None:
                continue
            expected = torch.ones(n_rows, device=device)
            expected = expected if loss_mask is None else loss_mask.float()
            expected = expected if given is None else expected.masked_fill(given == -1, 0.0)
            weights, total = reduction.token_weights(loss_mask, given, -1)
            assert torch.equal(weights, expected)
            assert total == (expected.sum() if expected.any() else 1.0)  # 1: nothing divides by 0


def test_gradients_are_rounded_to_nearest(device):
    """Nearly every entry is the bfloat16 nearest to the truth; of truncated ones, half are."""
    student, teacher = make_logits((4, 1000), dtype=torch.bfloat16, device=device)
    options = {"upstream_seed": None}  # an upstream gradient of 1, which does not round again
    ours = run(distillation_loss, student, teacher, backend="triton", **options)
    truth = run(distillation_loss, student.double(), teacher.double(), backend="torch", **options)
    nearest = truth.gradient.to(torch.bfloat16)
    assert (ours.gradient == nearest).double().mean() > 0.98
