"""BFGS on many rows at once: a small minimiser for ``mode_seeking.py``.

Steps are found by bisection for the weak Wolfe conditions, with which BFGS also works on functions
with kinks (Lewis and Overton, Nonsmooth optimization via quasi-Newton methods, 2013), such as the
total variation.
"""

from collections.abc import Callable

import torch

Function = Callable[[torch.Tensor], torch.Tensor]  # [rows, n] to [rows], each of its row alone


def value_and_gradient(function: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
        value.sum().backward()
    return value.detach(), leaf.grad


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1, keepdim=True)


def minimise(
    function: Function, starts: torch.Tensor, *, steps: int = 200, tolerance: float = 1e-7
) -> torch.Tensor:
    """Where each row of ``starts`` [rows, n] ends: its gradient or its last step is below the
    tolerance, or ``steps`` are made."""
    x = starts.clone()
    value, gradient = value_and_gradient(function, x)
    finished = gradient.norm(dim=-1, keepdim=True) < tolerance
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    inverse = eye.repeat(len(x), 1, 1)  # of the Hessian, [rows, n, n]
    for _ in range(steps):
        direction = -(inverse @ gradient[..., None])[..., 0]
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1)
        moved, new_value, new_gradient = line_search(
            function, x, value, gradient, direction, finished
        )
        step, change = moved - x, new_gradient - gradient
        x, value, gradient = moved, new_value, new_gradient
        curvature = dot(step, change)
        update = curvature > 0
        rho = torch.where(update, 1 / curvature, 0)[..., None]
        left = eye - rho * step[..., :, None] * change[..., None, :]
        updated = left @ inverse @ left.mT + rho * step[..., :, None] * step[..., None, :]
        inverse = torch.where(update[..., None], updated, eye)
        finished |= step.norm(dim=-1, keepdim=True) < tolerance
        finished |= gradient.norm(dim=-1, keepdim=True) < tolerance
        if finished.all():
            break
    return x


def line_search(
    function: Function,
    x: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    direction: torch.Tensor,
    finished: torch.Tensor,
    *,
    trials: int = 30,
    decrease: float = 1e-4,
    flatten: float = 0.9,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The point that each row steps to, its value and gradient; a row that finds none, or is
    finished, stays."""
    slope = dot(gradient, direction)
    length = torch.ones_like(slope)
    low, high = torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    best = x, value, gradient
    done = finished.clone()
    for _ in range(trials):
        moved = x + length * direction
        new_value, new_gradient = value_and_gradient(function, moved)
        lower = new_value[:, None] <= value[:, None] + decrease * length * slope  # False if NaN
        flat = dot(new_gradient, direction) >= flatten * slope
        better = lower & ~done
        best = (
            torch.where(better, moved, best[0]),
            torch.where(better[:, 0], new_value, best[1]),
            torch.where(better, new_gradient, best[2]),
        )
        done |= lower & flat
        if done.all():
            break
        high = torch.where(lower, high, length)
        low = torch.where(lower, length, low)
        length = torch.where(high.isinf(), 2 * low, (low + high) / 2)
    return best
