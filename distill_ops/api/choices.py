"""What a call decides before it computes: the backend, when the gradient is made, autocast's dtype."""

import torch

from ..checks.options import given_options
from ..checks.values import BACKENDS
from ..heads.select import autocasts
from ..kernels.portable import triton
from ..problem import BACKWARD, FORWARD, NO_GRADIENT, Options, working_dtype
from ..results import ARGMAX, NUMBERS, LossComponents, LossResult, TokenOutputs, asked
from ..scalars import one_of

INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def choose_backend(
    backend: str, of: str, student: torch.Tensor, *others: torch.Tensor | None
) -> str:
    """ "triton" or "torch"; an explicit choice never falls back. ``of`` is what the user calls
    ``student``.

    Raises:
        ValueError: ``backend="triton"`` cannot be had here.
    """
    one_of("backend", backend, BACKENDS)
    wide = working_dtype(student, *others) == torch.float64
    if backend == "auto":
        return "triton" if triton is not None and student.is_cuda and not wide else "torch"
    if backend == "triton":
        if triton is None:
            raise ValueError("backend='triton' needs the triton package: pip install triton")
        if wide:
            raise ValueError("backend='triton' takes float32, bfloat16 or float16, got float64")
        if not (student.is_cuda or INTERPRETED):
            raise ValueError(
                f"backend='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 set before "
                f"importing distill_ops), got {of} on {student.device}"
            )
    return backend


def gradient_mode(
    gradient: str, reduction: str, *students: torch.Tensor | None,
    products: torch.dtype | None = None,
) -> str:  # fmt: skip
    """When the gradient of the student's tensors is made: in the forward, in the backward, or never.
    ``products``: the dtype in which it is computed, where that is not one of theirs."""
    given = [x for x in students if x is not None]
    float16 = torch.float16 in (products, *(x.dtype for x in given))
    if gradient == "forward" and float16:
        raise ValueError(
            "gradient='forward' with float16 would underflow (it is made before "
            "GradScaler's scale): use gradient='backward' or 'auto'"
        )
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return NO_GRADIENT
    if gradient == "auto":
        gradient = BACKWARD if reduction == "none" or float16 else FORWARD
    return gradient


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which autocast wants matrix products; on a CPU, whose products are float32, it has no say."""
    if device.type == "cpu" or not autocasts(device):
        return None
    return torch.get_autocast_dtype(device.type)


def loss_result(
    outputs: tuple[torch.Tensor | None, ...], options: Options, return_components: bool
) -> LossResult:
    """What the user gets of a loss operator's outputs."""
    loss, components, numbers, argmax = outputs
    found = _with_components(loss, components, options) if return_components else loss
    if not options.token_outputs:
        return found
    parts = []
    for names, values in ((NUMBERS, numbers), (ARGMAX, argmax)):
        names = asked(names, options.token_outputs)
        parts.extend(zip(names, values.unbind(0), strict=True) if names else ())
    return found, TokenOutputs(**dict(parts))


def _with_components(loss, components, options: Options) -> LossComponents:
    if options.components:
        return LossComponents(loss, *components.unbind(0))
    divergence = loss.detach() / options.soft_weight
    return LossComponents(loss, divergence, torch.zeros_like(divergence))


class LossModule(torch.nn.Module):
    """A loss function as a module that keeps the options which stay the same from step to step, and
    checks them when it is made, but for tensors."""

    own: tuple[str, ...]  # names of the function's options that other losses do not have
    without: tuple[str, ...] = ()  # names of others' that it does not have

    def __init__(self, options: dict):
        super().__init__()
        shared = {name: value for name, value in options.items() if name not in self.own}
        given = given_options(type(self).__name__, shared, *self.without, own=self.own)
        checked = self.check(**{name: options[name] for name in options if name in self.own})
        checked |= given._asdict() | {"divergence": options.get("divergence")}  # as users name it
        self.options = {name: checked.get(name, value) for name, value in options.items()}

    @staticmethod
    def check(**own) -> dict:
        """The options that are the function's own, checked."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
