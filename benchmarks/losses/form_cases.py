"""The cases of ``benchmarks.forms``: a form of the loss, sizes of a named model, and the tensors."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from distill_ops import reference, teacher_topk

from . import minillm

HARD_LABEL = "cross_entropy"  # the hard label alone
LINEAR = ("linear", "linear_topk", "linear_support", "linear_tokens", "linear_statistics")
STATISTICS = ("statistics", "linear_statistics")
SUPPORT = ("support", "linear_support")  # the student's own K
NUMBERS = ("log_prob", "student_entropy", "teacher_entropy", "acceptance")  # of "outputs"


@dataclass(frozen=True)
class Tensors:
    """What a case's providers get; ``None``: not part of its form."""

    student: torch.Tensor | None = None  # [N, V] leaf
    teacher: torch.Tensor | None = None  # [N, V]
    hidden: torch.Tensor | None = None  # [N, d] leaf
    weight: torch.Tensor | None = None  # [V, d] leaf
    teacher_hidden: torch.Tensor | None = None
    teacher_weight: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None  # [N, K]
    ids: torch.Tensor | None = None  # [N, K]
    labels: torch.Tensor | None = None  # [N]
    rollout: minillm.Rollout | None = None

    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.student, self.hidden, self.weight) if x is not None]

    def double(self) -> "Tensors":
        """The same in float64."""
        wide = {}
        for name, x in vars(self).items():
            if isinstance(x, minillm.Rollout):
                wide[name] = x.double()
            elif x is not None and x.is_floating_point():
                wide[name] = x.detach().double().requires_grad_(x.requires_grad)
        return replace(self, **wide)


@dataclass(frozen=True)
class FormCase:
    form: str  # of LINEAR, or "topk", "support", "tokens", "statistics", "outputs", "minillm"
    loss: str
    tokens: int
    hidden: int | None  # of the student; the teacher's is the same
    vocab: int
    k: int | None
    dtype: str
    tail: str = "bucket"  # of a top-k teacher

    @property
    def name(self) -> str:
        loss = self.loss if self.tail == "bucket" else f"{self.loss} {self.tail}"
        sizes = [self.tokens, *([self.hidden] if self.hidden else []), self.vocab]
        slots = f" K={self.k}" if self.k else ""
        return f"{self.form} {loss} {'x'.join(map(str, sizes))}{slots} {self.dtype}"

    @property
    def n_products(self) -> int:
        """Matrix products of ours: student's and teacher's logits, two gradients; for tokens the
        student's logits twice."""
        if self.form not in LINEAR:
            return 0
        return 4 if self.form == "linear_tokens" or self.has_teacher_head else 3

    @property
    def has_teacher_head(self) -> bool:
        heads = ("linear", "linear_support", "linear_statistics")
        return self.form in heads and self.loss != HARD_LABEL

    def smaller(self) -> "FormCase":
        return replace(self, tokens=min(self.tokens, 64))

    def truth(self) -> Callable[[Tensors], torch.Tensor]:
        """The reference."""
        return minillm.truth if self.form == "minillm" else lambda t: eager_loss(self, t)


def _linear(loss: str, tokens: int, hidden: int, vocab: int, dtype: str) -> FormCase:
    return FormCase("linear", loss, tokens, hidden, vocab, None, dtype)


def _others(tokens: int, linear_tokens: int, hidden: int, vocab: int, dtype: str) -> list[FormCase]:
    """The forms beside the linear one; those from hidden states have tokens of their own."""
    return [
        FormCase("linear_topk", "forward_kl", linear_tokens, hidden, vocab, 64, dtype),
        FormCase(
            "linear_support", "reverse_kl", linear_tokens, hidden, vocab, 64, dtype, "restrict"
        ),
        FormCase("linear_tokens", "log_prob", linear_tokens, hidden, vocab, None, dtype),
        FormCase("linear_statistics", "reverse_kl", linear_tokens, hidden, vocab, None, dtype),
        FormCase("topk", "forward_kl", tokens, None, vocab, 64, dtype),
        FormCase("topk", "jensen_shannon", tokens, None, vocab, 64, dtype),
        FormCase("topk", "jensen_shannon", tokens, None, vocab, 64, dtype, "restrict"),
        FormCase("support", "reverse_kl", tokens, None, vocab, 64, dtype, "restrict"),
        FormCase("tokens", "log_prob", tokens, None, vocab, None, dtype),
        FormCase("statistics", "reverse_kl", tokens, None, vocab, None, dtype),
        FormCase("outputs", "forward_kl", tokens, None, vocab, None, dtype),
    ]


CASES_CPU = [
    *(
        _linear(loss, 512, 512, 32000, "float32")
        for loss in ("soft_cross_entropy", "forward_kl", "reverse_kl", "jensen_shannon", HARD_LABEL)
    ),
    _linear("forward_kl", 512, 512, 32000, "bfloat16"),
    *_others(1024, 512, 512, 32000, "float32"),
    FormCase("minillm", "reverse_kl", 512, None, 16384, None, "float32"),
]
# hidden size and vocabulary of Llama-3 8B and Qwen2.5 7B
CASES_GPU = [
    *(
        _linear(loss, 8192, 4096, 128256, "bfloat16")
        for loss in ("forward_kl", "reverse_kl", "jensen_shannon", HARD_LABEL)
    ),
    _linear("jensen_shannon", 8192, 3584, 152064, "bfloat16"),
    *_others(8192, 8192, 4096, 128256, "bfloat16"),
    FormCase("minillm", "reverse_kl", 4096, None, 128256, None, "bfloat16"),
]


def make_tensors(case: FormCase, device: torch.device, tokens: int) -> Tensors:
    """The teacher is the student plus noise, so that no divergence sits at its maximum."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return made.mul_(scale).to(dtype)

    labels = torch.randint(case.vocab, (tokens,), generator=generator, device=device)
    found: dict[str, torch.Tensor] = {"labels": labels}
    if case.form in LINEAR:
        hidden = normal(tokens, case.hidden)
        weight = normal(case.vocab, case.hidden, scale=2 * case.hidden**-0.5)
        if case.has_teacher_head:
            found["teacher_hidden"] = hidden + normal(tokens, case.hidden, scale=0.5)
            found["teacher_weight"] = weight.clone()
        found |= {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_()}
    else:
        student = normal(tokens, case.vocab, scale=2.0)
        if case.form == "support":
            apart(student, case.k)
        if case.form in ("statistics", "support", "outputs", "minillm"):
            found["teacher"] = student + normal(tokens, case.vocab)
        if case.form == "minillm":
            found["rollout"] = minillm.rollout_of(student, labels)
        found["student"] = student.requires_grad_()
    if case.k and case.form not in SUPPORT:
        top = teacher_topk(normal(tokens, case.vocab, scale=2.0).float(), case.k)
        found |= {"log_probs": top.log_probs, "ids": top.ids}
    return Tensors(**found)


def apart(student: torch.Tensor, k: int) -> None:
    """Make the k largest logits of each row differ from each other and the rest, in half precision too:
    of equal ones any may be chosen."""
    ids = student.topk(k).indices
    student.clamp_(max=5.9)
    student.scatter_(-1, ids, 6 + torch.arange(k).to(student).expand_as(ids) * (2 / k))


def eager_logits(case: FormCase, t: Tensors) -> torch.Tensor:
    """As float32, or float64 where they are."""
    logits = t.hidden @ t.weight.t() if case.form in LINEAR else t.student
    return logits if logits.dtype == torch.float64 else logits.float()


def support_loss(student: torch.Tensor, teacher: torch.Tensor, k: int) -> torch.Tensor:
    """Reverse KL over the student's K most likely tokens, both distributions restricted to them, as
    on-policy trainers write it."""
    ids = student.detach().topk(k).indices
    log_q, log_p = (F.log_softmax(x, dim=-1).gather(-1, ids) for x in (student, teacher))
    log_q, log_p = (x - x.logsumexp(-1, keepdim=True) for x in (log_q, log_p))
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def with_outputs(loss: torch.Tensor, outputs) -> torch.Tensor:
    """A loss and the means of its token outputs in one number, for the check."""
    return loss + sum(getattr(outputs, name).mean() for name in NUMBERS)


def eager_loss(case: FormCase, t: Tensors) -> torch.Tensor:
    """The case in eager PyTorch, mean over tokens: logits in full, autograd for the gradients."""
    if case.form == "minillm":
        return minillm.original(t)
    logits = eager_logits(case, t)
    if case.loss == HARD_LABEL:
        return F.cross_entropy(logits, t.labels)
    teacher = t.teacher
    if case.has_teacher_head:
        teacher = (t.teacher_hidden @ t.teacher_weight.t()).to(logits.dtype)
    if case.form in SUPPORT:
        return support_loss(logits, teacher.to(logits.dtype), case.k)
    if case.form == "linear":
        return reference.distillation_loss(logits, teacher, divergence=case.loss)
    if case.form == "outputs":
        found = reference.distillation_loss(
            logits, teacher, divergence=case.loss, token_ids=t.labels, token_outputs=NUMBERS
        )
        return with_outputs(*found)
    if case.k:
        return reference.topk_distillation_loss(
            logits, t.log_probs, t.ids, divergence=case.loss, tail=case.tail
        )
    if case.form in STATISTICS:
        found = reference.distillation_statistics(logits, teacher, t.labels, divergence=case.loss)
        return (found.divergence + found.student_log_prob + found.student_entropy).mean()
    log_probs, entropies = reference.token_log_probs(logits, t.labels, return_entropy=True)
    return (log_probs + entropies).mean()
