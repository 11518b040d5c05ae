"""Formulas of the Triton path: what the package itself allocates on a GPU.

They leave out the allocator's rounding (512 bytes a tensor) and the matrix products' workspaces of
cuBLAS, which a model has anyway.
"""

from distill_ops.kernels import launch

from distill_ops.heads.blocks import GPU_BUDGET, split
from distill_ops.heads.products import row_stride

from .sizes import FLOAT, Bytes, Sizes

H100 = launch.DeviceFacts(n_sm=132, l2_bytes=50 << 20)
SCALAR = FLOAT  # the loss, the sum of weights, an incoming gradient


def _rows(sizes: Sizes) -> int:
    """A loss and a weight a token, the weights' sum and the loss."""
    return 2 * sizes.tokens * FLOAT + 2 * SCALAR


def dense(sizes: Sizes, mode: str) -> Bytes:
    """``distillation_loss``; ``mode``: "forward", "backward" or "inplace"."""
    inputs = 2 * sizes.logits + sizes.labels
    if mode == "inplace":  # the student's logits become their gradient
        return Bytes(inputs, 0, 0, _rows(sizes), sizes.of_student)
    if mode == "backward":
        saved = sizes.tokens * launch.STATISTICS * FLOAT
        return Bytes(inputs, sizes.logits, saved, 2 * SCALAR, sizes.of_student)
    return Bytes(inputs, sizes.logits, 0, _rows(sizes), sizes.of_student)


def topk_scratch(sizes: Sizes, device: launch.DeviceFacts) -> int:
    """A bit a column for each program in flight: which columns are among the K."""
    choice = launch.dense_launch(
        sizes.tokens, sizes.vocab, sizes.itemsize, sizes.vocab * sizes.itemsize, launch.MATCHED, device
    )  # fmt: skip
    return choice.n_programs * launch.padded(sizes.vocab + 8, choice.lanes * choice.width) // 8


def topk(sizes: Sizes, device: launch.DeviceFacts = H100) -> Bytes:
    """``topk_distillation_loss``: the scratch is given back before the loss is summed."""
    temporary = _rows(sizes) - SCALAR + topk_scratch(sizes, device)
    inputs = sizes.logits + sizes.slots + sizes.labels
    return Bytes(inputs, sizes.logits, 0, temporary, sizes.of_student)


def linear(sizes: Sizes, device: launch.DeviceFacts = H100, *, topk: bool = False) -> Bytes:
    """``linear_distillation_loss``, or ``linear_topk_distillation_loss``: of the gradients, the logits'
    lives a block of tokens at a time, and the logits as float32 some rows at a time."""
    if sizes.itemsize == FLOAT:
        raise ValueError("the formula is of half-precision hidden states and weights")
    stride = row_stride(sizes.vocab, True)
    teacher_row = 0 if topk else stride * FLOAT + sizes.teacher_hidden * sizes.itemsize
    token_bytes = (stride + 2 * sizes.hidden) * sizes.itemsize
    summed = 0 if sizes.frozen_head else sizes.vocab * sizes.hidden * FLOAT
    budget = sizes.memory_budget or GPU_BUDGET
    blocks = split(
        sizes.tokens, token_bytes, teacher_row + stride * FLOAT, budget, summed, gpu=True
    )
    # of the second block, where there is one
    rest = min(blocks.tokens, sizes.tokens - blocks.tokens)
    # the gradient of its logits, and its hidden states, those of tokens that do not count masked
    of_block = blocks.tokens * (stride + sizes.hidden) * sizes.itemsize
    under_work = blocks.rows * stride * FLOAT * (1 if topk else 2)
    tokens = _rows(sizes) - SCALAR + sizes.tokens  # and which are not to be read, a byte each
    # between blocks the next one's hidden states are there too; within one, the top-k kernel's scratch
    scratch = _scratch_of_rows(sizes, blocks.rows, device) if topk else 0
    moment = max(scratch, rest * sizes.hidden * sizes.itemsize)
    temporary = of_block + under_work + tokens + (summed if rest else 0) + moment
    inputs = sizes.of_hidden + (sizes.slots if topk else sizes.of_teacher_hidden)
    return Bytes(inputs + sizes.labels, sizes.of_student, 0, temporary)


def _scratch_of_rows(sizes: Sizes, rows: int, device: launch.DeviceFacts) -> int:
    of_rows = Sizes(rows, sizes.vocab, itemsize=FLOAT)  # float32 logits
    return topk_scratch(of_rows, device)
