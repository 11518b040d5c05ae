"""Mistakes of the linear loss: its engine, its operators, its kernels."""

from tests.support import sources
from tests.support.mutants import Mutation

LINEAR = "tests/losses/test_linear.py::test_"
LINEAR_GRADIENTS = "tests/losses/test_linear_gradients.py::test_"
BLOCKS = "tests/losses/test_linear_blocks.py::test_"
FORMS = "tests/losses/test_linear_forms.py::test_"
KERNELS = "tests/kernels/test_head.py::test_"

LINEAR_FORM = [
    Mutation(
        "linear: the weight gradient is summed in its own dtype", sources.HEADS_PROJECTION,
        "if several and self.sum.dtype != wide:", "if False:",
        f"{BLOCKS}the_weight_gradient_is_summed_in_float32[gpu]",
    ),
    Mutation(
        "linear: the last block's weight gradient alone", sources.HEADS_PROJECTION,
        "add=self.started", "add=False",
        f"{BLOCKS}blocks_that_do_not_divide_the_tokens[torch-7-None]",
    ),
    Mutation(
        "linear: no derivative of the softcap", sources.HEADS_ENGINE,
        "projection.through_softcap_(part, logits)", "pass",
        f"{LINEAR}divergences[torch-ForwardKL()]",
    ),
    Mutation(
        "linear: the bias's gradient without the logits' scale", sources.HEADS_ENGINE,
        "(of_bias * head.logit_scale)", "of_bias",
        f"{LINEAR}divergences[torch-ForwardKL()]",
    ),
    Mutation(
        "linear: masked hidden states are read", sources.HEADS_PROJECTION,
        "return hidden if unread is None else hidden.masked_fill(unread[rows, None], 0.0)",
        "return hidden",
        f"{LINEAR}masked_tokens_are_not_read[triton-mask]",
    ),
    Mutation(
        "linear: a frozen head's gradient is made", sources.HEADS_ENGINE,
        "if self.wanted.weight:", "if True:",
        f"{LINEAR_GRADIENTS}only_wanted_gradients_are_made[torch-('student_hidden',)]",
    ),
    Mutation(
        "linear: losses of the kept tokens at the front", sources.HEADS_SELECT,
        "everywhere.index_copy_(-1, selection.index, found)",
        "everywhere.index_copy_(-1, selection.index.argsort(), found)",
        f"{LINEAR}masked_tokens_are_not_read[torch-kept_tokens_none]",
    ),
    Mutation(
        "linear: more tokens than kept_tokens pass unnoticed", sources.HEADS_SELECT,
        "(~unread).sum() > bound", "(~unread).sum() > n_rows",
        f"{LINEAR}too_many_kept_tokens[triton]",
    ),
    Mutation(
        "linear: the incoming gradients of masked tokens alone", sources.OPERATORS_LINEAR,
        "weights = tokens.weights * upstream", "weights = tokens.weights",
        f"{LINEAR}options[torch-float_mask_none]",
    ),
    Mutation(
        "linear: an infinite gradient of a masked token", sources.OPERATORS_LINEAR,
        "torch.where(tokens.weights == 0, 0.0, weights)", "weights",
        f"{BLOCKS}an_infinite_upstream_of_a_masked_token[torch-inf]",
    ),
    Mutation(
        "linear: blocks summed in the weight's dtype, not the products'", sources.HEADS_PRODUCTS,
        "return torch.promote_types(dtype, torch.float32)", "return torch.float32",
        f"{BLOCKS}blocks_of_every_dtype[torch.float32-torch.bfloat16-float64]",
    ),
    Mutation(
        "linear: strides of a stored teacher's slots ignored", sources.ROWS,
        "x.contiguous().view(shape)", "x.reshape(shape)",
        f"{FORMS}topk_of_the_first_slots_that_are_stored[triton-views0]",
    ),
    Mutation(
        "linear: the bias is not scaled", sources.KERNELS_LOGITS,
        "other=0.0).to(tl.float32) * scale", "other=0.0).to(tl.float32)",
        f"{LINEAR}divergences[triton-ForwardKL()]",
    ),
    Mutation(
        "linear: tanh of a small number by exponentials", sources.KERNELS_MATH,
        "tl.where(size < 0.25, series", "tl.where(size < 0.0, series",
        f"{KERNELS}tanh", kernels=True,
    ),
    Mutation(
        "linear: strides that the compiler cannot prove", sources.KERNELS_LOGITS,
        "(stride // 8 * 8)", "stride",
        "tests/compiled/test_head.py::test_head_kernels[float32-sm_90]",
    ),
]  # fmt: skip
