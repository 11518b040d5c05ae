"""Some inputs at a time: their samples side by side through a method's steps, calls that fail, records."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from ...scalars import integer, number, shown
from .digests import described, digest, input_digest
from .prompts import Method
from .records import FAILED, KEPT, Record, Summary
from .sampling import Call, checked_texts
from .votes import (
    AGREED,
    INCONSISTENT,
    Undo,
    Vote,
    checked_share,
    majority_vote,
    perturbation_consistent,
)

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
        facts = {
            "method": self.method,
            "n": self.n,
            "perturbations": self.perturbations,
            "normalize": self.normalize,
            "min_agreement": float(self.min_agreement),
            "settings": settings,
        }
        found = []
        for name, fact in facts.items():
            try:
                found.append(described(fact))
            except TypeError as error:
                raise TypeError(
                    f"{name} must be what a resume of path= can compare, data or what pickle takes: {error}; "
                    f"give it a __getstate__, or no path"
                ) from error
        return digest(found)


@dataclass
class Failures:
    """Inputs of a window that failed, and how many did in a row just before it."""

    order: list[int]
    before: int
    errors: dict[int, Exception] = field(default_factory=dict)
    stop: RuntimeError | None = None  # after too many in a row,
    first: int = 0  # the first of which, in this window, is this

    def add(self, index: int, error: Exception, most: int) -> None:
        self.errors[index] = error
        start = end = self.order.index(index)
        while start and self.order[start - 1] in self.errors:
            start -= 1
        while end + 1 < len(self.order) and self.order[end + 1] in self.errors:
            end += 1
        n = end - start + 1 + (0 if start else self.before)
        if n >= most:
            self.first = self.order[start]
            self.stop = RuntimeError(
                f"sample_fn failed for {n} inputs in a row (max_failures), the last of them input {index}: "
                f"{type(error).__name__}: {error}; none of them is written"
            )
            self.stop.__cause__ = error

    def after(self) -> int:
        """How many failed in a row up to the window's end."""
        n = next((i for i, x in enumerate(reversed(self.order)) if x not in self.errors), None)
        return self.before + len(self.order) if n is None else n


@contextmanager
def _at_input(who: str, index: int, value: Input) -> Iterator[None]:
    """Errors of a user's function say where it was."""
    try:
        yield
    except Exception as error:
        kind = type(error) if type(error) in (TypeError, ValueError) else RuntimeError
        raise kind(
            f"{who} raised at input {index}, {shown(value)}: {type(error).__name__}: {error}"
        ) from error


class Windows:
    """Makes records of windows of inputs; what it yields is to be answered (see ``sampling.py``)."""

    def __init__(self, options: Options, summary: Summary):
        self.options, self.summary = options, summary
        self._failed_last = 0  # inputs in a row

    def records(
        self, window: list[tuple[int, Input]]
    ) -> Generator[Call, Any, tuple[list[Record], RuntimeError | None]]:
        """Records of some inputs, whose samples go through the method's steps side by side.

        After too many failures in a row, those of the first inputs that came to their end, and the error.
        """
        undo, running = [], []
        for index, value in window:
            versions = self._versions(index, value)
            undo.append([back for _, back in versions])
            for version, (fields, _) in enumerate(versions):
                running += [
                    _Sample(index, value, version, self.options.method.program(fields))
                    for _ in range(self.options.n)
                ]
        answers: dict[tuple[int, int], list[str | None]] = {}
        failures = Failures([index for index, _ in window], self._failed_last)
        while running:
            asked = [sample for sample in running if self._advanced(sample, answers)]
            if failures.stop:
                break
            prompts = [(sample.index, text) for sample in asked for text in sample.prompts]
            texts = iter((yield from self._texts(prompts, failures)))
            for sample in asked:
                sample.texts = list(islice(texts, len(sample.prompts)))
            running = [sample for sample in asked if sample.index not in failures.errors]
            if failures.stop:  # what came before may have come to its end
                running = [sample for sample in running if sample.index < failures.first]
        else:
            asked = []
        self._failed_last = failures.after()
        ends = [failures.first] if failures.stop else []
        ends += [sample.index for sample in asked]
        records = [
            self._record(index, value, answers, back, failures.errors.get(index))
            for (index, value), back in zip(window, undo, strict=True)
            if not ends or index < min(ends)
        ]
        return records, failures.stop

    def _advanced(
        self, sample: "_Sample", answers: dict[tuple[int, int], list[str | None]]
    ) -> bool:
        """Whether there is more to ask, else the answer is noted."""
        name, goes_on = self.options.method.name, True
        with _at_input(f"method {name!r}", sample.index, sample.value):
            try:
                found = sample.program.send(sample.texts)
            except StopIteration as end:
                found, goes_on = end.value, False
        if goes_on:
            wanted = "program of method {!r} must yield a list of prompts"
            fits = isinstance(found, list | tuple) and all(isinstance(x, str) for x in found)
        else:
            wanted = "parse of method {!r} must return a str or None"
            fits = found is None or isinstance(found, str)
        if not fits:
            raise TypeError(
                f"{wanted.format(name)}, got {shown(found)} at input {sample.index}, {shown(sample.value)}"
            )
        if goes_on:
            sample.prompts = found
        else:
            answers.setdefault((sample.index, sample.version), []).append(found)
        return goes_on

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
            with _at_input(f"perturbations[{i}]", index, value):
                found = perturbed(dict(fields))
            if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Mapping)):
                raise TypeError(
                    f"perturbations[{i}] must return a mapping of fields and how an answer is undone, "
                    f"got {shown(found)} at input {index}, {shown(value)}"
                )
            versions.append(found)
        return versions

    def _texts(self, prompts: list[tuple[int, str]], failures: Failures):
        """A text for each prompt, which comes with the index of its input; None for those that failed."""
        texts: list[str | None] = [None] * len(prompts)
        left = (i for i, (index, _) in enumerate(prompts) if index not in failures.errors)
        while chunk := list(islice(left, self.options.batch_size)):
            whole = yield from self._call([prompts[i][1] for i in chunk], self.options.retries)
            if not isinstance(whole, Exception):
                for i, text in zip(chunk, whole, strict=True):
                    texts[i] = text
                continue
            groups = [list(group) for _, group in groupby(chunk, key=lambda i: prompts[i][0])]
            for group in groups:
                found = whole
                if len(groups) > 1:
                    found = yield from self._call([prompts[i][1] for i in group], 0)
                if isinstance(found, Exception):
                    failures.add(prompts[group[0]][0], found, self.options.max_failures)
                    if failures.stop:
                        return texts
                    continue
                for i, text in zip(group, found, strict=True):
                    texts[i] = text
        return texts

    def _call(self, prompts: list[str], retries: int):
        """As many texts, or an exception."""
        for attempt in range(retries + 1):
            wait_s = self.options.retry_wait_s * 2 ** (attempt - 1) if attempt else 0.0
            found = yield Call(prompts, wait_s)
            if not isinstance(found, Exception):
                self.summary.n_texts += len(prompts)
                return checked_texts(found, len(prompts))
        return found

    def _record(self, index: int, value: Input, answers, undo, error: Exception | None) -> Record:
        if error is not None:
            detail = f"{type(error).__name__}: {error}"
            return Record(index, value, None, 0.0, False, FAILED, detail)
        normalize = self.options.normalize
        with _at_input("normalize", index, value):
            votes = [
                majority_vote(
                    answers[index, version],
                    normalize=normalize,
                    min_agreement=self.options.min_agreement,
                )
                for version in range(len(undo))
            ]
        vote, detail = votes[0], _shown_counts(votes)
        if vote.answer is not None and len(votes) > 1:
            with _at_input("undo of perturbations, or normalize,", index, value):
                found = perturbation_consistent(
                    [each.answer for each in votes], undo, normalize=normalize
                )
            mean = sum(each.agreement for each in votes) / len(votes)
            vote = found._replace(agreement=mean if found.answer else found.agreement)
            if found.answer is None:
                vote = vote._replace(reason=INCONSISTENT)
        reason = KEPT if vote.reason == AGREED else vote.reason
        return Record(index, value, vote.answer, vote.agreement, reason == KEPT, reason, detail)


@dataclass
class _Sample:
    """One sample of one version of an input, on its way through the method's steps."""

    index: int
    value: Input
    version: int
    program: Generator[list[str], list[str | None], str | None]
    prompts: list[str] | tuple[str, ...] = ()
    texts: list[str | None] | None = None


def _shown_counts(votes: list[Vote]) -> str:
    """The answers of each version, the most frequent first, five at most."""
    shown_of = [
        ", ".join(f"{count} x {key[:40]}" for key, count in list(vote.counts.items())[:5])
        for vote in votes
    ]
    return " | ".join(each or "none" for each in shown_of)
