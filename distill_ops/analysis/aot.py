"""Compile the kernels for any GPU without one, exactly as their launchers would.

``record`` runs a launcher on tensors of the ``meta`` device and keeps what it hands to the kernel:
the launcher itself decides tile, warps, registers and compile-time flags, so nothing here can
disagree with it. ``compile_launch`` then compiles that launch for a target.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels import (
    combine,
    dense,
    gather,
    logits,
    metrics,
    pair,
    phases,
    reduction,
    rows,
    statistics,
    token,
    topk,
    topk_combine,
    topk_gradient,
    topk_phases,
)
from ..kernels.launch import DeviceFacts


@dataclass(frozen=True)
class Target:
    """A GPU as the compiler and the launch choices know it (sizes from the vendors' pages)."""

    name: str
    backend: str
    arch: int | str
    facts: DeviceFacts

    def gpu_target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.facts.warp_size)


MIB = 1 << 20
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, DeviceFacts(108, 40 * MIB)),  # A100
        Target("sm_90", "cuda", 90, DeviceFacts(132, 50 * MIB)),  # H100, H200
        Target("sm_100", "cuda", 100, DeviceFacts(148, 126 * MIB)),  # B200
        Target("gfx942", "hip", "gfx942", DeviceFacts(304, 256 * MIB, 64, limits_registers=False)),
    )
}

# modules whose kernels are launched, and the kernels
KERNELS = (
    (dense, "dense_kernel"),
    (gather, "gather_kernel"),
    (logits, "finish_kernel"),
    (logits, "softcap_gradient_kernel"),
    (metrics, "metrics_kernel"),
    (token, "token_kernel"),
    (statistics, "statistics_kernel"),
    (topk, "topk_kernel"),
    (pair, "pair_kernel"),
    (pair, "pair_sums_kernel"),
    (phases, "normalise_kernel"),
    (phases, "reduce_kernel"),
    (combine, "combine_kernel"),
    (topk_phases, "topk_normalise_kernel"),
    (topk_phases, "topk_reduce_kernel"),
    (topk_combine, "topk_combine_kernel"),
    (topk_gradient, "topk_differentiate_kernel"),
    (reduction, "weights_kernel"),
    (reduction, "total_kernel"),
    (reduction, "scale_kernel"),
)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: dict


class _Recorder:
    def __init__(self, kernel: triton.JITFunction, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*positional, **named):
            named |= dict(zip(self.kernel.arg_names, positional, strict=False))
            self.launches.append(Launch(self.kernel, grid, named))

        return launch


def record(call: Callable[[], object], facts: DeviceFacts) -> list[Launch]:
    """The launches that ``call`` makes, none of which runs."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for module in (rows, logits):  # those that ask for the device's facts
            stack.enter_context(mock.patch.object(module, "device_facts", return_value=facts))
        for module, name in KERNELS:
            recorder = _Recorder(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        call()
    return launches


def _type(value) -> str | tuple:
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type(item) for item in value)
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_launch(launch: Launch, target: Target):
    """Compile one recorded launch; the result's ``asm`` holds every stage."""
    kernel = launch.kernel
    constants = {p.name: launch.arguments[p.name] for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else _type(launch.arguments[name])
        for name in kernel.arg_names
    }
    # PyTorch's allocations are at least 16-byte aligned, and the launcher passes aligned bases
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if isinstance(launch.arguments[name], torch.Tensor)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {k: launch.arguments[k] for k in ("num_warps", "maxnreg") if k in launch.arguments}
    return triton.compile(source, target=target.gpu_target(), options=options)
