"""What is measured: a case is a loss, a shape from a named model, and a dtype; and its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from distill_ops.divergences.built_in import BUILT_IN

LOSSES = tuple(BUILT_IN)
DTYPES = ("float32", "bfloat16")
MODES = ("train", "eval")  # forward + backward; forward without a gradient
MODELS = {
    32000: "llama-2",
    50257: "gpt-2",
    128256: "llama-3",
    151936: "qwen2.5",
    262144: "gemma-3",
}

Shape = tuple[int, int]  # tokens, vocabulary


@dataclass(frozen=True)
class Case:
    """One loss of ``[tokens, vocab]`` logits."""

    loss: str
    tokens: int
    vocab: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.loss} {self.tokens}x{self.vocab} {self.dtype}"

    @property
    def model(self) -> str | None:
        return MODELS.get(self.vocab)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.torch_dtype.itemsize

    def minimal_bytes(self, mode: str) -> int:
        """The least that any implementation moves: both logits in, in training the gradient out."""
        return self.logits_bytes * (3 if mode == "train" else 2)


# On two CPU cores: one shape in each dtype, about 33 and 39 million logits.
CPU_SHAPES = {"float32": [(1024, 32000)], "bfloat16": [(256, 151936)]}
CPU_QUICK_SHAPES = {"float32": [(128, 32000)], "bfloat16": [(32, 151936)]}
# Few tokens show launch costs, many show bandwidth; 50257 has rows at odd addresses.
GPU_SHAPES = {"bfloat16": list(product((1024, 4096, 8192), MODELS))}
GPU_QUICK_SHAPES = {"bfloat16": [(1024, 32000), (4096, 128256)]}


def select_cases(
    device_type: str,
    quick: bool,
    losses: Sequence[str] = LOSSES,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[Case]:
    """The default cases of a device, or every loss at every given shape in every given dtype."""
    if device_type == "cpu":
        default = CPU_QUICK_SHAPES if quick else CPU_SHAPES
    else:
        default = GPU_QUICK_SHAPES if quick else GPU_SHAPES
    if shapes is None and dtypes is None:
        grid = [(shape, dtype) for dtype, its_shapes in default.items() for shape in its_shapes]
    else:
        shapes = shapes or [shape for its_shapes in default.values() for shape in its_shapes]
        grid = list(product(shapes, dtypes or [next(iter(default))]))
    return [Case(loss, *shape, dtype) for (shape, dtype), loss in product(grid, losses)]


def make_inputs(
    case: Case, device: torch.device, distinct: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student (a leaf that requires grad) and teacher logits ``[tokens, vocab]``.

    The teacher is the student plus noise, so that no divergence sits at its maximum. With
    ``distinct``, rows repeat: row i is that of ``i % distinct``.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> torch.Tensor:
        shape = (distinct or case.tokens, case.vocab)
        return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

    student = normal().mul_(2)
    teacher = normal().add_(student)
    if distinct is not None:
        rows = torch.arange(case.tokens, device=device) % distinct
        student, teacher = student[rows], teacher[rows]
    return student.requires_grad_(), teacher


class _Restored(torch.autograd.Function):
    """``buffer`` in the place of ``leaf``, which gets its gradient as it is."""

    @staticmethod
    def forward(ctx, leaf: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Inputs:
    """The logits of a case, the same in every run.

    A loss that overwrites its student's logits cannot have the leaf. It gets a buffer that is no
    leaf; ``reset`` fills it with the leaf's logits, outside of what is measured and before every
    run, whoever's turn it is: all find the caches alike. The buffer's gradient becomes the leaf's
    without a copy, so that the loss alone is measured.
    """

    def __init__(self, student: torch.Tensor, teacher: torch.Tensor, overwritten: bool) -> None:
        self.student, self.teacher = student, teacher
        self._buffer = torch.empty_like(student) if overwritten else None
        self._restored = None
        self.reset()

    def reset(self) -> None:
        """Before each run: no gradient, and the logits as they were."""
        self.student.grad = None
        if self._buffer is not None:
            self._restored = None
            self._buffer.copy_(self.student.detach())
            self._restored = _Restored.apply(self.student, self._buffer)

    def student_for(self, inplace: bool) -> torch.Tensor:
        """For one run after each ``reset``."""
        return self._restored if inplace else self.student
