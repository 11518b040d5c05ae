"""Where an operator's work is done: on the CPU path or by the Triton kernels."""

from ..cpu import forms


def path_of(backend: str):
    """The module that computes: ``gpu`` or ``cpu.forms``, each other's twin."""
    if backend == "triton":
        from .. import gpu  # needs Triton, which the CPU path does not

        return gpu
    return forms


def phases_of(backend: str):
    """The module that computes one phase at a time, for ranks that split the vocabulary."""
    if backend == "triton":
        from .. import gpu_phases

        return gpu_phases
    from ..cpu import split_forms

    return split_forms
