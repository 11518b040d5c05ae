"""Calls that are wrong: for each the exception's type, and words of its message. ``test_hostile.py``
makes them."""

import math
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import distill_ops
from distill_ops import reference
from distill_ops.integrations import minillm
from tests.interface.hostile_kinds import KINDS, MASK_AND_LABELS, Hostile, of_form
from tests.interface.hostile_statistics import STATISTICS
from tests.interface.hostile_support import OF_SUPPORT
from tests.interface.hostile_teachers import CHOSEN, GIVEN
from tests.support.forms import FORMS, HEADS, LOGITS, LOSSES, SLOTS, K, V, tensors_of

# --- options of every loss -------------------------------------------------------------------------

HALF = {"hard_label_weight": 0.5}
LOG_PROB = {"token_outputs": ["log_prob"]}
OPTIONS = [  # options, error, words
    ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
    ({"temperature": 10**400}, ValueError, "temperature must be a positive number.*bits"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive"),
    ({"temperature": "2"}, TypeError, "temperature must be a positive number, got str"),
    ({"temperature": True}, TypeError, "temperature must be a positive number, got bool"),
    ({"temperature": torch.ones(1)}, TypeError, "temperature must be a positive number, got Tensor"),
    ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError, "temperature requires grad"),
    ({"temperature": torch.tensor(2.0, device="meta")}, TypeError, "temperature.* on meta.*Python"),
    ({"temperature": np.float32(-1)}, ValueError, "temperature must be positive"),
    ({"temperature": 2j}, TypeError, "temperature must be a positive number, got complex"),
    ({"ignore_index": 2**70}, ValueError, r"ignore_index must be in \[-9223372036854775808"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int.*got float"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int"),
    ({"hard_label_weight": 1.5}, ValueError, r"hard_label_weight must lie in \[0, 1\]"),
    ({"hard_label_weight": None}, TypeError, "hard_label_weight must be a number"),
    ({"hard_label_weight": 0.5, "labels": None}, ValueError, "hard_label_weight=0.5 needs labels"),
    ({"soft_weight": math.inf}, ValueError, "soft_weight must be finite, got inf"),
    ({"soft_weight": "half"}, TypeError, "soft_weight must be a finite number, got str"),
    ({"soft_weight": True}, TypeError, "soft_weight must be a finite number, got bool"),
    ({"soft_weight": 1.0, "hard_label_weight": math.nan}, ValueError, "hard_label_weight must be fin"),
    ({"soft_weight": 0.0, "hard_label_weight": 0.0}, ValueError, "leave no loss"),
    ({"soft_weight": 1.0, "hard_label_weight": 2.0, "labels": None}, ValueError, "=2.0 needs labels"),
    ({"weight_soft_loss": 0.5}, TypeError, "'weight_soft_loss': pass soft_weight="),
    ({"token_outputs": "log_prob"}, TypeError, r"token_outputs must be a tuple of names.*'log_prob'"),
    ({"token_outputs": None}, TypeError, "token_outputs must be a tuple of names"),
    ({"token_outputs": ("logprobs",)}, ValueError, "'logprobs': pass 'log_prob'"),
    ({"token_outputs": ["teacher_mas"]}, ValueError, "did you mean 'teacher_mass'"),
    ({"token_outputs": [0]}, ValueError, "each of token_outputs must be one of"),
    ({"token_outputs": ["log_prob"], "labels": None}, ValueError, "needs labels= or token_ids="),
    ({"token_ids": torch.zeros(4).long()}, ValueError, "token_ids are what token_outputs="),
    ({"token_ids": torch.zeros(3).long(), **LOG_PROB}, ValueError, "token_ids must have the leading"),
    ({"token_ids": torch.zeros(4), **LOG_PROB}, TypeError, "token_ids must be int64 or int32"),
    ({"token_ids": torch.full((4,), V), **LOG_PROB}, ValueError, rf"token_ids must lie in \[0, {V}\)"),
    ({"labels": torch.full((4,), V), **LOG_PROB}, ValueError, rf"labels must lie in \[0, {V}\)"),
    ({"token_outputs": ["teacher_mass"], "hard_label_weight": 1.0, "labels": torch.ones(4).long()}, ValueError, "of the teacher, who"),
    ({"scale_by_temperature_squared": "false"}, TypeError, "scale_by.* True or False, got 'false'"),
    ({"scale_by_temperature_squared": 1}, TypeError, "scale_by.* must be True or False, got 1"),
    ({"return_components": "false"}, TypeError, "return_components must be True or False"),
    ({"return_components": torch.tensor(True)}, TypeError, "return_components must be True or False"),
    ({"reduction": "batch_mean"}, ValueError, "reduction .*'batch_mean': 'mean' is over the tokens"),
    ({"reduction": "batchmean"}, ValueError, "reduction .*'batchmean': 'mean' is over the tokens"),
    ({"reduction": "Mean"}, ValueError, "reduction .*did you mean 'mean'"),
    ({"reduction": None}, ValueError, "reduction must be one of"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"divergence": "jsd"}, ValueError, "'jsd': pass 'jensen_shannon'"),
    ({"divergence": "kl"}, ValueError, "'kl': pass 'forward_kl' .*or 'reverse_kl'"),
    ({"divergence": "fkl"}, ValueError, "'fkl': pass 'forward_kl'"),
    ({"divergence": "RKL"}, ValueError, "'RKL': pass 'reverse_kl'"),
    ({"divergence": "tvd"}, ValueError, "'tvd': pass 'total_variation'"),
    ({"divergence": "kl-div"}, ValueError, "'kl-div': pass 'forward_kl'"),
    ({"divergence": "forward_lk"}, ValueError, "did you mean 'forward_kl'"),
    ({"divergence": 0.5}, TypeError, "divergence must be a name or a Divergence"),
    ({"divergence": distill_ops.JensenShannon}, TypeError, "divergence must be a name or a Div"),
    ({"divergence": distill_ops.JensenShannon(torch.tensor(1.5))}, ValueError, "beta of jensen.* 1.5"),
    ({"divergence": distill_ops.SymmetricKL(torch.full((3,), 0.5))}, ValueError, "weight of symm"),
    ({"divergence": distill_ops.SkewForwardKL(torch.tensor(0.1, device="meta"))}, ValueError, "alpha"),
    ({"normalizer": -1}, ValueError, "normalizer must be finite and not negative"),
    ({"normalizer": 10**400}, ValueError, "normalizer must be a number.*bits"),
    ({"normalizer": 0}, ValueError, "normalizer must be positive.*got 0"),
    ({"normalizer": torch.tensor(0)}, ValueError, "normalizer must be positive.*got 0"),
    ({"normalizer": torch.tensor(-3.0)}, ValueError, "normalizer must be positive.*got -3"),
    ({"normalizer": torch.tensor(math.inf)}, ValueError, "normalizer must be positive.*got inf"),
    ({"normalizer": torch.tensor(True)}, ValueError, "normalizer must be a number or a real 0-d"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer .*reduction='sum'"),
    ({"normalizer": "3"}, TypeError, "normalizer must be a number or a 0-d tensor"),
    ({"labels": torch.full((4,), V), **HALF}, ValueError, rf"labels must lie in \[0, {V}\).*{V}"),
    ({"labels": torch.full((4,), -5), **HALF}, ValueError, "labels must lie in .*got -5"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1"),
    ({"vocab_size": V + 1}, ValueError, rf"vocab_size must be in \[1, {V}\], got {V + 1}"),
    ({"vocab_size": 2.0}, TypeError, "vocab_size must be an int"),
    ({"vocab_size": "all"}, TypeError, "vocab_size must be an int"),
    ({"beta": 0.5}, TypeError, r"unexpected .*'beta'.*divergence=JensenShannon\(beta="),
    ({"num_items_in_batch": 3}, TypeError, "'num_items_in_batch': pass normalizer="),
    ({"temprature": 2.0}, TypeError, "'temprature': did you mean 'temperature'"),
    ({"kd_ratio": 0.5}, TypeError, "'kd_ratio': pass hard_label_weight="),
    ({"attention_mask": None}, TypeError, "'attention_mask': pass loss_mask="),
]  # fmt: skip
NOT_OF_THE_REFERENCE = [
    ({"gradient": "later"}, ValueError, "gradient must be one of"),
    (
        {"gradient": "forward", "reduction": "none"},
        ValueError,
        "gradient='forward' needs reduction",
    ),
]
MASKS = {
    "labels": (torch.tensor([3, -100, 0, 10]), "token ids have it: pass labels="),
    "labels padded with -5": (torch.tensor([3, -5, 0, 10]), "-5, as token ids have it"),
    "labels of int32": (torch.tensor([3, -100, 0, 10], dtype=torch.int32), "-100, as token ids"),
    "nan": (torch.tensor([1, math.nan, 0, 1]), "finite weights, got nan"),
    "inf": (torch.tensor([1, math.inf, 0, 1]), "finite weights, got inf"),
    "-inf in half precision": (torch.tensor([1, -math.inf, 0, 1]).half(), "finite weights, got -inf"),
}  # fmt: skip


def shown(options: dict) -> str:
    return ", ".join(f"{name}={value!r}"[:45] for name, value in options.items())


LOSS_OPTIONS = [
    of_form(form, shown(options), error, words, **options)
    for form in LOSSES
    for options, error, words in OPTIONS + NOT_OF_THE_REFERENCE
]
LOSS_OPTIONS += [
    of_form(form, f"a mask of {name}", ValueError, f"loss_mask must hold .*{words}", loss_mask=mask)
    for form in LOSSES
    for name, (mask, words) in MASKS.items()
]
LOSS_OPTIONS += [
    of_form(form, name, ValueError, words, **options)
    for form in LOSSES
    for name, words, options in (
        ("a mask that requires grad", "loss_mask requires grad", {"loss_mask": torch.ones(4).requires_grad_()}),
        (
            "a mask that holds another ignore_index", "got 7, as token ids have it",
            {"loss_mask": torch.tensor([7, 1, 0, 1]), "ignore_index": 7},
        ),
    )
]  # fmt: skip

# --- what single functions take --------------------------------------------------------------------

IDS = tensors_of("topk_distillation_loss")["teacher_ids"]
LOG_PROBS = tensors_of("topk_distillation_loss")["teacher_log_probs"]
TOPK = [form for form in LOSSES if "topk" in form]
LINEAR = [form for form in FORMS if "linear" in form]
KL_OF_K = {"tail": "drop", "divergence": "forward_kl"}
TAILS = [
    ({"tail": None}, ValueError, "tail must be one of 'bucket', .*'drop', got None"),
    (KL_OF_K | {"mass_terms": 1}, TypeError, "mass_terms must be True or False, got 1"),
    (KL_OF_K | {"mass_terms": "no"}, TypeError, "mass_terms must be True or False, got 'no'"),
    ({"mass_terms": True}, ValueError, "got tail='bucket': pass tail='drop'"),
    ({"mass_terms": True, "tail": "restrict"}, ValueError, "got tail='restrict': pass tail='drop'"),
    (
        {"mass_terms": True, "tail": "drop"},
        ValueError,
        "generalised KL of 'forward_kl'.* got soft_cross",
    ),
    (
        {"mass_terms": True, "tail": "drop", "divergence": "jensen_shannon"},
        ValueError,
        "mass_terms=True makes the generalised KL .*got jensen_shannon: choose one of these",
    ),
    ({"log_prob_floor": 0}, ValueError, "log_prob_floor must be finite and negative .*got 0"),
    ({"log_prob_floor": 10}, ValueError, "log_prob_floor must be finite and negative .*got 10"),
    ({"log_prob_floor": -math.inf}, ValueError, "log_prob_floor must be finite .* got -inf"),
    ({"log_prob_floor": math.nan}, ValueError, "log_prob_floor must be finite and negative"),
    ({"log_prob_floor": "-10"}, TypeError, "log_prob_floor must be None or a .* number, got str"),
    ({"log_prob_floor": True}, TypeError, "log_prob_floor must be None or a .* number, got bool"),
    ({"log_prob_floor": torch.full((4,), -9.0)}, TypeError, "log_prob_floor must be .*got Tensor"),
    ({"log_prob_floor": -(10**400)}, ValueError, "log_prob_floor must be None or a .*bits"),
    ({"log_prob_floor": -9, "tail": "ignore"}, ValueError, "needs tail='bucket', .*got 'ignore'"),
    ({"log_prob_floor": -9, "tail": "renormalize"}, ValueError, "log_prob_floor=-9 needs tail="),
]
SINGLE = [
    of_form("distillation_loss", "inplace='false'", TypeError, "inplace must be True", inplace="false"),
    of_form("distillation_loss", "inplace=1", TypeError, "inplace must be True or False", inplace=1),
    of_form("distillation_loss", "infinities", ValueError, "infinities must be", infinities="keep"),
    of_form(
        "distillation_loss", "teacher of grad", ValueError, "teacher_logits requires grad.*detach",
        teacher_logits=torch.zeros(4, V, requires_grad=True),
    ),
    of_form(
        "distillation_loss", "other widths", ValueError, f"{V} columns .* {V + 1}: pass vocab_size=",
        teacher_logits=torch.zeros(4, V + 1),
    ),
    of_form(
        "distillation_loss", "no teacher", ValueError, "teacher_logits is None", teacher_logits=None
    ),
]  # fmt: skip
for form in TOPK:
    SINGLE += [
        of_form(
            form, "a whole teacher's output", ValueError, "of the teacher's whole row.*leave them out",
            token_outputs=("acceptance",),
        ),
        of_form(form, "tail", ValueError, "tail must be one of .*did you mean 'bucket'", tail="buckets"),
        *(of_form(form, f"{shown(options)} of a tail", *expected, **options) for options, *expected in TAILS),
        of_form(
            form, "repeated ids", ValueError, "teacher_ids must be unique",
            teacher_ids=torch.zeros_like(IDS),
        ),
        of_form(form, "ids beyond", ValueError, rf"teacher_ids must lie in \[0, {V}\)", teacher_ids=IDS + V),
        of_form(form, "an id of -2", ValueError, "teacher_ids must lie in .*got -2", teacher_ids=IDS * 0 - 2),
        of_form(
            form, "logits for log-probabilities", ValueError, "teacher_log_probs must be logarithms",
            teacher_log_probs=LOG_PROBS + 5,
        ),
        of_form(
            form, "logits in half precision", ValueError, "teacher_log_probs must be log.*got 12",
            teacher_log_probs=torch.full((4, K), 12.0).half(),
        ),
        of_form(
            form, "large logits", ValueError, "teacher_log_probs must be logarithms.*got 100",
            teacher_log_probs=torch.full((4, K), 100.0),
        ),
        of_form(
            form, "probabilities of sum 1.5", ValueError, "add up to at most 1, got 1.5",
            teacher_log_probs=torch.full((4, K), math.log(0.5)),
        ),
        of_form(
            form, "a sum of 1.5 in half precision", ValueError, "add up to at most 1",
            teacher_log_probs=torch.full((4, K), math.log(0.5)).half(),
        ),
        of_form(form, "no slots", ValueError, "at least one slot", teacher_ids=IDS[:, :0]),
        of_form(form, "slots of two widths", ValueError, "must have the shape of", teacher_ids=IDS[:, :2]),
        of_form(form, "a teacher of None", ValueError, "teacher_ids is None", teacher_ids=None),
        of_form(
            form, "log-probabilities that require grad", ValueError, "teacher_log_probs requires grad",
            teacher_log_probs=LOG_PROBS.clone().requires_grad_(),
        ),
        of_form(form, "infinities", TypeError, "unexpected keyword argument 'infinities'", infinities="drop"),
    ]  # fmt: skip
for form in LINEAR:
    side = "" if "token" in form else "student_"
    SINGLE += [
        of_form(form, "softcap of 0", ValueError, f"{side}softcap must be positive", **{f"{side}softcap": 0}),
        of_form(form, "softcap of text", TypeError, f"{side}softcap must be a", **{f"{side}softcap": "30"}),
        of_form(form, "scale None", TypeError, f"{side}logit_scale", **{f"{side}logit_scale": None}),
        of_form(form, "scale inf", ValueError, f"{side}logit_scale", **{f"{side}logit_scale": math.inf}),
        of_form(form, "logits_dtype", ValueError, "logits_dtype must be", logits_dtype="float32"),
        of_form(form, "logits_dtype of int", ValueError, "logits_dtype must be", logits_dtype=torch.int8),
        of_form(form, "memory_budget=0", ValueError, "memory_budget must be at least 1", memory_budget=0),
        of_form(form, "memory_budget=1e9", TypeError, "memory_budget must be an int", memory_budget=1e9),
        of_form(
            form, "a weight of vectors", ValueError, f"{side}weight must be", **{f"{side}weight": torch.zeros(5)}
        ),
    ]  # fmt: skip
    if form not in LOSSES:
        continue
    SINGLE += [
        of_form(form, "kept_tokens=0", ValueError, "kept_tokens must be at least 1", kept_tokens=0),
        of_form(form, "kept_tokens=2", ValueError, "kept_tokens=2 must bound .*got 3", kept_tokens=2),
        Hostile(
            f"{form}: kept_tokens=3 of four tokens, all of which count",
            lambda form=form: FORMS[form](
                {k: x for k, x in tensors_of(form).items() if k not in ("labels", "loss_mask")},
                kept_tokens=3,
            ), ValueError, "kept_tokens=3 must bound .*got 4",
        ),
        of_form(form, "kept_tokens=True", TypeError, "kept_tokens must be an int", kept_tokens=True),
        of_form(form, "inplace", TypeError, "unexpected keyword argument 'inplace'", inplace=True),
    ]  # fmt: skip
ALONE = {"teacher_hidden": None, "teacher_weight": None, "hard_label_weight": 1.0}
for name, value in (("bias", torch.zeros(V)), ("softcap", 30.0), ("logit_scale", 2.0)):
    given = {"teacher_bias": None} | {f"teacher_{name}": value}
    SINGLE.append(
        of_form(
            "linear_distillation_loss", f"an unused teacher_{name}", ValueError,
            f"teacher_{name} is unused", **ALONE, **given,
        )
    )  # fmt: skip
for form in FORMS:
    if not FORMS[form].of_token:
        continue
    ids = tensors_of(form)["token_ids"]
    SINGLE += [
        of_form(form, "ids beyond", ValueError, rf"token_ids must lie in \[0, {V}\)", token_ids=ids + V),
        of_form(form, "temperature=10**400", ValueError, "temperature .*bits", temperature=10**400),
        of_form(form, "temperature=-1", ValueError, "temperature must be positive", temperature=-1),
        of_form(form, "ignore_index=2**70", ValueError, "ignore_index must be in", ignore_index=2**70),
        of_form(form, "backend", ValueError, "backend must be one of", backend="gpu"),
    ]  # fmt: skip
SMALL = torch.zeros(2, 3)
LEAF = torch.zeros(2, requires_grad=True)
MORE = [
    ("token_log_probs: return_entropy=1", lambda: distill_ops.token_log_probs(SMALL, torch.tensor([0, 1]), return_entropy=1), TypeError, "return_entropy must be True or False"),
    ("linear_token_log_probs: return_entropy='no'", lambda: distill_ops.linear_token_log_probs(SMALL, SMALL, torch.tensor([0, 1]), return_entropy="no"), TypeError, "return_entropy must be True"),
    ("mixture_token_log_probs: weight 1.1", lambda: distill_ops.mixture_token_log_probs(SMALL, SMALL, torch.tensor([0, 1]), 1.1), ValueError, "teacher_weight must lie in"),
    ("mixture_token_log_probs: weight nan", lambda: distill_ops.mixture_token_log_probs(SMALL, SMALL, torch.tensor([0, 1]), torch.tensor(math.nan)), ValueError, "teacher_weight must lie in"),
    ("mixture_token_log_probs: weight of grad", lambda: distill_ops.mixture_token_log_probs(SMALL, SMALL, torch.tensor([0, 1]), LEAF), ValueError, "teacher_weight requires grad"),
    ("distillation_metrics: temperature", lambda: distill_ops.distillation_metrics(SMALL, SMALL, temperature="1"), TypeError, "temperature must be a positive number"),
    ("distillation_metrics: vocab_size", lambda: distill_ops.distillation_metrics(SMALL, SMALL, vocab_size=4), ValueError, "vocab_size must be in"),
    ("distillation_metrics: backend", lambda: distill_ops.distillation_metrics(SMALL, SMALL, backend=None), ValueError, "backend must be one of"),
    ("teacher_topk: k=0", lambda: distill_ops.teacher_topk(SMALL, 0), ValueError, "k must be in"),
    ("teacher_topk: k=4", lambda: distill_ops.teacher_topk(SMALL, 4), ValueError, "k must be in"),
    ("teacher_topk: k=1.0", lambda: distill_ops.teacher_topk(SMALL, 1.0), TypeError, "k must be an int"),
    ("teacher_topk: temperature", lambda: distill_ops.teacher_topk(SMALL, 1, temperature=0), ValueError, "temperature must be positive"),
    ("teacher_topk: sparse", lambda: distill_ops.teacher_topk(SMALL.to_sparse(), 1), TypeError, "logits must be dense"),
    ("reverse_kl_estimate: kind", lambda: distill_ops.reverse_kl_estimate(SMALL, SMALL, kind="k4"), ValueError, "kind must be one of"),
    ("reverse_kl_estimate: half", lambda: distill_ops.reverse_kl_estimate(SMALL.half(), SMALL, kind="k1"), TypeError, "student_log_prob must be float32"),
    ("reverse_kl_estimate: shapes", lambda: distill_ops.reverse_kl_estimate(SMALL, SMALL[:1], kind="k1"), ValueError, "teacher_log_prob must have the shape"),
    ("set_debug: 'false'", lambda: distill_ops.set_debug("false"), TypeError, "enabled must be True or False, got 'false'"),
    ("set_debug: 0", lambda: distill_ops.set_debug(0), TypeError, "enabled must be True or False, got 0"),
    ("set_debug: None", lambda: distill_ops.set_debug(None), TypeError, "enabled must be True or False"),
    ("Divergence", distill_ops.Divergence, TypeError, "Divergence is what .*pass one of them"),
    ("JensenShannon: 1.1", lambda: distill_ops.JensenShannon(1.1), ValueError, r"beta must lie in \[0, 1\]"),
    ("JensenShannon: True", lambda: distill_ops.JensenShannon(True), TypeError, "beta must be a number"),
    ("JensenShannon: 10**400", lambda: distill_ops.JensenShannon(10**400), ValueError, "beta must be a number.*bits"),
    ("JensenShannon: integers", lambda: distill_ops.JensenShannon(torch.ones(2, dtype=torch.int64)), TypeError, "beta must be a number or a floating-point tensor"),
    ("JensenShannon: learnt", lambda: distill_ops.JensenShannon(LEAF), ValueError, "beta requires grad"),
    ("SymmetricKL: nan", lambda: distill_ops.SymmetricKL(math.nan), ValueError, "weight must lie in"),
    ("AlphaBeta: -1", lambda: distill_ops.AlphaBeta(-1, 0.5), ValueError, "alpha.*-1"),
    ("AlphaBeta: 0, 0", lambda: distill_ops.AlphaBeta(0, 0), ValueError, "alpha"),
    ("SkewForwardKL: text", lambda: distill_ops.SkewForwardKL("0.1"), TypeError, "alpha must be a number"),
    ("declare_divergence: a lambda", lambda: distill_ops.declare_divergence(lambda log_q, log_p, q, p: (q, p)), ValueError, "got a lambda"),
    ("declare_divergence: a number", lambda: distill_ops.declare_divergence(3), TypeError, "takes a function, got int"),
    ("declare_divergence: a callable object", lambda: distill_ops.declare_divergence(name="a")(partial(max)), TypeError, "takes a function, got partial"),
    ("JensenShannon: float8", lambda: distill_ops.JensenShannon(torch.tensor(0.5).to(torch.float8_e4m3fn)), TypeError, "beta must be a number or a floating-point tensor, got torch.float8"),
    ("JensenShannon: Fraction", lambda: distill_ops.JensenShannon(Fraction(10**400)), ValueError, "beta must be a number.*Fraction"),
    ("mixture_token_log_probs: sparse weight", lambda: distill_ops.mixture_token_log_probs(SMALL, SMALL, torch.tensor([0, 1]), torch.tensor(0.2).to_sparse()), TypeError, "teacher_weight must be dense"),
    ("linear_distillation_loss: infinities", lambda: FORMS["linear_distillation_loss"](tensors_of("linear_distillation_loss"), infinities="drop"), TypeError, "'infinities'$"),
    ("linear_distillation_loss: kept_token", lambda: FORMS["linear_distillation_loss"](tensors_of("linear_distillation_loss"), kept_token=3), TypeError, "'kept_token': did you mean 'kept_tokens'"),
    ("linear_topk_distillation_loss: tial", lambda: FORMS["linear_topk_distillation_loss"](tensors_of("linear_topk_distillation_loss"), tial="bucket"), TypeError, "'tial': did you mean 'tail'"),
    ("distillation_loss: inplac", lambda: FORMS["distillation_loss"](tensors_of("distillation_loss"), inplac=True), TypeError, "'inplac': did you mean 'inplace'"),
    ("linear_distillation_loss: memory_budget=2**80", lambda: FORMS["linear_distillation_loss"](tensors_of("linear_distillation_loss"), memory_budget=2**80), ValueError, "memory_budget must be at least 1"),
    ("get_mixed_loss: kd_ratio='0.5'", lambda: minillm.get_mixed_loss(SimpleNamespace(kd_ratio="0.5"), None, {}, {}, SMALL), TypeError, "args.kd_ratio must be a number"),
    ("DistillationLoss: positional", lambda: distill_ops.DistillationLoss("reverse_kl"), TypeError, r"DistillationLoss.__init__\(\)"),
    ("get_mixed_loss: kd_ratio", lambda: minillm.get_mixed_loss(SimpleNamespace(kd_ratio=2), None, {}, {}, SMALL), ValueError, "kd_ratio must lie in"),
    ("get_distil_loss: model_parallel", lambda: minillm.get_distil_loss(SimpleNamespace(model_parallel=True), None, None, None, {}, {}, SMALL), ValueError, "model_parallel is true"),
]  # fmt: skip


def declared(log_q, log_p, q, p, weight=1.0):
    return weight * (q - p), weight * q


MALFORMED = [
    ({"domains": ["weight"]}, TypeError, "domains must be a dict"),
    ({"domains": {"weight": 3}}, ValueError, r"domains\['weight'\] must be an interval"),
    ({"domains": {"weight": (0, 1, 2)}}, ValueError, r"domains\['weight'\] must be an interval"),
    ({"domains": {"weight": (1, 0)}}, ValueError, "low below high"),
    ({"domains": {"weight": (0, math.nan)}}, ValueError, "low below high"),
    ({"domains": {"weight": ("a", "b")}}, TypeError, r"domains\['weight'\] must be a pair"),
    ({"domains": {3: (0, 1)}}, TypeError, "domains must be by the parameters' names, got 3"),
    ({"domains": {"other": (0, 1)}}, ValueError, "domains names no parameter: other"),
    ({"name": ""}, ValueError, "name must be a word"),
    ({"name": "a b"}, ValueError, "name must be a word"),
    ({"name": 3}, ValueError, "name must be a word"),
    ({"name": "forward_kl"}, ValueError, "is called 'forward_kl' already"),
    ({"infinite_at_student_zero": "no"}, TypeError, "infinite_at_student_zero must be True"),
    ({"infinite_at_teacher_zero": 1}, TypeError, "infinite_at_teacher_zero must be True"),
]
MORE += [
    (
        f"declare_divergence: {shown(options)}",
        partial(distill_ops.declare_divergence, declared, **options), error, words,
    )
    for options, error, words in MALFORMED
]  # fmt: skip
MODULES = {
    "DistillationLoss": distill_ops.DistillationLoss,
    "LinearDistillationLoss": distill_ops.LinearDistillationLoss,
}
OF_MODULES = [
    ({"temperature": 0}, ValueError, "temperature must be positive"),
    ({"divergence": "jsd"}, ValueError, "'jsd': pass 'jensen_shannon'"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of"),
    ({"hard_label_weight": 2}, ValueError, "hard_label_weight must lie in"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"gradient": "now"}, ValueError, "gradient must be one of"),
    ({"gradient": "forward", "reduction": "none"}, ValueError, "gradient='forward' needs"),
    ({"return_components": "yes"}, TypeError, "return_components must be True"),
    ({"vocab_size": -1}, ValueError, "vocab_size must be at least 1"),
    ({"normalizer": -1}, ValueError, "normalizer must be finite"),
    ({"ignore_index": "pad"}, TypeError, "ignore_index must be an int"),
    ({"beta": 0.5}, TypeError, "Loss.*'beta'.*JensenShannon"),
    ({"student_logits": None}, TypeError, "unexpected keyword argument 'student_logits'"),
]
MORE += [
    (f"{name}: {shown(options)}", partial(kind, **options), error, words)
    for name, kind in MODULES.items()
    for options, error, words in OF_MODULES
]
MORE += [
    (f"{name}: {shown(options)}", partial(MODULES[name], **options), error, words)
    for name, options, error, words in (
        ("DistillationLoss", {"inplace": "no"}, TypeError, "inplace must be True"),
        (
            "LinearDistillationLoss",
            {"student_softcap": 0},
            ValueError,
            "student_softcap must be pos",
        ),
        ("LinearDistillationLoss", {"teacher_logit_scale": None}, TypeError, "teacher_logit_scale"),
        ("LinearDistillationLoss", {"logits_dtype": "half"}, ValueError, "logits_dtype must be"),
        (
            "LinearDistillationLoss",
            {"memory_budget": 0.5},
            TypeError,
            "memory_budget must be an int",
        ),
        (
            "LinearDistillationLoss",
            {"kept_tokens": 0},
            ValueError,
            "kept_tokens must be at least 1",
        ),
        ("LinearDistillationLoss", {"infinities": "drop"}, TypeError, "'infinities'"),
    )
]
REFERENCE = {
    "distillation_loss": partial(
        reference.distillation_loss, *(tensors_of("distillation_loss")[x] for x in LOGITS)
    ),
    "topk_distillation_loss": partial(
        reference.topk_distillation_loss,
        *(tensors_of("topk_distillation_loss")[x] for x in (LOGITS[0], *SLOTS)),
    ),
    "linear_distillation_loss": partial(
        reference.linear_distillation_loss,
        *(tensors_of("linear_distillation_loss")[x] for x in HEADS),
    ),
}
MORE += [
    (f"reference.{name}: {shown(options)}", partial(function, **options), error, words)
    for name, function in REFERENCE.items()
    for options, error, words in OPTIONS
    if "backend" not in options
]
CASES = [
    *KINDS,
    *MASK_AND_LABELS,
    *LOSS_OPTIONS,
    *SINGLE,
    *STATISTICS,
    *OF_SUPPORT,
    *CHOSEN,
    *GIVEN,
]
CASES += [Hostile(*case) for case in MORE]
