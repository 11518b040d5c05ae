"""Is a divergence what its text says? Slope, limits, facts, every path, and its cost."""

import math
from typing import NamedTuple

import torch

from .. import reference
from ..api.choices import INTERPRETED
from ..api.dense import distillation_loss
from ..divergences.base import Divergence, as_divergence
from ..kernels.portable import triton

N_COLUMNS = 4096
SLOPE_TOLERANCE = 1e-8  # of float64 derivatives, relative to the terms' size
PATH_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
FAR, FARTHER = -3e4, -3e5  # logarithms of probabilities that are all but 0
LEAST = 1e-3  # nats: below it a loss or gradient is held to this size


class DivergenceReport(NamedTuple):
    """What :func:`check_divergence` found.

    ``instructions`` and ``special`` (exponentials, logarithms, reciprocals) are per element of
    bfloat16 logits, with gradient, compiled for ``target``; None where Triton is not installed or
    interprets.

    Example:
        >>> import distill_ops
        >>> report = distill_ops.DivergenceReport(
        ...     "mine", 2e-16, ("reference", "torch"), "sm_90", 30.5, 4.25
        ... )
        >>> print(report)
        mine: slope right within 2e-16, limits finite where declared, paths agree: reference, torch; 30.5 instructions and 4.25 exp + log an element (bfloat16, with gradient, sm_90)
    """

    name: str
    slope_error: float  # largest, relative
    paths: tuple[str, ...]
    target: str
    instructions: float | None
    special: float | None

    def __str__(self) -> str:
        cost = "no GPU code was compiled here"
        if self.instructions is not None:
            cost = (
                f"{self.instructions:.1f} instructions and {self.special:.2f} exp + log an element "
                f"(bfloat16, with gradient, {self.target})"
            )
        return (
            f"{self.name}: slope right within {self.slope_error:.0e}, limits finite where declared, "
            f"paths agree: {', '.join(self.paths)}; {cost}"
        )


def _evaluate(divergence: Divergence, log_q, log_p):
    """Value and slope of columns ``[n, draws]``, so that a per-token parameter is one a row."""
    terms = divergence.on_columns(log_q, log_p, divergence.column_parameters(log_q.dtype))
    return tuple(x.expand_as(log_q) for x in terms)


def _columns(divergence: Divergence) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of student's and teacher's probabilities: independent, close, and tiny ones."""
    generator = torch.Generator().manual_seed(0)
    n = math.prod(max((t.shape for t in divergence.tensors), key=len, default=()))
    n = N_COLUMNS if n <= 1 else n
    draws = max(1, N_COLUMNS // n)
    log_q, noise, log_p = torch.rand(
        3, n, draws, generator=generator, dtype=torch.float64, device="cpu"
    )
    log_q, log_p = -30 * log_q.square(), -30 * log_p.square()
    return log_q, torch.where(noise < 0.3, log_q + 0.01 * (noise - 0.15), log_p).clamp(max=0)


def _check_slope(divergence: Divergence) -> float:
    log_q, log_p = _columns(divergence)
    leaf = log_q.requires_grad_()
    value, slope = _evaluate(divergence, leaf, log_p)
    (derivative,) = torch.autograd.grad(value.sum(), leaf)
    value, slope = value.detach(), slope.detach()
    size = torch.maximum(derivative.abs(), torch.maximum(value.abs(), log_q.detach().exp()))
    error = (slope - derivative).abs() / size.clamp(min=torch.finfo(torch.float64).tiny)
    error = torch.where(slope == derivative, 0.0, error).nan_to_num(nan=math.inf)
    worst = int(error.argmax())
    if error.flatten()[worst] > SLOPE_TOLERANCE:
        q, p, v, s, d = (
            x.flatten()[worst].item()
            for x in (leaf.detach().exp(), log_p.exp(), value, slope, derivative)
        )
        raise ValueError(
            f"{divergence.name}: the slope is not the derivative of the value: at the column "
            f"q = {q:.6g}, p = {p:.6g} the value is {v:.9g} and the slope {s:.9g}, but "
            f"d value / d log_q = {d:.9g}"
        )
    return error.max().item()


def _check_limit(divergence: Divergence, side: str, infinite: bool) -> None:
    """Value and slope where one probability is 0 (``side``) or both are."""
    like = torch.zeros_like(_columns(divergence)[0][:, :1])
    log_other = (like + 0.25).log()

    def at(log_zero: float):
        zeros = like + log_zero
        log_q = log_other if side == "teacher" else zeros
        return _evaluate(divergence, log_q, log_other if side == "student" else zeros)

    def refuse(why: str) -> None:
        raise ValueError(divergence.name + why)

    where = {"student": "q = 0, p = 0.25", "teacher": "q = 0.25, p = 0", "both": "q = p = 0"}[side]
    value, slope = at(torch.finfo(torch.float64).min)
    near, nearer = at(FAR)[0], at(FARTHER)[0]
    grows = (nearer - near).abs() > 0.01 * near.abs().clamp(min=1e-3)
    grows |= ~nearer.isfinite()
    fact = f"infinite_at_{side}_zero"
    if infinite:
        if not (grows.any() or _at_an_end(divergence)):
            tends_to = f"its value tends to {nearer.flatten()[0].item():.6g} at {where}"
            refuse(f" declares {fact}, but {tends_to}: leave the declaration out")
        return
    for kind, x in (("value", value), ("slope", slope)):
        if not x.isfinite().all():
            refuse(
                f": the {kind} at {where} is {x[~x.isfinite()][0].item()}, not finite: rewrite it so "
                f"that a probability of 0 has its limit, or declare {fact}=True"
            )
    if grows.any() and side != "both":
        refuse(
            f": the value grows without limit towards {where} ({near[grows][0].item():.6g} at log "
            f"{FAR:g}, {nearer[grows][0].item():.6g} at {FARTHER:g}): declare {fact}=True"
        )
    if side == "both" and ((value != 0).any() or (slope != 0).any()):
        found = f"{value.flatten()[0].item():.6g} and {slope.flatten()[0].item():.6g}"
        refuse(f": a column of q = p = 0 (padding) must have value and slope 0, got {found}")
    if side == "student" and (slope.abs() > 1e-12 * value.abs().clamp(min=1.0)).any():
        refuse(f": the slope at {where} must be 0, got {slope.abs().max().item():.6g}")


def _at_an_end(divergence: Divergence) -> bool:
    """Whether a parameter may have taken away a term: SymmetricKL(0) is the forward KL."""
    values = zip(divergence.__match_args__, divergence.parameters, strict=True)
    return any(
        bool(((x == divergence.domain(name).low) | (x == divergence.domain(name).high)).any())
        for name, x in ((name, torch.as_tensor(x, device="cpu")) for name, x in values)
    )


def _check_path(divergence: Divergence, backend: str, device: str) -> None:
    """Loss and gradient of a path against the reference in float64."""
    generator = torch.Generator().manual_seed(1)
    leading = next((t.shape for t in divergence.tensors if t.dim()), (6,))
    student, teacher = 2 * torch.randn(2, *leading, 301, generator=generator, device="cpu")
    masked = student.clone(), teacher.clone()
    masked[0][..., 5:40] = -math.inf
    masked[1][..., 20:60] = -math.inf
    dtype = torch.float64 if backend == "torch" else torch.float32
    for pair in ((student, teacher), masked):
        for options in ({}, {"temperature": 2.0, "gradient": "backward"}, {"reduction": "none"}):
            results = []
            for oracle in (True, False):
                leaf = pair[0].to(device, torch.float64 if oracle else dtype, copy=True)
                leaf.requires_grad_()
                other = pair[1].to(leaf)
                if oracle:
                    plain = {k: v for k, v in options.items() if k != "gradient"}
                    loss = reference.distillation_loss(leaf, other, divergence=divergence, **plain)
                else:
                    loss = distillation_loss(
                        leaf, other, divergence=divergence, backend=backend, **options
                    )
                loss.sum().backward()
                results.append((loss.detach().double(), leaf.grad.double()))
            for kind, truth, ours in zip(("loss", "gradient"), *results, strict=True):
                error = (ours - truth).norm() / truth.norm().clamp(min=LEAST)
                if not error <= PATH_TOLERANCE[dtype]:
                    raise ValueError(
                        f"{divergence.name}: the {kind} of backend={backend!r} differs from the "
                        f"reference (float64, autograd of the value) by {error.item():.2g} relative, "
                        f"with {options or 'default options'}"
                        f"{' and infinite logits' if pair is masked else ''}"
                    )


def check_divergence(divergence: Divergence | str) -> DivergenceReport:
    """Verify a divergence, above all one that :func:`declare_divergence` made.

    ``slope = d value / d log_q``, limits at probabilities of 0, and every path against the reference.
    A divergence goes in; a :class:`DivergenceReport` comes out, or a ``ValueError`` with the numbers.

    Example:
        >>> import distill_ops
        >>> distill_ops.check_divergence("jensen_shannon").paths[:2]
        ('reference', 'torch')

    In float64: the slope is the derivative of the value (autograd, through the probabilities too);
    value and slope have finite limits where a probability is 0, unless declared infinite, and are 0
    where both are. Then the loss and its gradient on every path that runs here ("torch", and
    "triton" with a GPU or under TRITON_INTERPRET=1) against the reference, with infinite logits
    too; and where Triton is installed, what an element costs on an H100 (sm_90), compiled here.

    Args:
        divergence: a :class:`Divergence` or its name; per-token parameters must be of one shape.

    Returns:
        A :class:`DivergenceReport`; print it.

    Raises:
        ValueError: naming the column and the numbers, or the path, that disagree.
    """
    divergence = as_divergence(divergence)
    flat = divergence.map_tensors(lambda x: x.cpu().reshape(-1) if x.dim() else x.cpu())
    slope_error = _check_slope(flat)
    _check_limit(flat, "student", divergence.infinite_at_student_zero)
    _check_limit(flat, "teacher", divergence.infinite_at_teacher_zero)
    _check_limit(flat, "both", False)
    paths = {"torch": "cpu"}
    if INTERPRETED:
        paths["triton"] = "cpu"
    elif triton is not None and torch.cuda.is_available():
        paths["triton"] = "cuda"
    for backend, device in paths.items():
        _check_path(divergence.map_tensors(lambda x, to=device: x.to(to)), backend, device)
    instructions = special = None
    if triton is not None and not INTERPRETED:
        from . import aot, forms

        target = aot.TARGETS["sm_90"]
        (launch,) = forms.Form(128256).launches(divergence, target)
        counts = forms.count(launch, target)
        instructions, special = counts.instructions(), counts.special()
    return DivergenceReport(
        divergence.name, slope_error, ("reference", *paths), "sm_90", instructions, special
    )
