"""The matrix of what is compiled: every kernel with its forms, dtypes and divergences.

The launchers themselves make the launches, on tensors without memory. This is the one file of
``benchmarks.static`` that calls the product's operators and launchers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from distill_ops.kernels import logits as head_kernels
from distill_ops.kernels import metrics, pair, reduction

from distill_ops.analysis import aot, forms
from distill_ops.analysis.forms import Form
from distill_ops.divergences.base import Divergence
from distill_ops.divergences.built_in import BUILT_IN

TRAIN, SHORT, ODD, EVEN, EVAL, BACKWARD, HARD, HARD_T, MIXED, PADDED, STRIDED = (
    "train", "short vocabulary", "odd vocabulary", "even vocabulary", "no gradient",
    "gradient in backward", "hard label", "hard label at T=2", "float32 teacher", "padded head",
    "other stride",
)  # fmt: skip
LARGE = 128256  # Llama 3's vocabulary
DENSE = {
    TRAIN: Form(LARGE),
    SHORT: Form(32000),
    ODD: Form(50257),  # GPT-2's: rows begin at odd addresses
    EVEN: Form(50304),  # its neighbour, which the odd one is compared with
    EVAL: Form(LARGE, gradient="none"),
    BACKWARD: Form(LARGE, gradient="backward"),
    HARD: Form(LARGE, hard_label_weight=0.5),
    HARD_T: Form(LARGE, hard_label_weight=0.5, temperature=2.0),
    MIXED: Form(32000, teacher_dtype=torch.float32),
    PADDED: Form(151936, vocab_size=151643),  # Qwen 2.5's
    STRIDED: Form(50257, teacher_stride=50304),
}
BF16, FP16, FP32 = "bfloat16", "float16", "float32"
DTYPES = {BF16: torch.bfloat16, FP16: torch.float16, FP32: torch.float32}
# float16 makes its gradient in the backward, always
OF_EVERY = {BF16: (TRAIN, ODD, EVEN, HARD_T), FP16: (BACKWARD,), FP32: (TRAIN,)}
OF_TWO = {
    BF16: (EVAL, BACKWARD, HARD, SHORT, MIXED, PADDED, STRIDED), FP16: (ODD,), FP32: (ODD, HARD_T),
}  # fmt: skip
TWO = ("soft_cross_entropy", "jensen_shannon")  # with a moment, two sweeps, and without one, three
MEASURED_ON = "sm_90"  # where every divergence has what is measured on a GPU
COMPARED_ON = ("sm_90", "sm_100")  # where the odd vocabulary is held against its even neighbour

BUCKET, RESTRICTED = "bucket", "restricted"  # the second sees the K alone
# options of the top-k launches, and the divergences and dtypes that they are compiled with
TOPK = {
    BUCKET: ({}, (*BUILT_IN,), (BF16,)),
    "bucket, odd vocabulary": ({"n_cols": 50257}, TWO, (BF16,)),
    "bucket, no gradient": ({"gradient": "none"}, ("skew_forward_kl",), (BF16,)),
    "bucket, gradient in backward": ({"gradient": "backward"}, ("forward_kl",), (BF16, FP16)),
    "bucket, K=1": ({"n_cols": 32000, "k": 1}, ("total_variation",), (FP32,)),
    "bucket, K=1024": ({"k": 1024}, ("jensen_shannon",), (BF16,)),
    "bucket, padded head": (
        {"n_cols": 151936, "vocab_size": 151643}, ("soft_cross_entropy",), (BF16,),
    ),
    "bucket, hard label": ({"hard_label_weight": 0.5}, ("forward_kl",), (BF16,)),
    "bucket, hard label at T=2": (
        {"hard_label_weight": 0.5, "temperature": 2.0}, ("skew_reverse_kl",), (BF16,),
    ),
    RESTRICTED: ({"tail": "ignore"}, ("reverse_kl",), (BF16,)),
    "restricted, hard label": (
        {"tail": "renormalize", "hard_label_weight": 0.5}, ("symmetric_kl",), (BF16,),
    ),
    "every column": ({"tail": "ignore"}, ("alpha_beta",), (BF16,)),
}  # fmt: skip
ENTROPY, LOG_PROB = "with entropy", "log-probability"
# options of the gather launches, and the dtypes that they are compiled with
GATHER = {
    "K=64": ({}, (BF16, FP16, FP32)),
    f"K=64, {ODD}": ({"n_cols": 50257}, (BF16, FP32)),
    "K=1": ({"k": 1}, (BF16,)),
    "K=1024, mask and padded head": (
        {"n_cols": 151936, "vocab_size": 151643, "k": 1024, "masked": True}, (BF16,),
    ),
}  # fmt: skip
BF16_BIAS = "bfloat16 bias and softcap"
# dtypes of the products, the logits and the bias, if any; whether there is a softcap
HEAD = {
    "bias and softcap": (FP32, FP32, FP32, True),
    BF16_BIAS: (FP32, FP32, BF16, True),
    "bias": (BF16, BF16, BF16, False),
    "softcap to bfloat16": (FP32, BF16, None, True),
    "bias to bfloat16": (FP32, BF16, BF16, False),
}
# forms of the launches over a part of each row, with the divergences of each
PARTS = {TRAIN: (BF16, *BUILT_IN), ODD: (BF16, *TWO), EVEN: (FP32, *TWO), HARD_T: (BF16, *TWO)}
SUMMED = [name for name, kind in BUILT_IN.items() if kind.moment in ("none", "symmetric")]
N_ROWS, SLOTS = 4096, 64
# what lies between them and the collectives, and the top-k loss's: their phases, by those of forms.py
COMBINED = [("combine", form, name) for form in (TRAIN, HARD_T) for name in TWO]
TOPK_PHASES = {
    "normalise": "normalise",
    "reduce": "reduce",
    "differentiate": "differentiate",
    "combine": "combined",
}
PAIR = ("pair", "pair_sums")


@dataclass(frozen=True)
class Entry:
    """One line of the matrix; its launches are its forward and, where made there, its backward."""

    kernel: str
    form: str
    dtype: str
    divergence: str | None = None


def built_in() -> dict[str, Divergence]:
    """The package's divergences with their default parameters, by name."""
    return {name: divergence() for name, divergence in BUILT_IN.items()}


def dense_entries(target: str) -> Iterator[Entry]:
    others = [name for name in BUILT_IN if name not in TWO and target == MEASURED_ON]
    measured = {BF16: (EVAL, BACKWARD)}
    for of_forms, names in ((OF_EVERY, BUILT_IN), (OF_TWO, TWO), (measured, others)):
        for dtype, found in of_forms.items():
            for form in found:
                if form != EVEN or target in COMPARED_ON:
                    yield from (Entry("dense", form, dtype, name) for name in names)


def entries(target: str) -> list[Entry]:
    """The whole matrix of a target."""
    found = list(dense_entries(target))
    for form, (_, names, dtypes) in TOPK.items():
        found += [Entry("topk", form, dtype, name) for dtype in dtypes for name in names]
    for form, (_, dtypes) in GATHER.items():
        found += [Entry("gather", form, dtype) for dtype in dtypes]
    found += [Entry("statistics", TRAIN, BF16, name) for name in BUILT_IN]
    found += [Entry("statistics", TRAIN, dtype, name) for dtype in (FP16, FP32) for name in TWO]
    for form, (dtype, *names) in PARTS.items():
        found += [Entry("normalise", form, dtype, name) for name in names]
        if form != HARD_T:  # which it does not see
            found += [Entry("reduce", form, dtype, name) for name in names if name in SUMMED]
    found += [Entry(kernel, form, BF16, name) for kernel, form, name in COMBINED]
    found += [Entry(f"topk_{phase}", BUCKET, BF16, name) for phase in TOPK_PHASES for name in TWO]
    found += [
        Entry(kernel, form, dtype)
        for kernel in PAIR
        for form, dtype in ((TRAIN, BF16), (ODD, FP32))
    ]
    for dtype, vocabularies in {BF16: ("", ODD), FP16: ("",), FP32: ("", ODD)}.items():
        for suffix in vocabularies:
            form = lambda name, suffix=suffix: f"{name}, {suffix}" if suffix else name
            found += [Entry("token", form(name), dtype) for name in (ENTROPY, LOG_PROB)]
            found.append(Entry("metrics", form("metrics"), dtype))
    found += [Entry("finish", form, dtypes[0]) for form, dtypes in HEAD.items()]
    found += [Entry("softcap_gradient", TRAIN, dtype) for dtype in (BF16, FP32)]
    found += [Entry("scale", TRAIN, dtype) for dtype in DTYPES]
    found += [Entry("weights", form, FP32) for form in WEIGHTS]
    found += [Entry("total", form, FP32) for form in TOTAL]
    return found


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _labels() -> torch.Tensor:
    return _meta(N_ROWS, dtype=torch.int64)


WEIGHTS = {
    "mask and labels": lambda: reduction.token_weights(_meta(N_ROWS).bool(), _labels(), -100),
    "labels": lambda: reduction.token_weights(None, _labels(), -100),
    "mask": lambda: reduction.token_weights(_meta(N_ROWS, dtype=torch.int32), None, -100),
}
TOTAL = {
    "weights and components": lambda: reduction.total(
        _meta(N_ROWS), _meta(2, N_ROWS), _meta(N_ROWS), _meta()
    ),
    "a number": lambda: reduction.total(_meta(N_ROWS), _meta(0), None, 17.0),
}


def _n_cols(form: str) -> int:
    return 50257 if form.endswith(ODD) else LARGE


def _metrics(entry: Entry) -> None:
    n_cols = _n_cols(entry.form)
    student, teacher = (_meta(N_ROWS, n_cols, dtype=DTYPES[entry.dtype]) for _ in range(2))
    sums = _meta(metrics.N_SUMS, N_ROWS)
    metrics.run(student, teacher, 2.0, n_cols, sums, _meta(N_ROWS, dtype=torch.uint8))


def _finish(entry: Entry) -> None:
    *dtypes, bias_dtype, has_softcap = HEAD[entry.form]
    product, logits = (_meta(N_ROWS, LARGE, dtype=DTYPES[dtype]) for dtype in dtypes)
    bias = None if bias_dtype is None else _meta(LARGE, dtype=DTYPES[bias_dtype])
    head_kernels.finish(product, logits, bias, 1.0, 30.0 if has_softcap else None)


def _softcap_gradient(entry: Entry) -> None:
    gradient, logits = (_meta(N_ROWS, LARGE, dtype=DTYPES[entry.dtype]) for _ in range(2))
    head_kernels.softcap_gradient_(gradient, logits, 30.0)


def _pair(entry: Entry) -> None:
    n_cols = 50257 if entry.form == ODD else LARGE
    models = [_meta(N_ROWS, n_cols, dtype=DTYPES[entry.dtype]) for _ in range(2)]
    if entry.kernel == "pair":
        pair.run(*models, _labels(), -100, n_cols, 2.0, _meta(pair.N_NUMBERS, N_ROWS))
    else:
        pair.run_sums(*models, n_cols, 2.0, _meta(pair.N_KEPT, N_ROWS), _meta(pair.N_SUMS, N_ROWS))


# the launchers that are called as the operators call them
CALLS: dict[str, Callable[[Entry], object]] = {
    "metrics": _metrics,
    "pair": _pair,
    "pair_sums": _pair,
    "finish": _finish,
    "softcap_gradient": _softcap_gradient,
    "scale": lambda entry: reduction.scale_(_meta(N_ROWS, LARGE, dtype=DTYPES[entry.dtype]), _meta()),
    "weights": lambda entry: WEIGHTS[entry.form](),
    "total": lambda entry: TOTAL[entry.form](),
}  # fmt: skip


def dense_form(name: str, dtype: str) -> Form:
    """A form of the dense kernel in a dtype; float16 never makes its gradient in the forward."""
    logits = DTYPES[dtype]
    found = replace(DENSE[name], student_dtype=logits)
    if name != MIXED:
        found = replace(found, teacher_dtype=logits)
    if dtype == FP16 and found.gradient == "forward":
        found = replace(found, gradient="backward")
    return found


def launches(entry: Entry, target: aot.Target) -> list[aot.Launch]:
    """What the entry's launcher launches on a target."""
    dtype = DTYPES[entry.dtype]
    divergence = entry.divergence and BUILT_IN[entry.divergence]()
    if entry.kernel == "dense":
        return dense_form(entry.form, entry.dtype).launches(divergence, target)
    if entry.kernel == "topk":
        options = {"n_cols": LARGE, "k": SLOTS, **TOPK[entry.form][0]}
        sizes = options.pop("n_cols"), options.pop("k")
        return forms.topk_launches(divergence, *sizes, dtype, target, **options)
    if entry.kernel == "gather":
        options = {"n_cols": LARGE, "k": SLOTS, **GATHER[entry.form][0]}
        sizes = options.pop("n_cols"), options.pop("k")
        return forms.gather_launches(*sizes, dtype, target, **options)
    if entry.kernel == "statistics":
        return forms.statistics_launches(divergence, LARGE, dtype, target)
    if entry.kernel in ("normalise", "reduce"):
        form = DENSE[entry.form]
        options = {"hard_label_weight": form.hard_label_weight, "temperature": form.temperature}
        return [forms.phase_launch(entry.kernel, divergence, form.n_cols, dtype, target, **options)]
    if entry.kernel == "combine":
        form = DENSE[entry.form]
        options = {"hard_label_weight": form.hard_label_weight, "temperature": form.temperature}
        return [forms.phase_launch("combine", divergence, form.n_cols, dtype, target, **options)]
    if entry.kernel.startswith("topk_"):
        phase = TOPK_PHASES[entry.kernel.removeprefix("topk_")]
        return [forms.topk_phase_launch(phase, divergence, LARGE, SLOTS, dtype, target)]
    if entry.kernel == "token":
        entropy = entry.form.startswith(ENTROPY)
        return forms.token_launches(_n_cols(entry.form), dtype, entropy, target)
    return aot.record(lambda: CALLS[entry.kernel](entry), target.facts)
