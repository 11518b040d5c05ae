"""The package as a whole: imports without Triton, without a GPU, and as a wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
from distill_ops.cpu import dense
dense.CLOSED_FORMS.clear()  # and the shared text itself
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


def test_the_wheel_holds_every_module(tmp_path):
    """As README builds it; what is imported from it is all that lies in the folders here."""
    copy = tmp_path / "clone"
    for part in ("distill_ops", "kernels"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, *build, "--wheel-dir", str(tmp_path / "dist"), str(copy)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("distill_ops-*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    installed = tmp_path / "installed/distill_ops"
    expected = {path.relative_to(ROOT / "distill_ops") for path in ROOT.glob("distill_ops/**/*.py")}
    expected |= {
        Path("kernels", path.relative_to(ROOT / "kernels")) for path in ROOT.glob("kernels/*.py")
    }
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == expected
    assert (installed / "py.typed").is_file()
    code = (
        "import distill_ops, distill_ops.kernels.dense, torch; print(distill_ops.__file__);"
        "x = torch.zeros(1, 4); assert distill_ops.distillation_loss(x, x, divergence='forward_kl') == 0"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(installed.parent)},
    )  # fmt: skip
    assert Path(found.stdout.strip()).parent == installed
