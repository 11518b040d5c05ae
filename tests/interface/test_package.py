"""The package as a whole: imports without Triton, without a GPU, and as a wheel."""

import subprocess
import sys

from tests.support import ROOT

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, distill_ops
student = torch.randn(3, 40, requires_grad=True)
teacher = torch.randn(3, 40)
for divergence in ("soft_cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon"):
    loss = distill_ops.distillation_loss(student, teacher, divergence=divergence)
    truth = distill_ops.reference.distillation_loss(student, teacher, divergence=divergence)
    assert torch.allclose(loss, truth, rtol=1e-5), divergence
    loss.backward()
    top = torch.log_softmax(teacher, -1).topk(5)
    of_top = distill_ops.topk_distillation_loss(student, *top, divergence=divergence)
    truth = distill_ops.reference.topk_distillation_loss(student, *top, divergence=divergence)
    assert torch.allclose(of_top, truth, rtol=1e-5), divergence
from distill_ops import host
host.CLOSED_FORMS.clear()  # and the shared text itself
again = distill_ops.distillation_loss(student, teacher, divergence="jensen_shannon")
assert torch.allclose(again, loss, rtol=1e-5)
try:
    distill_ops.distillation_loss(student, teacher, backend="triton")
except ValueError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("backend='triton' without Triton")
"""


def test_everything_but_the_kernels_works_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, cwd=ROOT.parent)


def test_import_touches_no_gpu_and_no_top_level_kernels():
    code = (
        "import distill_ops, sys, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'kernels' not in sys.modules;"
        "assert 'distill_ops.kernels.portable' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
