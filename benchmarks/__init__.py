"""Measurements and counts, run from the repository's root.

``python -m benchmarks``: the dense losses beside eager PyTorch, torch.compile and peers;
``benchmarks.forms``: the other forms; ``benchmarks.accuracy``: the numeric rule;
``benchmarks.static``: what the compiled kernels cost; ``benchmarks.report``: README's table and
docs/benchmarks.md; ``benchmarks.memory_table``: docs/memory.md's tables, computed;
``benchmarks.losses.overhead``: the cost in Python of one call; ``benchmarks.gpu.check`` and ``benchmarks.gpu.measure``: what is run on a GPU.
"""
