"""Where an operator's work is done: on the CPU path or by the Triton kernels."""

from ..cpu import forms


def path_of(backend: str):
    """The module that computes: ``gpu`` or ``cpu.forms``, each other's twin."""
    if backend == "triton":
        from .. import gpu  # needs Triton, which the CPU path does not

        return gpu
    return forms


def phases_of(backend: str, top_k: bool = False):
    """The module that computes one phase at a time, for ranks that split the vocabulary; ``top_k``: against
    a teacher of K log-probabilities."""
    if backend == "triton":
        if top_k:
            from .. import gpu_topk_phases

            return gpu_topk_phases
        from .. import gpu_phases

        return gpu_phases
    from ..cpu import split_forms, topk_phases

    return topk_phases if top_k else split_forms
