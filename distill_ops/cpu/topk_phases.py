"""The phases of the top-k loss of rows whose columns ranks split (``vocab_parallel/topk.py``), on the CPU.

A chunk is one of ``topk.py`` whose slots are those with a column here; what its normaliser and its rest
are of the whole row comes from the other phases.
"""

import math

import torch

from ..divergences.base import column_parameters
from ..problem import Options, working_dtype
from ..row_statistics import in_two
from ..rows import Tokens
from .chunk import NEG_INF, Terms
from .phases import Rows
from .rows import GENERAL_ELEMENTS, PerRow, row_sums
from .topk import TOPK_ELEMENTS, TopKChunk, copy_outside, exponentials, finite_or_zero, teacher_of

KEPT = 10  # numbers of a whole row
combined = None
NUMBERS, OF_HARD_LABEL = 6, 4  # of a row's SlotStatistics


class PartChunk(TopKChunk):
    """This rank's columns of some rows."""

    def __init__(
        self, terms: Terms, options: Options, student, log_probs, ids, offset, per_row: PerRow, buffers
    ):  # fmt: skip
        self.all_ids = ids
        here = ids - offset
        here = torch.where((ids >= 0) & (here >= 0) & (here < student.shape[-1]), here, -1)
        super().__init__(
            terms, options.tail_options, student, log_probs, here, per_row, buffers, None
        )

    def _read_teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the slots that are here; whether the K cover the vocabulary, all ranks know together."""
        log_p, good = teacher_of(self.log_probs, self.all_ids, self.tail.name, -1)
        log_p[:, :-1].masked_fill_(self.ids < 0, NEG_INF)
        return log_p, good

    def statistics(self) -> list[torch.Tensor]:
        """SlotStatistics, each ``[n]``, with the number of used slots in the place of ``outside``."""
        self._sum_outside()
        slots = self.logits.double()
        if self.restrict:
            slots = slots.masked_fill(self.log_p[:, :-1] == NEG_INF, NEG_INF)
        slots_max, used = slots.amax(-1, keepdim=True), self.all_ids >= 0
        slots = slots - finite_or_zero(slots_max)
        slots_sum = row_sums((slots / self.terms.temperature).exp_())
        slots_more = torch.where(slots_max[:, 0] == NEG_INF, 0.0, slots_sum - 1)
        no_rest = self.rest_sum == 0
        found = [
            self.rest_max.masked_fill(no_rest, NEG_INF)[:, 0], self.rest_sum[:, 0], slots_max[:, 0],
            slots_more, (self.ids >= 0).sum(-1), used.sum(-1),
        ]  # fmt: skip
        if self.terms.hard:
            found += self._of_label()
        return found

    def _of_label(self) -> list[torch.Tensor]:
        labels, elsewhere = self._labels()
        maximum = torch.maximum(self.logits.amax(-1, keepdim=True), self.rest_max)
        shift = finite_or_zero(maximum)
        total = row_sums((self.logits - shift).exp_())[:, None]
        total = total + self.hard_sum * (self.rest_max - shift).exp_()
        logit = self.student.gather(-1, labels).masked_fill(elsewhere, NEG_INF)
        return [x[:, 0] for x in (maximum, total, logit, ~elsewhere)]

    def _labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of the labels, any for one that is elsewhere, and which are; each ``[n, 1]``."""
        labels = self.per_row.labels[:, None]
        elsewhere = (labels < 0) | (labels >= self.student.shape[-1])
        return labels.masked_fill(elsewhere, 0), elsewhere

    def see_whole(self, row: torch.Tensor) -> None:
        """Take what ``vocab_parallel/topk.py`` keeps of the whole rows, ``[n, KEPT]``."""
        slots_max, slots_more, rest_max, rest_sum = row.double()[:, :4].split(1, -1)
        self.rest_max, self.rest_sum = row[:, 2:3], row[:, 3:4]
        self.largest = torch.maximum(slots_max, rest_max)
        shift, temperature = finite_or_zero(self.largest), self.terms.temperature
        total = (1 + slots_more) * ((slots_max - shift) / temperature).exp()
        total = total + rest_sum * ((rest_max - shift) / temperature).exp()
        self.log_total = total.log()

    def _maximum(self, x: torch.Tensor, rest_max: torch.Tensor) -> torch.Tensor:
        return self.largest

    def _log_q(self, y: torch.Tensor) -> torch.Tensor:
        return y - self.log_total

    def _log_sum(self, x, rest_max, shift) -> torch.Tensor:
        return self.log_total

    def sums(self, row: torch.Tensor, with_rest: bool) -> list[torch.Tensor]:
        """Of value and slope, each ``[n]``; the rest's among them, if it is to be."""
        self.see_whole(row)
        self.log_p[:, -1:].masked_fill_(row[:, 7:8] == 0, NEG_INF)
        self.counted = None if with_rest else -1
        loss = self._divergence()
        return [loss, *in_two((self.total_slope + self.poison)[:, 0], row.dtype)]

    def differentiate(self, row: torch.Tensor, gradient: torch.Tensor) -> None:
        """Fill ``gradient [n, n_cols]``."""
        self.see_whole(row)
        self._divergence()
        self.total_slope = row[:, 4:5].double() + row[:, 9:10]
        self.poison = torch.where(row[:, 4:5].isnan(), math.nan, 0.0).to(row.dtype)
        if self.own_hard or (self.rest and not self.each):
            outside = self.buffers[1] if self.each else self.buffers[0]
            copy_outside(self.student, self.ids, outside)
            if self.own_hard:
                alone = self.each or not self.rest
                self.hard = outside if alone else self.buffers[1].copy_(outside)
                exponentials(self.hard, finite_or_zero(row[:, 5:6]), 1.0)
            if self.rest and not self.each:
                exponentials(outside, finite_or_zero(self.rest_max), self.terms.temperature)
        if self.terms.hard:
            maximum, total = finite_or_zero(row[:, 5:6]), row[:, 6:7]
            self.hard_q = (self.logits - maximum).exp_() / total
            of_rest = 1.0 if self.own_hard else (self.rest_max - maximum).exp()
            self.hard_factor = of_rest / total * self.per_row.hard_scale
        self.write(gradient)

    def _add_to_label(self, out: torch.Tensor, terms: torch.Tensor) -> None:
        labels, elsewhere = self._labels()
        out.scatter_add_(-1, labels, terms.masked_fill(elsewhere, 0.0))


class _Chunks:
    """The chunks of the rows that count."""

    def __init__(self, options: Options, tokens: Tokens, student, teacher, n_cols: int, out=None):
        self.options, self.tokens, self.teacher = options, tokens, teacher
        self.dtype, kind = working_dtype(student, teacher.log_probs), options.kind()
        self.terms = Terms(kind, options.hard, options.temperature, False, self.dtype)
        spread = options.tail in ("renormalize", "ignore") and not kind.additive_at_teacher_zero
        elements = GENERAL_ELEMENTS if spread else TOPK_ELEMENTS
        self.rows = Rows(options, tokens, student, None, n_cols, out, elements, self.dtype)
        self.parameters = column_parameters(tokens.parameters, self.dtype)

    def each(self, keep: torch.Tensor | None, scale: float | torch.Tensor = 1.0):
        """Places in the call, the chunk and its gradient; ``scale [n, 1]`` is of the row's gradient."""
        options, tokens, (log_probs, ids, offset) = self.options, self.tokens, self.teacher
        of_divergence = options.soft_weight * options.divergence_scale / options.temperature
        whole = PerRow(
            tokens.labels, scale * of_divergence, scale * options.hard_label_weight, self.parameters
        )
        for places, student, _, gradient, buffers in self.rows.chunks(keep):
            slots = places if tokens.teacher_rows is None else tokens.teacher_rows[places]
            chunk = PartChunk(
                self.terms, options, student, log_probs[slots], ids[slots].long(), offset,
                whole.at(places), buffers,
            )  # fmt: skip
            yield places, chunk, gradient


def normalise(options: Options, tokens: Tokens, student, teacher, n_cols: int) -> torch.Tensor:
    chunks = _Chunks(options, tokens, student, teacher, n_cols)
    n_numbers = NUMBERS + (OF_HARD_LABEL if options.hard else 0)
    parts = student.new_zeros((n_numbers, chunks.rows.n_rows), dtype=chunks.dtype)
    for at in (0, 2, *((6, 8) if options.hard else ())):
        parts[at] = NEG_INF
    for places, chunk, _ in chunks.each(None if tokens.weights is None else tokens.weights != 0):
        parts[:, places] = torch.stack([x.to(parts.dtype) for x in chunk.statistics()])
    return parts


def reduce(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, with_rest: bool
) -> torch.Tensor:
    chunks = _Chunks(options, tokens, student, teacher, n_cols)
    sums = kept.new_zeros((3, len(kept)))
    for places, chunk, _ in chunks.each(kept[:, 8] != 0):
        found = chunk.sums(kept[places], with_rest)
        sums[:, places] = torch.stack([x.to(sums.dtype) for x in found])
    return sums


def differentiate(
    options: Options, tokens: Tokens, student, teacher, n_cols: int, kept, upstream, out
) -> None:
    chunks = _Chunks(options, tokens, student, teacher, n_cols, out)
    scale = kept[:, 8] * upstream.reshape(-1)
    scale = torch.where(kept[:, 8] == 0, 0.0, scale)[:, None]
    for places, chunk, gradient in chunks.each(kept[:, 8] != 0, scale):
        chunk.differentiate(kept[places], gradient)
