"""Token outputs on the CPU: from what a chunk's closed form holds anyway, else from its logits.

A form shows its logarithms and probabilities where it has them (``Chunk.see_student`` and its likes),
before it writes over them. What it did not show, and rows in which that is not finite, are done again
from the logits by themselves: rows with infinite logits, the hard label alone, declared divergences.
"""

import math
from typing import NamedTuple

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
    """Those of some rows: ``found`` by name, ``[n]`` each."""

    def __init__(self, call: RowOutputs, ids: torch.Tensor | None, places: Places):
        self.call, self.ids, self.places = call, ids, places
        self.found: dict[str, torch.Tensor] = {}

    def wants(self, *names: str) -> bool:
        return any(name in self.call.targets for name in names)

    def add(self, name: str, values: torch.Tensor) -> None:
        if name in self.call.targets:
            self.found[name] = values

    def log_prob(self, log_q: torch.Tensor, shift) -> None:
        """Of log-probabilities less ``shift``, a number or ``[n, 1]``."""
        if self.wants("log_prob"):
            found = log_q.gather(-1, self.ids)
            self.found["log_prob"] = (found + shift if torch.is_tensor(shift) else found)[:, 0]

    def entropy(self, name: str, log, prob, shift, scratch: torch.Tensor) -> None:
        if self.wants(name):
            total = row_sums(torch.mul(log, prob, out=scratch))
            self.found[name] = (total + shift[:, 0] if torch.is_tensor(shift) else total).neg_()

    def argmax(self, name: str, logits: torch.Tensor) -> None:
        """The first of equals, which NumPy finds in a quarter of PyTorch's time."""
        if self.wants(name):
            if logits.is_cpu:
                found = torch.from_numpy(logits.detach().numpy().argmax(-1))
            else:
                found = logits.argmax(-1)
            # NaN and +inf are found, and -inf alone is left, where there is no softmax
            largest = logits.gather(-1, found[:, None])[:, 0]
            self.found[name] = found.masked_fill(~largest.isfinite(), -1)

    def both(self, q, p, student: torch.Tensor, scratch: torch.Tensor) -> None:
        """Of both probabilities and the student's logits."""
        if self.wants("acceptance"):
            self.found["acceptance"] = row_sums(torch.minimum(q, p, out=scratch))
        if self.wants("teacher_mass"):  # NaN: of part of the columns
            whole = student.amin(-1) > NEG_INF
            self.found["teacher_mass"] = torch.where(whole, 1.0, math.nan).to(scratch.dtype)

    def store(
        self, student: torch.Tensor, teacher: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """All that is asked for, of rows of logits ``[n, V]``."""
        targets = self.call.targets
        if not targets.keys() <= self.found.keys():
            self.found = self.from_logits(student, teacher, dtype)
        else:
            numbers = [x for x in self.found.values() if x.is_floating_point()]
            if numbers and not math.isfinite(sum(numbers).sum()):
                bad = ~torch.stack(numbers).isfinite().all(0)
                ids = None if self.ids is None else self.ids[bad]
                again = ChunkOutputs(self.call, ids, self.places)
                of_teacher = None if teacher is None else teacher[bad]
                for name, values in again.from_logits(student[bad], of_teacher, dtype).items():
                    self.found[name] = self.found[name].clone()
                    self.found[name][bad] = values
        for name, target in targets.items():
            target[self.places] = self.found[name].to(target.dtype)

    def from_logits(self, student, teacher, dtype) -> dict[str, torch.Tensor]:
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
        return self.found

    def _log_softmax(self, logits, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """``[n, V]`` and which rows have none, being NaN."""
        logits = logits.to(dtype)
        maximum = logits.amax(-1, keepdim=True)  # goes first: the division could overflow
        return torch.log_softmax(
            (logits - maximum) / self.call.temperature, -1
        ), ~maximum.isfinite()[:, 0]
