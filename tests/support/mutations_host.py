"""Mistakes of the CPU path and of the checks."""

from tests.support import sources
from tests.support.mutants import Mutation

OPTIONS = "tests/losses/test_dense.py::test_options"
DENSE = "tests/losses/test_dense.py::test_"
SEMANTICS = "tests/oracle/test_dense.py::test_"
HOSTILE = "tests/interface/test_hostile.py::test_"
NO_SYNC = "tests/interface/test_no_sync.py::test_nothing_is_read_"
DETERMINISM = "tests/losses/test_determinism.py::test_"
PEAKED = "tests/tools/test_accuracy.py::test_a_peaked_row_"
PARTS = "tests/vocab_parallel/test_dense.py::test_"
DISTRIBUTED = "tests/interface/test_distributed.py::test_a_step_of_two_processes_is_the_step_of_one"

CPU_PATH = [
    Mutation(
        "host: ignored labels count", sources.CPU_FORMS,
        "kept = labels != options.ignore_index", "kept = labels == labels",
        f"{OPTIONS}[torch-ForwardKL()-labels_drop]",
    ),
    Mutation(
        "host: mean over rows, not weights", sources.CPU_FORMS,
        "inputs.n_rows if weights is None else weights.sum()", "inputs.n_rows",
        f"{OPTIONS}[torch-ForwardKL()-float_mask]",
    ),
    Mutation(
        "host: normalizer ignored", sources.CPU_FORMS,
        "over = inputs.normalizer.to(dtype)", "over = weights.sum()",
        f"{DISTRIBUTED}[DDP-soft-1]",
    ),
    Mutation(
        "host: no guard of an empty batch", sources.CPU_FORMS,
        "if inputs.n_rows == 0 or (weights is not None and not weights.any()):",
        "if inputs.n_rows == 0:",
        f"{DENSE}no_kept_token[torch-mask-mean]",
    ),
    Mutation(
        "host: temperature squared lost", sources.ROWS,
        "divergence = divergence * divergence_scale", "pass",
        f"{OPTIONS}[torch-ForwardKL()-temperature_squared]",
    ),
    Mutation(
        "host: gradient not divided by the temperature", sources.CPU_FORMS,
        "options.divergence_scale / options.temperature)", "options.divergence_scale)",
        f"{OPTIONS}[torch-ForwardKL()-temperature]",
    ),
    Mutation(
        "host: components swapped", sources.ROWS,
        "[weighted(divergence), weighted(hard)]", "[weighted(hard), weighted(divergence)]",
        f"{DENSE}components[torch-(0.3, None)-mean]",
    ),
    Mutation(
        "host: hard and soft weights swapped", sources.ROWS,
        "soft_weight * divergence + hard_weight * hard", "hard_weight * divergence + soft_weight * hard",
        f"{OPTIONS}[torch-ForwardKL()-hard]",
    ),
    Mutation(
        "a float64 teacher is rounded", sources.PROBLEM,
        "return working_dtype(self.student, self.teacher)", "return working_dtype(self.student)",
        f"{DENSE}float64_on_the_torch_path[teacher]",
    ),
    Mutation(
        "host: tokens of weight 0 are read", sources.CPU_DENSE,
        "keep = None if weights is None else weights != 0", "keep = None",
        f"{DENSE}dropped_tokens_are_not_read[torch-forward-ForwardKL()]",
    ),
    Mutation(
        "host: gradient of dropped tokens is not 0", sources.CPU_ROWS,
        "(~here).nonzero().squeeze(-1), 0)", "(~here).nonzero().squeeze(-1), 1)",
        f"{DENSE}dropped_tokens_are_not_read[torch-forward-ForwardKL()]",
    ),
    Mutation(
        "host: gradient beyond vocab_size is not 0", sources.CPU_DENSE,
        "gradient[..., n_cols:] = 0", "gradient[..., n_cols:] = 1",
        f"{OPTIONS}[torch-ForwardKL()-vocab_size]",
    ),
    Mutation(
        "host: rows with infinities are not done again", sources.CPU_DENSE,
        "if not finite and guards != ROW_BY_ROW:",
        "if False:",
        f"{SEMANTICS}infinite_logits_propagate[torch-ForwardKL()-padding]",
    ),
    Mutation(
        "host: a lone row is split among threads", sources.CPU_ROWS,
        "if values.shape[0] == 1:", "if False:",
        f"{DETERMINISM}a_lone_row_is_not_split_among_threads[ForwardKL()]",
    ),
    Mutation(
        "host: forward KL's sign", sources.CPU_CLOSED_FORMS,
        "chunk.finite_log(log_p).sub_(chunk.finite_log(log_q)).mul_(p)",
        "chunk.finite_log(log_q).sub_(chunk.finite_log(log_p)).mul_(p)",
        f"{OPTIONS}[torch-ForwardKL()-plain]",
    ),
    Mutation(
        "host: reverse KL is not restricted", sources.CPU_CLOSED_FORMS,
        "masked_fill_(chunk.teacher == NEG_INF, NEG_INF)",
        "masked_fill_(chunk.student == NEG_INF, NEG_INF)",
        f"{SEMANTICS}infinite_logits_are_dropped[torch-forward-ReverseKL()-teacher]",
    ),
    Mutation(
        "host: symmetric KL's weights swapped", sources.CPU_CLOSED_FORMS,
        "mixed = p.mul_(weight - 1)", "mixed = p.mul_(-weight)",
        f"{OPTIONS}[torch-SymmetricKL(weight=0.3)-plain]",
    ),
    Mutation(
        "host: skew reverse KL's slope without its share", sources.CPU_CLOSED_FORMS,
        "share = torch.exp(log_q_over_m, out=free).mul_(alpha)",
        "share = torch.exp(log_q_over_m, out=free).mul_(0)",
        f"{OPTIONS}[torch-SkewReverseKL(alpha=0.2)-plain]",
    ),
    Mutation(
        "host: skew KL's slope without 1 - alpha", sources.CPU_CLOSED_FORMS,
        "exp_, alpha - 1, chunk.scale", "exp_, -1.0, chunk.scale",
        f"{OPTIONS}[torch-SkewForwardKL(alpha=0.1)-plain]",
    ),
    Mutation(
        "host: the mixture's weights swapped", sources.CPU_CLOSED_FORMS,
        "torch.le(log_ratio, 0, out=log_m)", "torch.ge(log_ratio, 0, out=log_m)",
        f"{OPTIONS}[torch-SkewReverseKL(alpha=0.2)-plain]",
    ),
    Mutation(
        "host: total variation twice", sources.CPU_CLOSED_FORMS,
        "sign_, 0.5, chunk.scale", "sign_, 1.0, chunk.scale",
        f"{OPTIONS}[torch-TotalVariation()-plain]",
    ),
    Mutation(
        "host: the backward of softmax writes to strided memory", sources.CPU_CHUNK,
        "gradient.dtype == self.terms.dtype and gradient.is_contiguous()",
        "gradient.dtype == self.terms.dtype",
        f"{OPTIONS}[torch-ForwardKL()-vocab_size]",
    ),
    Mutation(
        "host: beta for 1 - beta", sources.CPU_CLOSED_FORMS,
        "of_student, beta - 1, chunk.scale", "of_student, -beta, chunk.scale",
        f"{OPTIONS}[torch-JensenShannon(beta=0.1)-plain]",
    ),
    Mutation(
        "host: probabilities that do not sum to 1", sources.CPU_CLOSED_FORMS,
        "q.div_(row_sums(q)[:, None])", "pass",
        f"{PEAKED}keeps_its_small_probabilities[skew_forward_kl]",
    ),
    Mutation(
        "host: total variation's mean does not go first", sources.CPU_CLOSED_FORMS,
        "(2 * loss - 1).clamp_(min=0)", "0 * loss",
        f"{PEAKED}keeps_its_small_probabilities[total_variation]",
    ),
    Mutation(
        "host: a mixture near 1 is rounded", sources.CPU_CLOSED_FORMS,
        "expm1_().mul_(0.5).log1p_()", "exp_().add_(1).mul_(0.5).log_()",
        "tests/tools/test_accuracy.py::test_a_mixture_of_nearly_equal_probabilities_is_not_rounded_to_1",
    ),
    Mutation(
        "host: the larger one's share is what the other leaves", sources.CPU_CLOSED_FORMS,
        "share = torch.gt(log_ratio, 0, out=log_q).mul_(of_teacher)\n"
        "        share.add_(torch.le(log_ratio, 0, out=log_m).mul_(of_student))",
        "share = torch.gt(log_ratio, 0, out=log_q).mul_(of_teacher - of_student).add_(of_student)",
        f"{PEAKED}keeps_its_small_probabilities[jensen_shannon(0.1)]",
    ),
    Mutation(
        "host: dropped terms keep their slope", sources.CPU_CLOSED_FORMS,
        "chunk.finite_log(log_q)\n    chunk.without_student_zeros(p)",
        "chunk.finite_log(log_q)",
        f"{SEMANTICS}infinite_logits_are_dropped[torch-forward-SoftCrossEntropy()-student]",
    ),
    Mutation(
        "host: hard labels at the temperature", sources.CPU_CHUNK,
        "self.logits(self.student, 1.0, work)", "self.logits(self.student, self.terms.temperature, work)",
        f"{OPTIONS}[torch-ForwardKL()-hard_temperature]",
    ),
    Mutation(
        "host: a part's probabilities are not the row's", sources.CPU_CHUNK,
        "prob.mul_(row.share / row_sums(prob)[:, None])", "prob",
        f"{PARTS}options[TotalVariation()-labels_drop-float32]",
    ),
    Mutation(
        "host: a part's slope without its constant", sources.CPU_SLOPES,
        "of_q[:, None] + self.k * scale", "of_q[:, None]",
        f"{PARTS}options[SkewReverseKL(alpha=0.2)-float_mask-float32]",
    ),
    Mutation(
        "host: a part's logits go over the temperature as they are", sources.CPU_CHUNK,
        "if row is not None:  # finite", "if False:  # finite",
        f"{PARTS}huge_logits_below_temperature_1[SkewForwardKL(alpha=0.1)]",
    ),
    Mutation(
        "host: a part's hard label is lost at temperature 1", sources.CPU_PARTS,
        "self.hard_scale if together else 0.0", "0.0",
        f"{PARTS}options[ForwardKL()-hard-float32]",
    ),
    Mutation(
        "host: a row without a softmax vanishes", sources.CPU_CHUNK,
        "value = value.masked_fill(dead, 0.0).masked_fill(no_softmax, math.nan)",
        "value = value.masked_fill(dead, 0.0)",
        f"{SEMANTICS}rows_without_a_softmax_are_nan_and_alone[torch-forward-ForwardKL()]",
    ),
]  # fmt: skip

BAD_INPUT = "tests/interface/test_validation.py::test_bad_input"

CHECKS = [
    Mutation(
        "a mask that requires grad", sources.CHECKS_TOKENS,
        'constant("loss_mask", loss_mask)', "pass",
        f"{BAD_INPUT}[loss_mask requires grad.*detach]",
    ),
    Mutation(
        "a vocabulary of no column", sources.CHECKS_OPTIONS,
        'integer("vocab_size", vocab_size, 1)', 'integer("vocab_size", vocab_size, 0)',
        f"{BAD_INPUT}[vocab_size must be at least 1, got 0]",
    ),
    Mutation(
        "the first label beyond the vocabulary", sources.CHECKS_CONTENTS,
        "(ids >= n_cols)", "(ids > n_cols)",
        f"{BAD_INPUT}[labels must lie in [0, 5) .*got 5]",
    ),
    Mutation(
        "values are looked at on the GPU", sources.CHECKS_CONTENTS,
        "if not readable(inputs[0]):", "if False:",
        f"{NO_SYNC}on_the_host[hard-none]",
    ),
    Mutation(
        "labels that only mask are held to the vocabulary", sources.CHECKS_CONTENTS,
        "if options.hard:", "if inputs.labels is not None:",
        f"{HOSTILE}right_numbers[labels beyond the vocabulary only mask-distillation_loss]",
    ),
    Mutation(
        "a mask of labels is taken", sources.CHECKS_CONTENTS,
        "ids = weights < -1 ", "ids = weights < -1000 ",
        f"{HOSTILE}hostile_calls[distillation_loss: a mask of labels padded with -5]",
    ),
    Mutation(
        "weights that are not finite are taken", sources.CHECKS_CONTENTS,
        "bad = ~loss_mask.isfinite()", "bad = loss_mask != loss_mask",
        f"{HOSTILE}hostile_calls[distillation_loss: a mask of inf]",
    ),
    Mutation(
        "a normalizer of 0 is taken", sources.CHECKS_CONTENTS,
        "value is None or 0 < value", "value is None or 0 <= value",
        f"{HOSTILE}hostile_calls[distillation_loss: normalizer=0]",
    ),
    Mutation(
        "log-probabilities of any sum are taken", sources.CHECKS_CONTENTS,
        "(sums > LARGEST_SUM) & (largest", "(sums > 9) & (largest",
        f"{HOSTILE}hostile_calls[topk_distillation_loss: probabilities of sum 1.5]",
    ),
    Mutation(
        "words are flags", sources.SCALARS,
        "if not isinstance(value, bool):", "if False:",
        f"{HOSTILE}hostile_calls[distillation_loss: return_components='false']",
    ),
    Mutation(
        "modules do not check", sources.API_CHOICES,
        "given = given_options(type(self).__name__, shared, *self.without, own=self.own)",
        "from ..arguments import LossArguments\n        given = LossArguments(**shared)",
        f"{HOSTILE}hostile_calls[DistillationLoss: temperature=0]",
    ),
    Mutation(
        "beta = 1 is not the reverse KL", sources.DIVERGENCES_BUILT_IN,
        "return ReverseKL() if is_number(self.beta, 1) else self", "return self",
        f"{SEMANTICS}end_points_are_the_kls[torch]",
    ),
    Mutation(
        "the teacher trains", sources.INTEGRATIONS_MINILLM,
        "    teacher_model.eval()\n", "",
        "tests/interface/test_minillm.py::test_get_distil_loss",
    ),
]  # fmt: skip
