"""All sequences of a small vocabulary: tabular policies, exact objectives, an estimator's expectation.

A policy is a table ``[n_contexts, vocab]`` of logits, float64, a row for each prefix, so nothing is
shared between tokens and every gradient is exact. An expectation over sampled sequences is a sum over
all of them. With ``end`` a sequence is over at its first such token; later tokens are masked, and their
probabilities sum to 1.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F

VOCAB, LENGTH = 3, 3


def sequences(vocab: int = VOCAB, length: int = LENGTH) -> torch.Tensor:
    """All of them, ``[vocab ** length, length]`` int64."""
    return torch.tensor(list(itertools.product(range(vocab), repeat=length)))


def random_table(
    seed: int, vocab: int = VOCAB, length: int = LENGTH, requires_grad: bool = False
) -> torch.Tensor:
    """A policy's logits, ``[1 + vocab + vocab ** 2 + ..., vocab]``, a row a prefix."""
    n_contexts = sum(vocab**t for t in range(length))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(n_contexts, vocab, generator=generator, dtype=torch.float64)
    return table.requires_grad_(requires_grad)


def contexts_of(ids: torch.Tensor, vocab: int = VOCAB) -> torch.Tensor:
    """The number of the prefix before each token, ``[n, length]``: a policy's row."""
    context, first, found = torch.zeros_like(ids[:, 0]), 0, []
    for t in range(ids.shape[1]):
        found.append(first + context)
        context, first = context * vocab + ids[:, t], first + vocab**t
    return torch.stack(found, 1)


def logits_of(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A policy's logits for every token of ids ``[n, length]``: ``[n, length, vocab]``."""
    return table[contexts_of(ids, table.shape[-1])]


def log_probs_of(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The policy's log-probability of every token, ``[n, length]``."""
    return F.log_softmax(logits_of(table, ids), -1).gather(-1, ids[..., None]).squeeze(-1)


def mixture_log_probs(
    student: torch.Tensor, teacher: torch.Tensor, share: float, ids: torch.Tensor
) -> torch.Tensor:
    """``log((1 - share) q + share p)`` of every token, ``[n, length]``."""
    q, p = (log_probs_of(table, ids).exp() for table in (student, teacher))
    return ((1 - share) * q + share * p).log()


def mask_of(ids: torch.Tensor, end: int | None = None) -> torch.Tensor:
    """The tokens up to the first ``end``, that one included; all without it. ``[n, length]`` bool."""
    ended = torch.zeros_like(ids) if end is None else (ids == end).long()
    return ended.cumsum(1) - ended == 0


def full_kl(student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``KL(q_t || p_t)`` over the vocabulary at every token, ``[n, length]``."""
    log_q, log_p = (F.log_softmax(logits_of(table, ids), -1) for table in (student, teacher))
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _all(table: torch.Tensor) -> torch.Tensor:
    vocab, length, n_contexts = table.shape[-1], 0, 0
    while n_contexts < len(table):
        n_contexts, length = n_contexts + vocab**length, length + 1
    return sequences(vocab, length)


def sequence_reverse_kl(
    student: torch.Tensor, teacher: torch.Tensor, end: int | None = None
) -> torch.Tensor:
    """``sum_y q(y) log(q(y) / p(y))``, differentiable in the student's table."""
    ids = _all(student)
    log_q, log_p = (log_probs_of(table, ids) for table in (student, teacher))
    return (log_q.sum(1).exp() * ((log_q - log_p) * mask_of(ids, end)).sum(1)).sum()


def per_token_reverse_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    end: int | None = None,
    behaviour: torch.Tensor | None = None,
) -> torch.Tensor:
    """``E_{y ~ sg(b)} sum_t KL(q_t || p_t)``: b the student, or a table of logits."""
    ids = _all(student)
    drawn = log_probs_of(student if behaviour is None else behaviour, ids).sum(1).exp().detach()
    return (drawn * (full_kl(student, teacher, ids) * mask_of(ids, end)).sum(1)).sum()


def exact_gradient(objective: Callable[[torch.Tensor], torch.Tensor], table: torch.Tensor):
    """Of ``objective(table)``, ``[n_contexts, vocab]``."""
    table = table.detach().requires_grad_()
    return torch.autograd.grad(objective(table), table)[0]


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def gradients(
    loss: Loss, table: torch.Tensor, behaviour_log_probs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``d loss(table, ids) / d table`` of all sequences, ``[n, n_contexts, vocab]``, and their probabilities.

    The loss is called once a sequence, as a trainer calls it with a sampled one, ids ``[1, length]``, and
    sees nothing of the others. Sequences are drawn by ``behaviour_log_probs`` ``[n, length]`` of all of them,
    in the order of :func:`sequences`; by the policy itself without it. Nothing flows through how they are
    drawn."""
    ids = _all(table)
    drawn_by = log_probs_of(table, ids) if behaviour_log_probs is None else behaviour_log_probs
    found = [exact_gradient(lambda of, one=one: loss(of, one), table) for one in ids.split(1)]
    return torch.stack(found), drawn_by.detach().sum(1).exp()


def expected_gradient(
    loss: Loss, table: torch.Tensor, behaviour_log_probs: torch.Tensor | None = None
) -> torch.Tensor:
    """The expectation of :func:`gradients`, ``[n_contexts, vocab]``."""
    found, drawn = gradients(loss, table, behaviour_log_probs)
    return (drawn[:, None, None] * found).sum(0)


def variance(
    loss: Loss, table: torch.Tensor, behaviour_log_probs: torch.Tensor | None = None
) -> float:
    """The expected squared distance of :func:`gradients` from their expectation."""
    found, drawn = gradients(loss, table, behaviour_log_probs)
    distances = found - (drawn[:, None, None] * found).sum(0)
    return (drawn * distances.square().sum((1, 2))).sum().item()
