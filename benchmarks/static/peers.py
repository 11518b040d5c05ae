"""The same counts for other packages' divergence kernels, where these packages are installed.

Their own launchers make the launches, on tensors without memory, so block sizes and warps are
theirs. What PyTorch does around a kernel (softmaxes, sums, matrix products) is not counted; ``takes``
and ``bytes_an_element`` say what the kernel itself loads and stores.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource

from distill_ops.analysis import aot, sass

N_ROWS, N_COLS, N_HIDDEN = 1024, 128256, 16
TARGET = "sm_90"


@dataclass(frozen=True)
class Peer:
    """``call`` launches kernels of ``module``, one of which is called ``kernel``."""

    package: str
    module: str
    kernel: str
    takes: str
    bytes_an_element: int
    call: Callable[[ModuleType], object]


@dataclass(frozen=True)
class PeerRow:
    """A peer's kernel; ``skipped`` says why there are no counts.

    ``instructions``, ``special`` and ``barriers`` (with shuffles and shared memory) are an element of
    ``[tokens, vocab]``, over the kernel's loops, or over all of it where it has none."""

    package: str
    kernel: str
    takes: str
    bytes_an_element: int
    version: str | None = None
    skipped: str | None = None
    date: str | None = None  # of the count, where it is an earlier run's
    registers: int | None = None
    stack: int | None = None
    shared: int | None = None
    num_warps: int | None = None
    instructions: float | None = None
    special: float | None = None
    barriers: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.package, self.kernel, self.takes


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _log_probabilities() -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(N_ROWS, N_COLS, dtype=torch.float32), _empty(N_ROWS, N_COLS, dtype=torch.float32)


def _liger_jsd(module: ModuleType) -> None:
    launcher = import_module("liger_kernel.ops.backends._triton.jsd")
    with mock.patch.object(launcher, "_jsd_kernel", module._jsd_kernel):
        launcher.jsd_loss_and_grad_triton(*_log_probabilities(), None, 0.5, -100, float(N_ROWS))


def _liger_kl(module: ModuleType) -> None:
    module.kldiv_forward_triton(*_log_probabilities(), True, "batchmean", 1e-10)


def _liger_kl_backward(module: ModuleType) -> None:
    target, gradient = _log_probabilities()
    with mock.patch.object(torch, "equal", return_value=True):  # the upstream gradient is 1
        module.kldiv_backward_triton(target, _empty(), gradient, True)


def _liger_tvd(module: ModuleType) -> None:
    module.tv_distance_forward_triton(*_log_probabilities(), None, "batchmean", -100, False)


def _hidden() -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(N_ROWS, N_HIDDEN), _empty(N_COLS, N_HIDDEN)


def _fla(module: ModuleType) -> None:
    (student, head), (teacher, teacher_head) = _hidden(), _hidden()
    module.fused_kl_div_fwd(student, teacher, head, teacher_head)


def _trl(beta: float, backward: bool) -> Callable[[ModuleType], None]:
    def call(module: ModuleType) -> None:
        hidden, head = (x.requires_grad_() for x in _hidden())
        as_on_gpu = {
            "_use_triton": mock.Mock(return_value=True),
            "_compute_dtype": mock.Mock(return_value=hidden.dtype),
        }
        with mock.patch.multiple(module, **as_on_gpu):
            divergence, _ = module.ChunkedDivergenceFunction.apply(
                hidden, head, None, *_hidden(), None, beta
            )
            if backward:
                divergence.sum().backward()

    return call


_LIGER, _TRL, _FLA = "liger-kernel", "trl", "fla-core"
_DIVERGENCE = "trl.kernels.chunked_divergence"
PEERS = (
    # log-probabilities in, loss of every element and gradient out
    Peer(_LIGER, "liger_kernel.ops.jsd", "_jsd_kernel", "float32 log-probabilities", 16, _liger_jsd),
    Peer(
        _LIGER, "liger_kernel.ops.kl_div", "_kldiv_kernel_forward", "float32 log-probabilities", 8,
        _liger_kl,
    ),
    Peer(
        _LIGER, "liger_kernel.ops.kl_div", "_kldiv_kernel_backward", "float32 log-probabilities", 8,
        _liger_kl_backward,
    ),
    Peer(_LIGER, "liger_kernel.ops.tvd", "_tv_distance_kernel", "float32 probabilities", 12, _liger_tvd),
    # two reads of both logits, the gradient over the student's
    Peer(_FLA, "fla.modules.fused_kl_div.ops", "kl_div_kernel", "bf16 logits, forward KL", 10, _fla),
    # float32 tiles of logits
    Peer(_TRL, _DIVERGENCE, "_stats_kernel", "float32 logits", 8, _trl(0.0, False)),
    Peer(_TRL, _DIVERGENCE, "_jsd_kernel", "float32 logits", 8, _trl(0.5, False)),
    Peer(_TRL, _DIVERGENCE, "_backward_kernel", "float32 logits, forward KL", 12, _trl(0.0, True)),
    Peer(_TRL, _DIVERGENCE, "_backward_kernel", "float32 logits, JSD", 12, _trl(0.5, True)),
)  # fmt: skip


class _Recorder:
    """Stands for a kernel: keeps the arguments of its first launch."""

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.arguments = kernel, None

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*positional: object, **named: object) -> None:
            if self.arguments is None:
                self.arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named

        return launch


def _source(kernel: triton.JITFunction, arguments: dict[str, object]) -> ASTSource:
    """What Triton would compile at this call: 1 is a constant, multiples of 16 are known as such."""
    constants, signature, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments.get(parameter.name, parameter.default)
        value = getattr(value, "value", value)
        tensor = isinstance(value, torch.Tensor)
        integer = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or (integer and value == 1):
            constants[parameter.name], signature[parameter.name] = value, "constexpr"
            continue
        signature[parameter.name] = aot._type(value)
        if tensor or (integer and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _instructions(code: list[str]) -> list[sass.Loop]:
    """The kernel's loops that load; or, as one, all of its instructions to the last EXIT."""
    loops = [loop for loop in sass.innermost_loops(code) if loop.count("LDG")]
    if loops:
        return loops
    body = [line for line in code if re.match(r"\s*/\*[0-9a-f]+\*/", line)]
    last = max(at for at, line in enumerate(body) if "EXIT" in line)
    # a jump from its end to its beginning makes a loop of it
    return sass.innermost_loops([".L_all:", *body[: last + 1], "/*0*/ BRA `(.L_all);"])


def _count(peer: Peer) -> dict[str, object]:
    module = import_module(peer.module)
    kernel = getattr(module, peer.kernel)
    recorders = {
        name: _Recorder(value)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction)
        and name.endswith(("kernel", "forward", "backward"))
    }
    with contextlib.ExitStack() as stack:
        for name, recorder in recorders.items():
            stack.enter_context(mock.patch.object(module, name, recorder))
        peer.call(module)
    arguments = recorders[peer.kernel].arguments
    options = {"num_warps": arguments.get("num_warps", 4)}  # Triton's default
    target = aot.TARGETS[TARGET]
    compiled = triton.compile(
        _source(kernel, arguments), target=target.gpu_target(), options=options
    )
    code, usage = sass.disassemble(compiled)
    block = arguments.get("BLOCK_SIZE", arguments.get("BV"))
    a_thread = block / (32 * options["num_warps"])
    loops = _instructions(code)
    return {
        "registers": usage.registers,
        "stack": usage.stack,
        "shared": usage.shared,
        **options,
        "instructions": sum(loop.instructions for loop in loops) / a_thread,
        "special": sum(loop.special for loop in loops) / a_thread,
        "barriers": sum(loop.barriers for loop in loops) / a_thread,
    }


def peer_rows() -> list[PeerRow]:
    """A row for each peer's kernel, counted or with the reason why it was not."""
    rows = []
    for peer in PEERS:
        named = (peer.package, peer.kernel, peer.takes, peer.bytes_an_element)
        try:
            installed = version(peer.package)
        except PackageNotFoundError:
            rows.append(PeerRow(*named, skipped="not installed"))
            continue
        try:
            rows.append(PeerRow(*named, version=installed, **_count(peer)))
        except Exception as error:  # theirs may fail in any way, and ours goes on
            reason = f"{type(error).__name__}: {error}"
            rows.append(PeerRow(*named, version=installed, skipped=reason))
    return rows
