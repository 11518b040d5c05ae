"""Which answers are kept: the majority of samples, and the same answer whatever the input's order."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...scalars import number, shown
from .answers import normalize_answer

AGREED, TIE, LOW = "agreed", "tie", "low agreement"
UNPARSABLE, NO_ANSWERS, INCONSISTENT = "unparsable", "no answers", "inconsistent"

Undo = Callable[[str], str | None] | Mapping[str, str] | None


class Vote(NamedTuple):
    """What :func:`majority_vote` and :func:`perturbation_consistent` return.

    Example:
        >>> from distill_ops.methods.system2 import majority_vote
        >>> vote = majority_vote(["yes", "no", "Yes.", None])
        >>> vote.answer, vote.agreement, vote.reason, vote.counts
        ('Yes.', 0.5, 'agreed', {'yes': 2, 'no': 1})
    """

    answer: str | None  #: as most of those who agree wrote it; None where there is none
    agreement: float  #: the largest number of equal answers, over the number of all of them
    reason: str  #: "agreed", "tie", "low agreement", "unparsable", "no answers", "inconsistent"
    counts: dict[str, int]  #: of each normalized answer, the most frequent first


def majority_vote(
    answers: Iterable[str | None],
    *,
    normalize: Callable[[str], str | None] = normalize_answer,
    min_agreement: float = 0.5,
) -> Vote:
    """The answer that most samples of one input agree on, or none and the reason.

    ``agreement = max(counts) / len(answers)``: answers that could not be parsed count below the line.
    A list of answers goes in, None for an unparsable one; :class:`Vote` comes out, whatever their order.

    Example:
        >>> from distill_ops.methods.system2 import majority_vote
        >>> majority_vote(["ey", "ey", "EY", "ye"])[:3]
        ('ey', 0.75, 'agreed')
        >>> majority_vote(["heads", "tails"]).reason, majority_vote(["4", None, "5", None]).reason
        ('tie', 'tie')
        >>> majority_vote(["4", None, None, None]).reason
        'low agreement'

    Self-consistency (arXiv:2203.11171), as arXiv:2407.06023 curates with it: no answer, no record.

    Args:
        answers: strings, or None where nothing could be parsed.
        normalize: equal results are one answer; None or an empty one is unparsable.
        min_agreement: in [0, 1]; below it there is no answer. At 0 the most frequent one wins.

    Returns:
        :class:`Vote`. Among spellings of the answer the most frequent is returned, of equally
        frequent ones the first in the alphabet. Reasons for none, in this order: "no answers",
        "unparsable" (every one), "tie" (for the first place), "low agreement".

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    needed = checked_share("min_agreement", min_agreement)
    if isinstance(answers, str):
        raise TypeError(
            f"answers must be an iterable of strings or None, got a str {shown(answers)}"
        )
    spellings: dict[str, Counter[str]] = {}
    n_answers = 0
    for i, answer in enumerate(answers):
        n_answers += 1
        key = normalized(f"answers[{i}]", answer, normalize)
        if key:
            spellings.setdefault(key, Counter())[answer.strip()] += 1
    if not n_answers:
        return Vote(None, 0.0, NO_ANSWERS, {})
    if not spellings:
        return Vote(None, 0.0, UNPARSABLE, {})
    sizes = {key: found.total() for key, found in spellings.items()}
    counts = dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))
    (first, most), *others = counts.items()
    agreement = most / n_answers
    if others and others[0][1] == most:
        return Vote(None, agreement, TIE, counts)
    if agreement < needed:
        return Vote(None, agreement, LOW, counts)
    answer = min(spellings[first].items(), key=lambda item: (-item[1], item[0]))[0]
    return Vote(answer, agreement, AGREED, counts)


def perturbation_consistent(
    answers: Sequence[str | None],
    undo: Sequence[Undo],
    *,
    normalize: Callable[[str], str | None] = normalize_answer,
    min_agreement: float = 1.0,
) -> Vote:
    """The answer that is the same however the input was perturbed: options shuffled, candidates swapped.

    ``undo[i](answers[i])`` is what the i-th answer says of the input as it was; all must agree.
    Answers, one a version of the input, and how each is undone go in; :class:`Vote` comes out.

    Example:
        >>> from distill_ops.methods.system2 import perturbation_consistent
        >>> swap = {"A": "B", "B": "A"}
        >>> perturbation_consistent(["A", "B"], [None, swap])[:3]  # the same candidate, both times
        ('A', 1.0, 'agreed')
        >>> perturbation_consistent(["A", "A"], [None, swap]).reason  # always the first one
        'inconsistent'

    Args:
        answers: one of each version of the input; None where there is none.
        undo: of each version a function or a mapping of answers to those of the input as it was, or
            None for the identity. A function returns None, and a mapping lacks, what cannot be undone.
        normalize, min_agreement: as in :func:`majority_vote`; by default all versions must agree.

    Returns:
        :class:`Vote`, with "inconsistent" for "tie" and "low agreement", and "unparsable" where any
        version has no answer and all are needed.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    needed = checked_share("min_agreement", min_agreement)
    answers, undo = list(answers), list(undo)
    if len(answers) != len(undo):
        raise ValueError(
            f"undo must have one entry for each of the {len(answers)} answers, got {len(undo)}"
        )
    undone = [
        _undone(i, answer, back, normalize)
        for i, (answer, back) in enumerate(zip(answers, undo, strict=True))
    ]
    if needed == 1 and any(answer is None for answer in undone):
        return majority_vote(undone, normalize=normalize, min_agreement=1)._replace(
            answer=None, reason=UNPARSABLE
        )
    vote = majority_vote(undone, normalize=normalize, min_agreement=needed)
    return vote._replace(reason=INCONSISTENT) if vote.reason in (TIE, LOW) else vote


def _undone(i: int, answer: str | None, undo: Undo, normalize) -> str | None:
    key = normalized(f"answers[{i}]", answer, normalize)
    if not key or undo is None:
        return answer if key else None
    if isinstance(undo, Mapping):
        return {normalize(name): value for name, value in undo.items()}.get(key)
    if not callable(undo):
        raise TypeError(f"undo[{i}] must be a function, a mapping or None, got {shown(undo)}")
    back = undo(answer)
    return back if normalized(f"the result of undo[{i}]", back, normalize) else None


def normalized(name: str, answer: str | None, normalize) -> str | None:
    if answer is None:
        return None
    if not isinstance(answer, str):
        raise TypeError(f"{name} must be a str or None, got {shown(answer)}")
    key = normalize(answer)
    if key is not None and not isinstance(key, str):
        raise TypeError(f"normalize must return a str or None, got {shown(key)}")
    return key


def checked_share(name: str, value: float) -> float:
    value = number(name, value, "a number in [0, 1]")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def field_of(fields: Any, name: str, who: str) -> Any:
    if not isinstance(fields, Mapping) or name not in fields:
        has = f"the fields {sorted(fields)}" if isinstance(fields, Mapping) else shown(fields)
        raise ValueError(f"{who} needs inputs with a field {name!r}, got {has}")
    return fields[name]


@dataclass(frozen=True)
class ShuffledOptions:
    """A perturbation: the input's options in another order, the same for the same input and seed.

    Example:
        >>> from distill_ops.methods.system2 import ShuffledOptions
        >>> asked = {"question": "2 + 2?", "options": ["3", "4", "5"]}
        >>> other, undo = ShuffledOptions()(asked)
        >>> letter = "ABC"[other["options"].index("4")]  # what is right of the shuffled ones
        >>> undo[letter]
        'B'

    Args:
        field: of the input, a list of at least two options, which prompts show as (A), (B)...
        seed: any integer; pass several perturbations with different ones for several orders.
    """

    field: str = "options"
    seed: int = 0

    def __call__(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
        options = field_of(fields, self.field, "ShuffledOptions")
        if not isinstance(options, list | tuple) or not 2 <= len(options) <= 26:
            raise ValueError(
                f"ShuffledOptions needs a list of 2 to 26 options in {self.field!r}, got {shown(options)}"
            )
        order = list(range(len(options)))
        random.Random(f"{self.seed} {json.dumps(options)}").shuffle(order)
        if order == sorted(order):
            order = order[1:] + order[:1]
        undo = {chr(65 + new): chr(65 + old) for new, old in enumerate(order)}
        return {**fields, self.field: [options[i] for i in order]}, undo


@dataclass(frozen=True)
class Swapped:
    """A perturbation: two candidates change places, as a judge may prefer the first one whatever it says.

    Example:
        >>> from distill_ops.methods.system2 import Swapped
        >>> other, undo = Swapped()({"response_a": "yes", "response_b": "no"})
        >>> other, undo("A"), undo("tie")
        ({'response_a': 'no', 'response_b': 'yes'}, 'B', 'tie')

    Args:
        a, b: the fields that change places.
        answers: what an answer calls them. A name within more words ("(A)", "Response B") is exchanged there;
            an answer that has neither stays as it is, and one that has both cannot be undone.
    """

    a: str = "response_a"
    b: str = "response_b"
    answers: tuple[str, str] = ("A", "B")

    def __call__(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], Callable]:
        first, second = (field_of(fields, name, "Swapped") for name in (self.a, self.b))
        return {**fields, self.a: second, self.b: first}, self._undo

    def _undo(self, answer: str) -> str | None:
        others = dict([self.answers, self.answers[::-1]])
        for name, other in others.items():
            if normalize_answer(answer) == normalize_answer(name):
                return other
        names = "|".join(re.escape(name) for name in sorted(others, key=len, reverse=True))
        word = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
        if len(set(word.findall(answer))) > 1:
            return None
        return word.sub(lambda found: others[found[0]], answer)
