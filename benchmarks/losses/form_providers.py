"""Who is measured by ``benchmarks.forms``: eager PyTorch, ours, peers; and the products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import distill_ops

from ..core.records import EAGER, OURS
from . import minillm
from .form_cases import (
    HARD_LABEL,
    LINEAR,
    NUMBERS,
    SUPPORT,
    FormCase,
    Tensors,
    eager_loss,
    with_outputs,
)
from .peers import Skipped, beta_of, imported

PRODUCTS = "products"
Loss = Callable[[Tensors], torch.Tensor]
EVERY = (*LINEAR, "topk", "support", "tokens", "statistics", "outputs", "minillm")


@dataclass(frozen=True)
class FormProvider:
    """``build`` gives a case's loss, or raises :class:`Skipped`."""

    name: str
    label: str
    build: Callable[[FormCase, torch.device], Loss]
    forms: tuple[str, ...] = EVERY
    truth: Loss | None = None  # where it is not the case's


def _ours(case: FormCase, t: Tensors) -> torch.Tensor:
    if case.form == "minillm":
        return minillm.ours(t)
    if case.loss == HARD_LABEL:
        return distill_ops.linear_distillation_loss(
            t.hidden, t.weight, None, None, labels=t.labels, hard_label_weight=1.0
        )
    if case.form == "linear":
        heads = (t.hidden, t.weight, t.teacher_hidden, t.teacher_weight)
        return distill_ops.linear_distillation_loss(*heads, divergence=case.loss)
    if case.form == "linear_statistics":
        heads = (t.hidden, t.weight, t.teacher_hidden, t.teacher_weight)
        loss, _ = distill_ops.linear_distillation_statistics(
            *heads, t.labels, divergence=case.loss, coefficients=(1 / len(t.labels),) * 3
        )
        return loss
    if case.form == "linear_topk":
        return distill_ops.linear_topk_distillation_loss(
            t.hidden, t.weight, t.log_probs, t.ids, divergence=case.loss, tail=case.tail
        )
    if case.form in SUPPORT:
        loss, given = distill_ops.support_distillation_loss, (t.student, t.teacher)
        if case.form == "linear_support":
            given = (t.hidden, t.weight, t.teacher_hidden, t.teacher_weight)
            loss = distill_ops.linear_support_distillation_loss
        return loss(*given, k=case.k, tail=case.tail, divergence=case.loss)
    if case.form == "topk":
        return distill_ops.topk_distillation_loss(
            t.student, t.log_probs, t.ids, divergence=case.loss, tail=case.tail
        )
    if case.form == "statistics":
        found = distill_ops.distillation_statistics(
            t.student, t.teacher, t.labels, divergence=case.loss
        )
        return (found.divergence + found.student_log_prob + found.student_entropy).mean()
    if case.form == "outputs":
        found = distill_ops.distillation_loss(
            t.student, t.teacher, divergence=case.loss, token_ids=t.labels, token_outputs=NUMBERS
        )
        return with_outputs(*found)
    if case.form == "linear_tokens":
        found = distill_ops.linear_token_log_probs(
            t.hidden, t.weight, t.labels, return_entropy=True
        )
    else:
        found = distill_ops.token_log_probs(t.student, t.labels, return_entropy=True)
    return sum(found).mean()


def outputs_apart(case: FormCase, device: torch.device) -> Loss:
    """Ours, the numbers of the tokens by calls of their own."""

    def loss(t: Tensors) -> torch.Tensor:
        found = distill_ops.distillation_loss(t.student, t.teacher, divergence=case.loss)
        student = t.student.detach()
        log_prob, entropy = distill_ops.token_log_probs(student, t.labels, return_entropy=True)
        metrics = distill_ops.distillation_metrics(student, t.teacher)
        outputs = distill_ops.TokenOutputs(
            log_prob, entropy, metrics.teacher_entropy, acceptance=metrics.expected_acceptance
        )
        return with_outputs(found, outputs)

    return loss


def torch_linear_cross_entropy(case: FormCase, device: torch.device) -> Loss:
    """PyTorch's own fused head and cross-entropy."""
    if case.loss != HARD_LABEL:
        raise Skipped("hard labels only")
    if not hasattr(F, "linear_cross_entropy"):
        raise Skipped("not in this version of PyTorch")
    return lambda t: F.linear_cross_entropy(t.hidden, t.weight, t.labels)


def liger_chunked(case: FormCase, device: torch.device) -> Loss:
    """Its chunked loss: plain PyTorch under torch.compile."""
    beta = beta_of(case)
    chunked = imported("liger_kernel.chunked_loss", "liger_kernel")
    function = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=1.0
    )

    def loss(t: Tensors) -> torch.Tensor:
        found = function(t.hidden, t.weight, t.teacher_hidden, t.teacher_weight, t.labels)
        return found[0] if isinstance(found, tuple) else found

    return loss


def liger_fused(case: FormCase, device: torch.device) -> Loss:
    """Its fused linear JSD, by Triton."""
    beta = beta_of(case)
    transformers = imported("liger_kernel.transformers", "liger_kernel")
    if device.type != "cuda":
        raise Skipped("its kernels need a GPU")
    function = transformers.LigerFusedLinearJSD(jsd_beta=beta)
    return lambda t: function(t.hidden, t.weight, t.teacher_hidden, t.teacher_weight)


def trl_chunked(case: FormCase, device: torch.device) -> Loss:
    """Its chunked divergence from hidden states: the function under its trainer."""
    beta = beta_of(case)
    function = imported("trl.kernels.chunked_divergence", "trl").ChunkedDivergenceFunction

    def loss(t: Tensors) -> torch.Tensor:
        heads = (t.hidden, t.weight, None, t.teacher_hidden, t.teacher_weight, None)
        return function.apply(*heads, beta)[0].mean()

    return loss


def trl_log_probs(case: FormCase, device: torch.device) -> Loss:
    """Its log-probabilities and entropies from hidden states, likewise."""
    function = imported("trl.kernels.chunked_logprob", "trl").ChunkedLogProbFunction
    tile = imported("trl.kernels.chunked_divergence", "trl").VOCAB_CHUNK_SIZE

    def loss(t: Tensors) -> torch.Tensor:
        head = (t.hidden, t.weight, None, t.labels)
        log_prob, entropy, *_ = function.apply(*head, 1.0, tile, None, 1.0, ("entropy",))
        return (log_prob + entropy).mean()

    return loss


def no_peer(reason: str) -> Callable[[FormCase, torch.device], Loss]:
    def build(case: FormCase, device: torch.device) -> Loss:
        raise Skipped(reason)

    return build


PROVIDERS = (
    FormProvider(EAGER, "eager", lambda case, _: partial(eager_loss, case)),
    FormProvider(OURS, "distill_ops", lambda case, _: partial(_ours, case)),
    FormProvider("apart", "distill_ops, apart", outputs_apart, ("outputs",)),
    FormProvider(
        minillm.STATISTICS, "its statistics alone", minillm.build(minillm.statistics), ("minillm",),
        minillm.statistics_truth,
    ),
    FormProvider(
        "first_update", "distill_ops, first update", minillm.build(minillm.first_update), ("minillm",),
        minillm.first_truth,
    ),
    FormProvider("torch", "F.linear_cross_entropy", torch_linear_cross_entropy, ("linear",)),
    FormProvider("liger_chunked", "liger chunked JSD", liger_chunked, ("linear",)),
    FormProvider("liger_fused", "liger fused linear JSD", liger_fused, ("linear",)),
    FormProvider("trl", "TRL chunked divergence", trl_chunked, ("linear",)),
    FormProvider("trl_log_probs", "TRL chunked log-probs", trl_log_probs, ("linear_tokens",)),
    FormProvider(
        "peers", "liger, TRL, torchtune",
        no_peer("none has a loss against a top-k teacher with a tail of its own"),
        ("topk", "linear_topk"),
    ),
    FormProvider(
        "trainers", "verl, TRL, miles",
        no_peer("they compute the student's support in eager PyTorch"), SUPPORT,
    ),
)  # fmt: skip


def products(case: FormCase, t: Tensors) -> Callable[[], object]:
    """The matrix products of a linear case alone: logits into a buffer that is reused, the gradients
    in fresh memory, as every step makes them."""
    with torch.no_grad():
        hidden, weight = t.hidden.detach(), t.weight.detach()
        logits = torch.empty(case.tokens, case.vocab, dtype=hidden.dtype, device=hidden.device)
    other = (t.teacher_hidden, t.teacher_weight) if case.has_teacher_head else (hidden, weight)
    gradient = torch.randn_like(logits)  # not zeros, at which a GPU clocks higher

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if case.n_products == 4:
            torch.mm(other[0], other[1].t(), out=logits)
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), hidden)

    return run
