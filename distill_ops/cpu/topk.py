"""The top-k loss on the CPU: chunks of rows that stay in cache, as ``kernels/topk.py`` has them.

Of a chunk, one buffer holds the exponentials of the columns outside the K, from which the gradient is
a multiplication; the K and the rest are a matrix of K + 1 outcomes. Where every column outside is an
outcome (EACH in the kernel), its terms are those of ``Divergence.on_columns`` with p = 0.
"""

import math

import torch

from ..arguments import Tail
from ..divergences.base import Divergence
from .chunk import NEG_INF, Terms
from .outputs import ChunkOutputs, RowOutputs
from .rows import GENERAL_ELEMENTS, LOWEST, PerRow, kept_groups, row_sums, rows_in_chunk

TOPK_ELEMENTS = 1 << 20  # of a chunk: some work is done once a chunk or row, whatever its columns
MOST_COLUMNS = 2**31 - 1
LEAST_REST = 2.0**-24  # of the teacher's tail


def finite_or_zero(maximum: torch.Tensor) -> torch.Tensor:
    return maximum.masked_fill(maximum == NEG_INF, 0.0)


def teacher_of(
    log_probs: torch.Tensor, ids: torch.Tensor, tail: str, n_cols: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the K slots and the rest, ``[n, K + 1]``; and whether a row's make a
    distribution, ``[n, 1]``. In float64: of a confident teacher's rest, and of a student who is near
    the teacher, float32's rounding of the sum would be all that is left."""
    used = ids >= 0
    log_p = log_probs.double().masked_fill(~used, NEG_INF)
    total = log_p.exp().sum(-1, keepdim=True)
    # an id below -1 is nobody's slot: on a GPU, where ids are not looked at, it shows in the result
    good = (total < math.inf) & (ids >= -1).all(-1, keepdim=True)
    rest = torch.full_like(log_p[:, :1], NEG_INF)
    if tail == "bucket":
        rest = (1 - total).clamp(min=LEAST_REST).log()
        rest.masked_fill_(used.sum(-1, keepdim=True) == n_cols, NEG_INF)
    elif tail in ("renormalize", "restrict"):
        total = torch.logsumexp(log_p, -1, keepdim=True)
        good &= total > NEG_INF
        log_p = log_p - total
    return torch.cat([log_p, rest], -1), good


def _columns(ids: torch.Tensor) -> torch.Tensor:
    """The slots' columns; an unused slot has a used one's, or column 0 where there is none."""
    return torch.where(ids >= 0, ids, ids.amax(-1, keepdim=True)).clamp_(min=0)


def copy_outside(student: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The student's logits in the working dtype, -inf in the columns of the K."""
    out.copy_(student)
    first_column = out[:, :1].clone()
    out.scatter_(-1, _columns(ids), NEG_INF)
    out[:, :1] = torch.where((ids < 0).all(-1, keepdim=True), first_column, out[:, :1])
    return out


def exponentials(
    x: torch.Tensor, maximum: torch.Tensor, temperature: float, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """``exp((x - maximum) / temperature)``, over x; the exponents are ``kept``."""
    x.sub_(maximum)
    if temperature != 1:
        x.div_(temperature)
    if kept is not None:
        kept.copy_(x)
    return x.exp_()


def _mass_factor(divergence: type[Divergence], parameters: list) -> float | torch.Tensor:
    """Of ``q - p`` in the generalised KL that a divergence is."""
    if divergence.moment == "symmetric":
        return 1 - 2 * parameters[0]
    return 1.0 if divergence.moment == "forward" else -1.0


class TopKChunk:
    """The losses of some rows, and then their gradient: it may overwrite the student's logits."""

    counted = None  # how many of the outcomes are summed, from the first; None: all

    def __init__(
        self, terms: Terms, tail: Tail, student: torch.Tensor, log_probs: torch.Tensor,
        ids: torch.Tensor, per_row: PerRow, buffers: list[torch.Tensor], outputs: ChunkOutputs | None,
    ):  # fmt: skip
        self.terms, self.student, self.ids, self.per_row = terms, student, ids, per_row
        self.tail, self.buffers, self.outputs, self.moment = tail, buffers, outputs, None
        divergence, spread = terms.divergence, tail.name in ("renormalize", "ignore")
        self.restrict = divergence.infinite_at_teacher_zero and tail.log_prob_floor is None
        self.rest = tail.name in ("bucket", "drop") or (spread and not self.restrict)
        self.each = self.rest and spread and not divergence.additive_at_teacher_zero
        self.own_hard = terms.hard and (terms.temperature != 1 or not self.rest)
        logits = student.gather(-1, ids.clamp(min=0)).to(terms.dtype)
        self.logits = logits.masked_fill_(ids < 0, NEG_INF)
        self.log_probs = log_probs
        self.log_p, self.good = self._read_teacher()

    def _read_teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        return teacher_of(self.log_probs, self.ids, self.tail.name, self.student.shape[-1])

    def losses(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Divergence and cross-entropy of each row."""
        self._sum_outside()
        loss = self._divergence()
        hard_loss = self._cross_entropy() if self.terms.hard else None
        if self.outputs is not None:
            self._tell()
        return loss, hard_loss

    def _sum_outside(self) -> None:
        """Maximum and sums of exponentials of the columns outside, which the buffers then hold."""
        temperature, rest = self.terms.temperature, self.logits.new_zeros(len(self.logits), 1)
        self.rest_max = self.rest_sum = self.hard_sum = rest
        if self.rest or self.terms.hard:
            outside = copy_outside(self.student, self.ids, self.buffers[0])
            self.rest_max = outside.amax(-1, keepdim=True)
            shift = finite_or_zero(self.rest_max)
            if self.own_hard:
                hard = self.buffers[1].copy_(outside) if self.rest else outside
            if self.rest:
                kept = self.buffers[2] if self._looks() else None
                self.rest_sum = row_sums(exponentials(outside, shift, temperature, kept))[:, None]
                self.hard_sum = self.rest_sum
                if kept is not None:
                    self.moment = row_sums(kept.clamp_(min=LOWEST).mul_(outside))[:, None]
            if self.own_hard:
                self.hard_sum = row_sums(exponentials(hard, shift, 1.0))[:, None]
                self.hard = hard

    def _looks(self) -> bool:
        """Whether an output is of the student's normaliser."""
        return self.outputs is not None and self.outputs.wants("log_prob", "student_entropy")

    def _tell(self) -> None:
        """Store the token outputs: the student's are of its whole row, the teacher's of the K."""
        outputs = self.outputs
        log_p = self.log_probs.to(self.terms.dtype).masked_fill(self.ids < 0, NEG_INF)
        outputs.add("teacher_mass", log_p.double().exp().sum(-1).to(self.terms.dtype))
        if outputs.wants("teacher_argmax"):
            top = log_p.amax(-1, keepdim=True)
            ids = self.ids.masked_fill((log_p != top) | (self.ids < 0), MOST_COLUMNS).amin(-1)
            unknown = ~top.isfinite()[:, 0] | (ids == MOST_COLUMNS)
            outputs.add("teacher_argmax", ids.masked_fill(unknown, -1))
        if outputs.wants("student_argmax"):
            wide = self.student.dtype in (torch.float32, torch.float64)
            outputs.checked_argmax(
                "student_argmax", self.student if wide else self.buffers[2].copy_(self.student)
            )
        if self._looks() and self.moment is not None:
            rest_max, distance = self.rest_max, self.logits.clone()
            maximum = torch.maximum(distance.amax(-1, keepdim=True), rest_max)
            temperature = self.terms.temperature
            distance.sub_(maximum).div_(temperature)
            shift = ((rest_max - maximum) / temperature).clamp(min=LOWEST)
            factor = torch.where(self.rest_sum > 0, shift.exp(), 1.0)
            exponentials = distance.exp()
            total = row_sums(exponentials)[:, None] + self.rest_sum * factor
            moment = row_sums(exponentials.mul_(distance.clamp_(min=LOWEST)))[:, None]
            moment += factor * (self.moment + self.rest_sum * shift)
            outputs.add("student_entropy", (total.log() - moment / total).squeeze(-1))
            if outputs.wants("log_prob"):
                logit = self.student.gather(-1, outputs.ids)
                log_q = (logit.to(total.dtype) - maximum) / temperature - total.log()
                outputs.add("log_prob", log_q.squeeze(-1))
        outputs.store(self.student, None, self.terms.dtype)

    def _divergence(self) -> torch.Tensor:
        """In float64, for the K and the rest are few: of a peaked row the gradient is a small difference
        of their terms."""
        temperature, log_p = self.terms.temperature, self.log_p
        x = self.logits.double()
        if self.restrict:
            x = x.masked_fill(log_p[:, :-1] == NEG_INF, NEG_INF)
        has_rest = (self.rest_sum != 0) if self.rest else torch.zeros_like(self.good)
        rest_max = self.rest_max.double().masked_fill(~has_rest, NEG_INF)
        maximum = self._maximum(x, rest_max)
        self.maximum = maximum
        shift = finite_or_zero(maximum)
        # the maximum goes first: the division could overflow
        lowest = torch.finfo(x.dtype).min
        y = torch.cat([x, rest_max], -1)
        zero = y == NEG_INF
        y = ((y - shift) / temperature).clamp_(min=lowest)
        y[:, -1:] += self.rest_sum.double().masked_fill(~has_rest, 1.0).log()
        y.masked_fill_(zero, NEG_INF)
        log_q = self._log_q(y)
        self.q = log_q.exp()
        if self.each:  # the columns outside come one by one
            zero[:, -1] = True
            self.log_sum = self._log_sum(x, rest_max, shift)
        value, slope = self._terms(log_q, log_p, zero)
        if self.tail.name == "drop":
            value[:, -1], slope[:, -1] = 0, 0
        good = self.good & maximum.isfinite() & (self.rest_sum >= 0)
        self.poison = torch.where(good, 0.0, math.nan).to(self.terms.dtype)
        loss = row_sums(value[:, : self.counted])
        self.total_slope = row_sums(slope[:, : self.counted])[:, None]
        self.slope = slope
        if self.each:
            value, slope = self._terms_outside()
            loss = loss + row_sums(value)
            self.total_slope = self.total_slope + row_sums(slope)[:, None]
        return loss.to(self.terms.dtype) + self.poison[:, 0]

    def _maximum(self, x: torch.Tensor, rest_max: torch.Tensor) -> torch.Tensor:
        """Of the student's logits that its normaliser sums."""
        return torch.maximum(x.amax(-1, keepdim=True), rest_max)

    def _log_q(self, y: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(y, -1)

    def _log_sum(
        self, x: torch.Tensor, rest_max: torch.Tensor, shift: torch.Tensor
    ) -> torch.Tensor:
        """The normaliser's logarithm, relative to the maximum."""
        temperature = self.terms.temperature
        of_rest = ((rest_max - shift) / temperature).exp() * self.rest_sum
        return (row_sums(((x - shift) / temperature).exp())[:, None] + of_rest).log()

    def _terms(self, log_q, log_p, student_zero) -> tuple[torch.Tensor, torch.Tensor]:
        """Value and slope by the rules for infinities (semantics.md, section 3)."""
        divergence, floor = self.terms.divergence, self.tail.log_prob_floor
        teacher_zero = log_p == NEG_INF
        dead = student_zero & teacher_zero
        if self.restrict:
            dead = dead | teacher_zero
        if divergence.infinite_at_student_zero and floor is None:
            dead = dead | student_zero
        lowest = torch.finfo(log_q.dtype).min if floor is None else floor
        logs = [log.clamp(min=lowest) for log in (log_q, log_p)]
        value, slope = divergence.on_columns(*logs, self.per_row.parameters)
        if self.tail.mass_terms:
            q, p = (log.exp() for log in logs)
            factor = _mass_factor(divergence, self.per_row.parameters)
            value, slope = value + factor * (q - p), slope + factor * q
        if floor is not None:
            slope = slope.masked_fill(log_q < floor, 0.0)
        return value.masked_fill(dead, 0.0), slope.masked_fill(dead, 0.0)

    def _terms_outside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every column outside the K, p being 0; the first buffer then holds their q."""
        x = copy_outside(self.student, self.ids, self.buffers[0])
        zero = x == NEG_INF
        x.sub_(finite_or_zero(self.maximum).to(x.dtype)).div_(self.terms.temperature)
        log_q = x.sub_(self.log_sum.to(x.dtype))
        value, slope = self._terms(log_q, torch.full_like(log_q, NEG_INF), zero)
        self.outside_slope = slope
        self.outside_q = log_q.masked_fill_(zero, NEG_INF).exp_()
        return value, slope

    def _cross_entropy(self) -> torch.Tensor:
        labels = self.per_row.labels[:, None]
        has_rest = self.hard_sum != 0
        rest_max = self.rest_max.masked_fill(~has_rest, NEG_INF)
        maximum = finite_or_zero(torch.maximum(self.logits.amax(-1, keepdim=True), rest_max))
        self.hard_q = (self.logits - maximum).exp_()
        # from what is relative to the rest's maximum
        self.hard_factor = (rest_max - maximum).exp_()
        total = row_sums(self.hard_q)[:, None] + self.hard_sum * self.hard_factor
        self.hard_q /= total
        self.hard_factor = self.hard_factor / total * self.per_row.hard_scale
        logit = self.student.gather(-1, labels).to(total.dtype)
        return ((maximum - logit) + total.log()).squeeze(-1)

    def write(self, gradient: torch.Tensor) -> None:
        """Fill ``gradient [n, V]``, after :meth:`losses`."""
        scale, hard_scale = self.per_row.scale, self.per_row.hard_scale
        slots = (self.slope - self.q * self.total_slope) * scale
        slots = slots.to(self.terms.dtype) + self.poison
        out = gradient if gradient.dtype == self.terms.dtype else self.buffers[0]
        if self.each:
            total_slope = self.total_slope.to(self.terms.dtype)
            terms = self.outside_slope.addcmul_(self.outside_q, total_slope, value=-1)
            terms.mul_(scale)
            if self.terms.hard and not self.own_hard:
                terms.add_(self.outside_q.mul_(hard_scale))
            torch.add(terms, self.poison, out=out)
        elif self.rest:
            share = slots[:, -1:] / self.rest_sum
            factor = share.masked_fill_(self.rest_sum == 0, 0.0) + self.poison
            if self.terms.hard and not self.own_hard:
                factor += self.hard_factor
            torch.mul(self.buffers[0], factor, out=out)
        elif self.own_hard:
            torch.mul(self.hard, self.hard_factor + self.poison, out=out)
        else:
            out.copy_(self.poison.expand_as(out))
        if self.own_hard and self.rest:
            out.addcmul_(self.hard, self.hard_factor)
        slots = slots[:, :-1]
        if self.terms.hard:
            labels = self.per_row.labels[:, None]
            one_hot = (self.ids == labels).to(out.dtype)
            slots = slots + (self.hard_q - one_hot) * hard_scale
            # where the label is one of the K, that comes over it
            self._add_to_label(out, torch.zeros_like(self.poison) - hard_scale)
        self._scatter(slots, out)
        if out is not gradient:
            gradient.copy_(out)

    def _add_to_label(self, out: torch.Tensor, terms: torch.Tensor) -> None:
        out.scatter_add_(-1, self.per_row.labels[:, None], terms)

    def _scatter(self, slots: torch.Tensor, out: torch.Tensor) -> None:
        """Write what the used slots hold to their columns."""
        last, at = self.ids.max(-1, keepdim=True)
        # an unused slot writes the same as a used one; without any, what is there
        other = torch.where(last < 0, out[:, :1], slots.gather(-1, at))
        columns, values = _columns(self.ids), torch.where(self.ids < 0, other, slots)
        out.scatter_(-1, columns, values)


def topk(
    terms: Terms,
    tail: Tail,
    student: torch.Tensor,  # [..., V]
    log_probs: torch.Tensor,  # [N, K], or of the teacher's rows
    ids: torch.Tensor,  # likewise
    per_row: PerRow,
    weights: torch.Tensor | None,  # [N]; None: every row counts
    n_cols: int,
    gradient: torch.Tensor | None,  # like student, or the student itself: overwritten
    outputs: RowOutputs | None = None,
    teacher_rows: torch.Tensor | None = None,  # [N]: the slots' row of each; None: in order
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Per-row divergence and cross-entropy ``[N]``, unweighted; fills ``gradient`` and the ``outputs`` of
    rows that count."""
    n_rows = student.numel() // student.shape[-1]
    kind = {"dtype": terms.dtype, "device": student.device}
    each = tail.name in ("renormalize", "ignore") and not terms.divergence.additive_at_teacher_zero
    elements = GENERAL_ELEMENTS if each else TOPK_ELEMENTS
    size = rows_in_chunk(n_rows, n_cols, terms.dtype.itemsize, torch.get_num_threads(), elements)
    several = 2 if outputs is None else 3
    buffers = [torch.empty(size, n_cols, **kind) for _ in range(several)]
    losses = torch.zeros(n_rows, **kind)
    hard_losses = torch.zeros(n_rows, **kind) if terms.hard else None
    keep = None if weights is None else weights != 0
    copies = gradient is not student
    groups = kept_groups(keep, student, gradient=gradient, size=size, copies=copies)
    for (block, gradient_block), group, places in groups:
        logits = block[group, :n_cols]
        slots = places if teacher_rows is None else teacher_rows[places]
        n = len(logits)
        chunk = TopKChunk(
            terms, tail, logits, log_probs[slots], ids[slots].long(), per_row.at(places),
            [b[:n] for b in buffers], None if outputs is None else outputs.at(places),
        )  # fmt: skip
        losses[places], hard = chunk.losses()
        if terms.hard:
            hard_losses[places] = hard
        if gradient is None:
            continue
        if isinstance(group, slice):
            chunk.write(gradient_block[group, :n_cols])
        else:
            part = gradient_block.new_empty(n, n_cols)
            chunk.write(part)
            gradient_block[group, :n_cols] = part
    if gradient is not None and n_cols < gradient.shape[-1]:
        gradient[..., n_cols:] = 0
    return losses, hard_losses
