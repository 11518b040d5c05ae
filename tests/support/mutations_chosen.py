"""Mistakes of a teacher's chosen rows, and of logits in the place of its head."""

from tests.support import sources
from tests.support.mutants import Mutation

ROWS = "tests/losses/test_teacher_rows.py::test_"
LINEAR = "tests/losses/test_linear_teachers.py::test_"
DEBUG = "tests/interface/test_debug.py::test_"
COSTS_ITS_TOKEN = f"{DEBUG}a_row_that_does_not_exist_costs_its_token_alone"

CHOSEN_ROWS = [
    Mutation(
        "rows: a row that does not exist is read", sources.KERNELS_ROWS,
        "exists = (chosen >= 0) & (chosen < n_teacher_rows)", "exists = (chosen >= 0) & (chosen >= 0)",
        f"{COSTS_ITS_TOKEN}[topk_distillation_loss/rows]", kernels=True,
    ),
    Mutation(
        "rows: a token that does not count needs one", sources.KERNELS_ROWS,
        "tl.where(exists | (weight == 0.0), weight, float(\"nan\"))", "tl.where(exists, weight, float(\"nan\"))",
        f"{COSTS_ITS_TOKEN}[distillation_loss/rows]", kernels=True,
    ),
    Mutation(
        "rows: the teacher's are counted as the student's", sources.KERNELS_DENSE,
        "teacher_row, teacher_start, teacher_outer, teacher_inner, teacher_n_inner",
        "teacher_row, teacher_start, teacher_outer, teacher_inner, n_inner",
        f"{ROWS}views[triton-shifted-None]",
    ),
    Mutation(
        "rows: any lies on the student's boundary", sources.KERNELS_ROWS,
        "rows.matches_at_any_row(layouts[0]) if rows is chosen", "rows.matches(layouts[0]) if rows is chosen",
        f"{ROWS}shapes_and_dtypes[triton-torch.float32-1031]",
    ),
    Mutation(
        "rows: the slots are the student's", sources.KERNELS_TOPK,
        "slots = slots_row * k", "slots = tl.cast(row, tl.int64) * k",
        f"{ROWS}topk_of_masked_tokens[triton]",
    ),
    Mutation(
        "rows: a chunk's are the call's first", sources.CPU_DENSE,
        "self.chosen.at(places)", "self.chosen.at(slice(0, n))",
        f"{ROWS}options[torch-mask]",
    ),
    Mutation(
        "rows: the slots of a chunk are its own", sources.CPU_TOPK,
        "slots = places if teacher_rows is None else teacher_rows[places]", "slots = places",
        f"{ROWS}topk_of_masked_tokens[torch]",
    ),
    Mutation(
        "rows: those of the slots are checked that no token has", sources.CHECKS_CONTENTS,
        "kept.view(-1)[teacher_rows[counted.kept(teacher_rows)]] = True", "kept[...] = True",
        f"{ROWS}topk[torch-SoftCrossEntropy()-bucket-forward-fewer]",
    ),
    Mutation(
        "rows: a masked token's index is looked at", sources.CHECKS_CONTENTS,
        "outside = outside & counted.kept(rows)", "pass",
        f"{ROWS}options[torch-mask]",
    ),
    Mutation(
        "rows: all of the teacher's are gathered", sources.CPU_DENSE,
        "run.chosen = ChosenRows(teacher[..., :n_cols], teacher_rows, run.size)\n        teacher = None",
        "teacher = teacher.reshape(-1, teacher.shape[-1])[teacher_rows]",
        f"{ROWS}no_copy_of_the_teacher[False]",
    ),
    Mutation(
        "linear rows: formed anew for each part", sources.HEADS_TEACHERS,
        "kept, by = max(self.end - first, 0), first - self.start", "kept, by = 0, first - self.start",
        f"{LINEAR}a_cpu_forms_each_row_once",
    ),
    Mutation(
        "linear rows: what moves up overlaps", sources.HEADS_TEACHERS,
        "self.buffer[i : i + n] = self.buffer[i + by : i + by + n]",
        "self.buffer[i : i + n] = self.buffer[i : i + n]",
        f"{LINEAR}a_cpu_forms_each_row_once",
    ),
    Mutation(
        "linear rows: tokens in their own order", sources.HEADS_SELECT,
        "if (rows[1:] >= rows[:-1]).all():", "if True:",
        f"{LINEAR}steps_over_one_teacher_s_rows[torch-forward]",
    ),
    Mutation(
        "linear rows: kept whatever they take", sources.HEADS_ENGINE,
        "self.keeps = kept_bytes <= min(budget // 2, budget - least)", "self.keeps = True",
        f"{LINEAR}a_gpu_keeps_all_rows_within_half_of_the_budget[2000]", kernels=True,
    ),
    Mutation(
        "linear rows: a row that does not exist is another", sources.ROWS,
        "weights = torch.where(outside & (weights != 0), math.nan, weights)", "pass",
        f"{LINEAR}indices_that_nobody_looked_at",
    ),
    Mutation(
        "given logits: those of masked tokens are another's", sources.HEADS_TEACHERS,
        "            if index is None:\n                leading", "            if True:\n                leading",
        f"{LINEAR}views_of_logits[torch-padded-True]",
    ),
    Mutation(
        "given logits are copied", sources.HEADS_TEACHERS,
        "if single_stride(leading, strides) is not None:\n                    return cls(logits.view(",
        "if True:\n                    return cls(logits.reshape(",
        f"{LINEAR}given_logits_are_not_copied[torch]",
    ),
    Mutation(
        "given logits: a head beside them is ignored", sources.CHECKS_HEADS,
        "        if tensor is not None:\n            raise ValueError(\n                f\"teacher_logits stand",
        "        if False:\n            raise ValueError(\n                f\"teacher_logits stand",
        "tests/interface/test_hostile.py::test_hostile_calls[linear_distillation_loss/logits: a head too]",
    ),
]  # fmt: skip
