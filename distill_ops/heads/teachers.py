"""What rows of a student's logits under work are compared with: the teacher's logits, as its head makes
them or as they were given, or its K log-probabilities."""

import torch

from .. import problem
from ..kernels.layout import single_stride
from ..rows import Tokens, TopKTeacher, within_teacher
from .engine import Engine
from .projection import Projection, Selection, logits_bytes
from .select import by_teacher_row

Logits = torch.Tensor | TopKTeacher


class Given:
    """A teacher that is in memory already, all of its rows; they are not copied.

    Args:
        whole: logits ``[..., V]`` or slots ``[R, K]``.
    """

    row_bytes, kept_bytes = 0, None

    def __init__(self, whole: Logits):
        self.whole = whole

    @classmethod
    def logits(
        cls, logits: torch.Tensor, tokens: Tokens, index: torch.Tensor | None
    ) -> tuple["Given", Tokens]:
        """Logits, and the tokens with the rows among them that are theirs: ``index`` are those of the
        selected tokens."""
        if tokens.teacher_rows is None:
            if index is None:
                leading, strides = logits.shape[:-1], logits.stride()[:-1]
                if single_stride(leading, strides) is not None:
                    return cls(logits.view(leading.numel(), logits.shape[-1])), tokens
                # as of ``logits[:, :-1]``, whose rows are counted instead
                index = torch.arange(leading.numel(), device=logits.device)
            tokens = tokens._replace(teacher_rows=index)
        return cls(logits), tokens

    @classmethod
    def slots(
        cls, log_probs: torch.Tensor, ids: torch.Tensor, tokens: Tokens, index: torch.Tensor | None
    ) -> "Given":
        slots = TopKTeacher.of_tokens(log_probs, ids)
        if tokens.teacher_rows is None and index is not None:
            slots = slots.rows(index)
        return cls(slots)

    def prepare(self, engine: Engine, n_under_work: int) -> None:
        pass

    def rows(self, rows: slice, tokens: Tokens) -> tuple[Logits, Tokens]:
        """The teacher of rows under work, whose tokens are given: its own rows, or all of them with the
        tokens' indices."""
        if tokens.teacher_rows is not None:
            return self.whole, tokens
        whole = self.whole
        return whole.rows(rows) if isinstance(whole, TopKTeacher) else whole[rows], tokens


class Formed:
    """The logits that the teacher's head makes, one row for each row under work."""

    kept_bytes: int | None = None  # of all its rows, where they may be kept instead

    def __init__(self, projection: Projection, dtype: torch.dtype):
        self.projection, self.dtype = projection, dtype
        self.row_bytes = logits_bytes(projection, dtype)

    def prepare(self, engine: Engine, n_under_work: int) -> None:
        self.buffer = engine.buffer(n_under_work, self.dtype)

    def form(self, rows: slice, out: torch.Tensor) -> None:
        self.projection.logits(self.projection.hidden(rows), out)

    def rows(self, rows: slice, tokens: Tokens) -> tuple[torch.Tensor, Tokens]:
        logits = self.buffer[: rows.stop - rows.start]
        self.form(rows, logits)
        return logits, tokens._replace(teacher_rows=None)


class FormedInOrder(Formed):
    """Of tokens in the order of their teacher's rows: each row's logits are formed once, and stay until
    the tokens are past it. The values of the index decide, for which a GPU would wait.

    Args:
        projection: of the distinct rows, in order.
        places: ``[n]``, of each token's row among these.
    """

    def __init__(self, projection: Projection, dtype: torch.dtype, places: torch.Tensor):
        super().__init__(projection, dtype)
        self.places, self.start, self.end = places, 0, 0

    def rows(self, rows: slice, tokens: Tokens) -> tuple[torch.Tensor, Tokens]:
        first, last = self.places[rows.start].item(), self.places[rows.stop - 1].item()
        if last >= self.end:
            self._advance(first)
        if last - first + 1 == rows.stop - rows.start:  # each its own
            places, logits = None, self.buffer[first - self.start : last + 1 - self.start]
        else:
            places, logits = self.places[rows] - self.start, self.buffer[: self.end - self.start]
        return logits, tokens._replace(teacher_rows=places)

    def _advance(self, first: int) -> None:
        """Hold as many rows from ``first`` on as there is room for; there is for the rows under work."""
        kept, by = max(self.end - first, 0), first - self.start
        # what is held already moves up, in parts that do not overlap
        for i in range(0, kept, by or 1):
            n = min(by, kept - i)
            self.buffer[i : i + n] = self.buffer[i + by : i + by + n]
        self.start = first
        self.end = min(first + len(self.buffer), self.projection.selection.n_rows)
        self.form(slice(first + kept, self.end), self.buffer[kept : self.end - first])


class FormedByIndex(Formed):
    """Where no value decides: all of the teacher's rows once, kept, where there are no more of them than
    tokens and they take at most half of the budget; else a row for each token."""

    def __init__(self, projection: Projection, dtype: torch.dtype, index: torch.Tensor):
        super().__init__(projection, dtype)
        self.index, self.n_rows = index, len(projection.head.hidden)
        if self.n_rows <= len(index):
            self.kept_bytes = self.n_rows * self.row_bytes

    def prepare(self, engine: Engine, n_under_work: int) -> None:
        self.keeps = engine.keeps
        if self.keeps:
            self.projection.selection = Selection(self.n_rows, None, None)
            super().prepare(engine, self.n_rows)
            self.form(slice(0, self.n_rows), self.buffer)
        else:
            self.projection.selection = Selection(len(self.index), self.index, None)
            super().prepare(engine, n_under_work)

    def rows(self, rows: slice, tokens: Tokens) -> tuple[torch.Tensor, Tokens]:
        return (self.buffer, tokens) if self.keeps else super().rows(rows, tokens)


def in_order(
    inputs: problem.LinearInputs, options: problem.Options, tokens: Tokens, selection: Selection
) -> tuple[Tokens, Selection]:
    """The selected tokens in the order in which they are computed."""
    head = options.soft and inputs.teacher_hidden is not None
    if head and tokens.teacher_rows is not None and options.backend == "torch":
        return by_teacher_row(tokens, selection)
    return tokens, selection


def teacher_of(
    inputs: problem.LinearInputs,
    options: problem.LinearOptions,
    tokens: Tokens,
    selection: Selection,
    shared: tuple,  # the last arguments of Projection.of
    dtype: torch.dtype,  # of logits that are formed
) -> tuple[Given | Formed | None, Tokens]:
    """The teacher of a call, and the selected tokens as it wants them."""
    loss, teacher_rows = options.loss, tokens.teacher_rows
    if loss.tail is not None and options.support is None:
        slots = inputs.teacher_log_probs, inputs.teacher_ids
        return Given.slots(*slots, tokens, selection.index), tokens
    if not loss.soft:
        return None, tokens
    if inputs.teacher_logits is not None:
        return Given.logits(inputs.teacher_logits, tokens, selection.index)

    def head(rows: Selection) -> Projection:
        return Projection.of(*inputs.teacher, options.teacher, rows, *shared)

    if teacher_rows is None:
        # the loss does not read the logits of tokens of weight 0: they may be NaN
        return Formed(head(selection._replace(unread=None)), dtype), tokens
    if loss.backend == "torch":
        distinct, places = torch.unique_consecutive(teacher_rows, return_inverse=True)
        return FormedInOrder(head(Selection(len(distinct), distinct, None)), dtype, places), tokens
    projection = head(selection._replace(unread=None))
    index, weights = within_teacher(
        teacher_rows, len(projection.head.hidden), tokens.weights, torch.float32
    )
    tokens = tokens._replace(teacher_rows=index, weights=weights)
    return FormedByIndex(projection, dtype, index), tokens
