"""Memory above what was there before: the peak of one run, a gradient that it makes included, and
what a forward leaves alive for its backward."""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def _resident_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def _trim_heap() -> None:
    """Hand free heap back to the system."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _peak_cpu(run: Callable[[], object]) -> int | None:
    """Tensors are invisible to tracemalloc, so the kernel is asked: writing 5 to clear_refs resets
    the high-water mark of resident memory (VmHWM) to the present. Free heap is handed back first;
    pages that the run could reuse from there would not count otherwise. Reliable within a MiB on
    tensors of a known size (``tests/tools/test_benchmarks.py``); None where the system has no such thing.
    """
    if not sys.platform.startswith("linux"):
        return None
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _peak_gpu(run: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_above_inputs(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes; call it warmed up, and without an old gradient that the run would replace."""
    gc.collect()
    return _peak_gpu(run) if device.type == "cuda" else _peak_cpu(run)


def kept_above_inputs(forward: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that are alive as long as what ``forward`` returns; call it warmed up."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        result = forward()
        kept = torch.cuda.memory_allocated() - before
    elif sys.platform.startswith("linux"):
        _trim_heap()
        before = _resident_bytes("VmRSS")
        result = forward()
        _trim_heap()
        kept = _resident_bytes("VmRSS") - before
    else:
        return None
    del result
    return kept
