"""What a run allocates: measured on the CPU, and counted where there is no memory, on the meta device."""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from distill_ops.kernels.launch import DeviceFacts
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measured_peak(run: Callable[[], object]) -> int:
    """The most that PyTorch's allocator held at once for ``run`` on the CPU, in bytes above what was held
    before: every allocation counts, those inside of operators too, and no page that was only reserved
    is missed, which the resident memory of :mod:`benchmarks.core.memory` does."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, n_bytes in sorted(changes, key=lambda change: change[0]):
        held += n_bytes
        peak = max(peak, held)
    return peak


class Allocations(TorchDispatchMode):
    """Adds up the storages that operators make, and takes off those that nobody holds any more.

    ``given`` are tensors that were there before."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in given}
        self.held = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.held += n_bytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, n_bytes)

    def _free(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.held -= n_bytes


class _NoLaunch:
    """In a kernel's place: whatever the grid and arguments, nothing runs."""

    def __getitem__(self, grid):
        return lambda *arguments, **named: None


@contextlib.contextmanager
def launching_nothing(facts: DeviceFacts) -> Iterator[None]:
    """Meta tensors take the way of tensors on a GPU of such facts, ``backend="triton"`` among the options;
    what allocates is the package's own code, and the kernels, which allocate nothing, do not run."""
    from distill_ops.kernels import dense, logits, reduction, rows, topk

    from distill_ops.api import choices
    from distill_ops.operators import transforms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choices, "INTERPRETED", True)  # takes tensors that are on no GPU
        patch.setattr(transforms, "dispatches", lambda tensors: False)  # no shapes alone: all runs
        for module in (dense, topk, reduction, logits):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, _NoLaunch())
        for module in (rows, logits):
            patch.setattr(module, "device_facts", lambda device: facts)
        yield
