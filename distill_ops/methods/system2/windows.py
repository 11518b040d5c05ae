"""Some inputs at a time: their samples side by side through a method's steps, calls that fail, records."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from ...scalars import integer, number, shown
from .journal import described, digest, input_digest
from .prompts import Method
from .records import KEPT, Record, Summary
from .sampling import Call
from .votes import (
    AGREED,
    INCONSISTENT,
    Undo,
    Vote,
    checked_share,
    majority_vote,
    perturbation_consistent,
)

FAILED = "failed"
Input = str | Mapping[str, Any]
Perturbation = Callable[[dict[str, Any]], tuple[Mapping[str, Any], Undo]]


@dataclass(frozen=True)
class Options:
    """How inputs are sampled and voted on, checked; see ``curate``."""

    method: Method
    n: int
    perturbations: tuple[Perturbation, ...]
    normalize: Callable[[str], str | None]
    min_agreement: float
    batch_size: int
    retries: int
    retry_wait_s: float
    max_failures: int

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(f"method must be a Method, got {shown(self.method)}")
        functions = {f"perturbations[{i}]": x for i, x in enumerate(self.perturbations)}
        for name, function in {"normalize": self.normalize, **functions}.items():
            if not callable(function):
                raise TypeError(f"{name} must be a function, got {shown(function)}")
        for name, low in (("n", 1), ("batch_size", 1), ("retries", 0), ("max_failures", 1)):
            integer(name, getattr(self, name), low)
        checked_share("min_agreement", self.min_agreement)
        wait_s = number("retry_wait_s", self.retry_wait_s, "a number of seconds")
        if not 0 <= wait_s < float("inf"):
            raise ValueError(f"retry_wait_s must be finite and not negative, got {wait_s}")

    @property
    def width(self) -> int:
        """Inputs whose prompts fill a call."""
        return max(1, self.batch_size // (self.n * (1 + len(self.perturbations))))

    def digest(self, settings: Mapping[str, Any] | None) -> str:
        """Of all that a record depends on, but for its input and the model."""
        facts = self.method, self.n, self.perturbations, self.normalize, float(self.min_agreement)
        try:
            return digest(described((*facts, settings)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"settings must hold what JSON holds: {error}") from None


class Windows:
    """Makes records of windows of inputs; what it yields is to be answered (see ``sampling.py``)."""

    def __init__(self, options: Options, summary: Summary):
        self.options, self.summary = options, summary
        self.failures_in_a_row = 0  # inputs, and no call that succeeded since

    def records(self, window: list[tuple[int, Input]]) -> Generator[Call, Any, list[Record]]:
        """Records of some inputs, whose samples go through the method's steps side by side."""
        undo, programs, owners = [], [], []
        for index, value in window:
            versions = self._versions(index, value)
            undo.append([back for _, back in versions])
            for version, (fields, _) in enumerate(versions):
                programs += [self.options.method.program(fields) for _ in range(self.options.n)]
                owners += [(index, version)] * self.options.n
        answers: dict[tuple[int, int], list[str | None]] = {owner: [] for owner in owners}
        failed: dict[int, Exception] = {}
        running = [(*pair, None) for pair in zip(owners, programs, strict=True)]
        while running:
            asked = []
            for owner, program, texts in running:
                try:
                    prompts = program.send(texts)
                except StopIteration as end:
                    answers[owner].append(self._answer(owner[0], end.value))
                except Exception as error:
                    raise RuntimeError(
                        f"method {self.options.method.name!r} raised at input {owner[0]}: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                else:
                    self._check_asked(owner[0], prompts)
                    asked.append((owner, program, prompts))
            prompts = [(owner[0], text) for owner, _, texts in asked for text in texts]
            found = iter((yield from self._texts(prompts, failed)))
            running = [
                (owner, program, list(islice(found, len(texts)))) for owner, program, texts in asked
            ]
            running = [x for x in running if x[0][0] not in failed]
        return [
            self._record(index, value, [answers[index, i] for i in range(len(back))], back, failed)
            for (index, value), back in zip(window, undo, strict=True)
        ]

    def _check_asked(self, index: int, prompts: list[str]) -> None:
        fits = isinstance(prompts, list | tuple) and all(isinstance(x, str) for x in prompts)
        if not fits:
            raise TypeError(
                f"program of method {self.options.method.name!r} must yield a list of prompts, got "
                f"{shown(prompts)} at input {index}"
            )

    def _answer(self, index: int, answer: str | None) -> str | None:
        if answer is not None and not isinstance(answer, str):
            raise TypeError(
                f"parse of method {self.options.method.name!r} must return a str or None, got "
                f"{shown(answer)} at input {index}"
            )
        return answer

    def _versions(self, index: int, value: Input) -> list[tuple[Mapping[str, Any], Undo]]:
        if not isinstance(value, str):
            input_digest(index, value)  # refuses what the file could not hold
        fields = {"question": value} if isinstance(value, str) else dict(value)
        missing = sorted(self.options.method.fields - set(fields))
        if missing:
            raise ValueError(
                f"input {index} must have the fields {sorted(self.options.method.fields)} of method "
                f"{self.options.method.name!r}, got {sorted(fields)}"
            )
        versions: list[tuple[Mapping[str, Any], Undo]] = [(fields, None)]
        for i, perturbed in enumerate(self.options.perturbations):
            found = perturbed(dict(fields))
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Mapping)):
                raise TypeError(
                    f"perturbations[{i}] must return a mapping of fields and how an answer is undone, "
                    f"got {shown(found)}"
                )
            versions.append(found)
        return versions

    def _texts(self, prompts: list[tuple[int, str]], failed: dict[int, Exception]):
        """A text for each prompt, which comes with the index of its input; None for those that failed."""
        texts: list[str | None] = []
        for start in range(0, len(prompts), self.options.batch_size):
            chunk = prompts[start : start + self.options.batch_size]
            found = yield from self._call([text for _, text in chunk], self.options.retries)
            if not isinstance(found, Exception):
                texts += found
                continue
            groups = [list(group) for _, group in groupby(chunk, key=lambda pair: pair[0])]
            for group in groups:
                index, alone = group[0][0], found
                if len(groups) > 1 and index not in failed:
                    alone = yield from self._call([text for _, text in group], 0)
                if isinstance(alone, Exception):
                    self._fail(index, alone, failed)
                    alone = [None] * len(group)
                texts += alone
        return texts

    def _call(self, prompts: list[str], retries: int):
        for attempt in range(retries + 1):
            wait_s = self.options.retry_wait_s * 2 ** (attempt - 1) if attempt else 0.0
            found = yield Call(prompts, wait_s)
            if not isinstance(found, Exception):
                self.failures_in_a_row = 0
                self.summary.n_texts += len(prompts)
                break
        return found

    def _fail(self, index: int, error: Exception, failed: dict[int, Exception]) -> None:
        if index in failed:
            return
        failed[index] = error
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.options.max_failures:
            raise RuntimeError(
                f"sample_fn failed for {self.failures_in_a_row} inputs in a row (max_failures), the last "
                f"of them input {index}: {type(error).__name__}: {error}; none of them is written"
            ) from error

    def _record(self, index: int, value: Input, answers, undo, failed) -> Record:
        if index in failed:
            error = failed[index]
            return Record(
                index, value, None, 0.0, False, FAILED, f"{type(error).__name__}: {error}"
            )
        votes = [
            majority_vote(
                each, normalize=self.options.normalize, min_agreement=self.options.min_agreement
            )
            for each in answers
        ]
        vote, detail = votes[0], _shown_counts(votes)
        if vote.answer is not None and len(votes) > 1:
            found = perturbation_consistent(
                [each.answer for each in votes], undo, normalize=self.options.normalize
            )
            mean = sum(each.agreement for each in votes) / len(votes)
            vote = found._replace(agreement=mean if found.answer else found.agreement)
            if found.answer is None:
                vote = vote._replace(reason=INCONSISTENT)
        reason = KEPT if vote.reason == AGREED else vote.reason
        return Record(index, value, vote.answer, vote.agreement, reason == KEPT, reason, detail)


def _shown_counts(votes: list[Vote]) -> str:
    """The answers of each version, the most frequent first, five at most."""
    shown_of = [
        ", ".join(f"{count} x {key[:40]}" for key, count in list(vote.counts.items())[:5])
        for vote in votes
    ]
    return " | ".join(each or "none" for each in shown_of)
