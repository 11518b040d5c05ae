"""Token outputs on the CPU: from what a chunk's closed form holds anyway, else from its logits.

A form shows its logarithms and probabilities where it has them (``Chunk.see_student`` and its likes),
before it writes over them. What it did not show, and rows in which that is not finite, are done again
from the logits by themselves: rows with infinite logits, the hard label alone, declared divergences.
"""

import math
from typing import NamedTuple

import numpy
import torch

from ..problem import Options
from .rows import LOWEST, Places, row_sums

NEG_INF = float("-inf")


class RowOutputs(NamedTuple):
    """The token outputs of a call."""

    targets: dict[str, torch.Tensor]  # [N] each, by the names of TokenOutputs
    ids: torch.Tensor | None  # [N, 1]: of log_prob, 0 of those that are ignored
    ignored: torch.Tensor | None  # [N]
    temperature: float

    @classmethod
    def of(cls, targets: dict[str, torch.Tensor], ids: torch.Tensor | None, options: Options):
        ignored = None
        if ids is not None:
            ignored = ids == options.ignore_index
            ids = ids.masked_fill(ignored, 0)[:, None]
        return cls(targets, ids, ignored, options.temperature)

    def finish(self) -> None:
        """After all rows."""
        if self.ignored is not None:
            self.targets["log_prob"].masked_fill_(self.ignored, 0.0)

    def at(self, places: Places) -> "ChunkOutputs":
        return ChunkOutputs(self, None if self.ids is None else self.ids[places], places)


class ChunkOutputs:
    """Those of some rows. A chunk is done in a quarter of a millisecond: each small operation counts."""

    def __init__(self, call: RowOutputs, ids: torch.Tensor | None, places: Places):
        self.call, self.ids, self.places = call, ids, places
        self.found: dict[
            str, torch.Tensor
        ] = {}  # [n] each; of neighbouring rows, parts of the targets

    def wants(self, *names: str) -> bool:
        return any(name in self.call.targets for name in names)

    def room(self, name: str) -> torch.Tensor:
        """``[n]`` to write an output to."""
        target = self.call.targets[name]
        if not isinstance(self.places, slice):
            target = target.new_empty(len(self.places))
        else:
            target = target[self.places]
        self.found[name] = target
        return target

    def add(self, name: str, values: torch.Tensor) -> None:
        if name in self.call.targets:
            self.room(name).copy_(values)

    def log_prob(self, log_q: torch.Tensor, shift) -> None:
        """Of log-probabilities less ``shift``, a number or ``[n, 1]``."""
        if self.wants("log_prob"):
            room = torch.gather(log_q, -1, self.ids, out=self.room("log_prob")[:, None])
            if torch.is_tensor(shift):
                room.add_(shift)

    def entropy(self, name: str, log, prob, shift, scratch: torch.Tensor) -> None:
        if self.wants(name):
            total = row_sums(torch.mul(log, prob, out=scratch))
            if torch.is_tensor(shift):
                total.add_(shift[:, 0])
            torch.neg(total, out=self.room(name))

    def argmax(self, name: str, logits: torch.Tensor) -> None:
        """The first of equals, which NumPy finds in a quarter of PyTorch's time. Of rows without a softmax
        it is any column."""
        if self.wants(name):
            room = self.room(name)
            if logits.is_cpu:
                numpy.argmax(logits.detach().numpy(), -1, out=room.numpy())
            else:
                torch.argmax(logits, -1, out=room)

    def checked_argmax(self, name: str, logits: torch.Tensor) -> None:
        """As :meth:`argmax`, and -1 of rows without a softmax."""
        if self.wants(name):
            self.argmax(name, logits)
            found = self.found[name]
            # NaN and +inf are found, and -inf alone is left, where there is none
            largest = logits.gather(-1, found[:, None])[:, 0]
            found.masked_fill_(~largest.isfinite(), -1)

    def both(self, q, p, student: torch.Tensor, scratch: torch.Tensor) -> None:
        """Of both probabilities and the student's logits."""
        if self.wants("acceptance"):
            self.add("acceptance", row_sums(torch.minimum(q, p, out=scratch)))
        if self.wants(
            "teacher_mass"
        ):  # of all columns 1; of those without -inf NaN, for the moment
            self.room("teacher_mass").fill_(1.0).sub_(student.amin(-1), alpha=0)

    def store(
        self, student: torch.Tensor, teacher: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """All that is asked for, of rows of logits ``[n, V]``."""
        targets = self.call.targets
        if targets.keys() <= self.found.keys():
            numbers = [x for x in self.found.values() if x.is_floating_point()]
            if not all(math.isfinite(x.sum()) for x in numbers):
                bad = ~torch.stack(numbers).isfinite().all(0)
                ids = None if self.ids is None else self.ids[bad]
                again = ChunkOutputs(self.call, ids, bad.nonzero()[:, 0])
                of_teacher = None if teacher is None else teacher[bad]
                again.from_logits(student[bad], of_teacher, dtype)
                for name, values in again.found.items():
                    self.found[name][bad] = values
        else:
            self.from_logits(student, teacher, dtype)
        if not isinstance(self.places, slice):
            for name, target in targets.items():
                target[self.places] = self.found[name]

    def from_logits(self, student, teacher, dtype) -> None:
        """By whole rows, whatever they hold."""
        log_q, fails_s = self._log_softmax(student, dtype)
        self.log_prob(log_q, 0.0)
        rows = {"student": (student, log_q, fails_s)}
        if teacher is not None:
            log_p, fails_t = self._log_softmax(teacher, dtype)
            rows["teacher"] = teacher, log_p, fails_t
            poison = torch.where(fails_s | fails_t, math.nan, 0.0).to(dtype)
            q, p = log_q.exp(), log_p.exp()
            self.add("acceptance", row_sums(torch.minimum(q, p)) + poison)
            self.add("teacher_mass", row_sums(p.masked_fill_(student == NEG_INF, 0.0)) + poison)
        for side, (logits, log, fails) in rows.items():
            self.entropy(
                f"{side}_entropy", log.clamp(min=LOWEST), log.exp(), 0.0, log.new_empty(log.shape)
            )
            self.add(f"{side}_argmax", logits.argmax(-1).masked_fill(fails, -1))

    def _log_softmax(self, logits, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n, V]`` and which rows have none, being NaN."""
        logits = logits.to(dtype)
        maximum = logits.amax(-1, keepdim=True)  # goes first: the division could overflow
        return torch.log_softmax(
            (logits - maximum) / self.call.temperature, -1
        ), ~maximum.isfinite()[:, 0]
