"""System 2 methods as data: the prompts of each call, where they are from, and how the answer is read."""

import re
import string
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...scalars import integer, shown
from .answers import Choice, final_answer

Parser = Callable[[str], str | None]


def listed(text: str) -> list[str]:
    """The items of a list that a model wrote: its numbered or bulleted lines, else every line.

    ``1. x``, ``2) y``, ``- z`` and ``* w`` are items; what stands before the first one is not.
    A text goes in, the items without number and bullet come out, none where there are none.

    Example:
        >>> from distill_ops.methods.system2 import listed
        >>> listed("A plan:\\n1. Is it true?\\n2) **Is it short?**")
        ['Is it true?', 'Is it short?']
    """
    items = re.findall(r"^[ \t]*(?:\d+[.)]|[-*•])[ \t]+(.+)$", text, re.MULTILINE)
    lines = items or text.splitlines()
    return [line.strip(" \t*") for line in lines if line.strip(" \t*")]


@dataclass(frozen=True)
class Step:
    """One call of a method, or one for each item of an earlier step.

    Example:
        >>> from distill_ops.methods.system2 import Step, listed
        >>> branch = Step("aspects", "What should an answer to {question} be judged by?", split=listed)
        >>> solve = Step("judged", "Judge {answer} by {aspects} alone.", each="aspects", most=3)

    Args:
        name: what later prompts call its text.
        prompt: as ``str.format`` takes it: names between braces are fields of the input and earlier
            steps; a brace of the text is doubled.
        each: an earlier step that was split; the prompt is filled in once for each of its items, and
            later prompts get the texts as a numbered list.
        split: a function of the text to a list of strings, for a later step's ``each``.
        most: items beyond it are left out, so that the number of calls is bounded.
    """

    name: str
    prompt: str
    each: str | None = None
    split: Callable[[str], list[str]] | None = None
    most: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"name of a Step must be an identifier, got {shown(self.name)}")
        if not isinstance(self.prompt, str):
            raise TypeError(f"prompt of step {self.name!r} must be a str, got {shown(self.prompt)}")
        integer(f"most of step {self.name!r}", self.most, 1)
        if self.split is not None and not callable(self.split):
            raise TypeError(
                f"split of step {self.name!r} must be a function, got {shown(self.split)}"
            )
        object.__setattr__(self, "names", self._names())

    def _names(self) -> frozenset[str]:
        """Those between the prompt's braces, where ``str.format`` can fill them in."""
        try:
            parsed = list(string.Formatter().parse(self.prompt))
        except ValueError as error:
            raise ValueError(
                f"prompt of step {self.name!r} has an unmatched brace ({error}): double those of the text"
            ) from None
        fields = [(name, spec or how) for _, name, spec, how in parsed if name is not None]
        for name, formatted in fields:
            if formatted or not name.isidentifier():
                raise ValueError(
                    f"prompt of step {self.name!r} has {{{name}...}}, where a name alone may stand "
                    f"between braces: double those of the text"
                )
        return frozenset(name for name, _ in fields)


@dataclass(frozen=True)
class Method:
    """A System 2 method: calls in order, whose last text holds the answer.

    Example:
        >>> from distill_ops.methods.system2 import Method, Step, last_number
        >>> plan = Method(
        ...     "plan, then solve",
        ...     (Step("plan", "{question}\\nMake a plan."), Step("solved", "{question}\\n{plan}\\nSolve it.")),
        ...     parse=last_number,
        ... )
        >>> plan.calls
        2
        >>> program = plan.program({"question": "6 x 7?"})  # lists of prompts, for lists of texts
        >>> next(program), program.send(["Multiply."])
        (['6 x 7?\\nMake a plan.'], ['6 x 7?\\nMultiply.\\nSolve it.'])

    Args:
        name: of the method, for people.
        steps: :class:`Step` objects, in order.
        parse: a function of the last text to the answer, or None where it finds none.
        source: where the prompts are from.
    """

    name: str
    steps: tuple[Step, ...]
    parse: Parser = final_answer
    source: str = ""

    def __post_init__(self) -> None:
        steps = tuple(self.steps) if isinstance(self.steps, list | tuple) else (self.steps,)
        object.__setattr__(self, "steps", steps)
        if not steps or not all(isinstance(step, Step) for step in steps):
            raise TypeError(f"steps of {self.name!r} must be Step objects, got {shown(self.steps)}")
        if not callable(self.parse):
            raise TypeError(f"parse of {self.name!r} must be a function, got {shown(self.parse)}")
        earlier: dict[str, Step] = {}
        for step in steps:
            if step.name in earlier:
                raise ValueError(f"steps of {self.name!r} has two of the name {step.name!r}")
            later = step.names & {other.name for other in steps[len(earlier) :]}
            if later:
                raise ValueError(
                    f"prompt of step {step.name!r} names {min(later)!r}, which is not made before it"
                )
            if step.each is not None and getattr(earlier.get(step.each), "split", None) is None:
                raise ValueError(
                    f"each of step {step.name!r} must name an earlier step with split=, got {step.each!r}"
                )
            earlier[step.name] = step

    @property
    def calls(self) -> int:
        """The number of calls of one sample; at most that many where a step has ``each``."""
        return sum(1 if step.each is None else step.most for step in self.steps)

    @property
    def fields(self) -> frozenset[str]:
        """The fields that an input must have."""
        used = frozenset().union(*(step.names for step in self.steps))
        return used - {step.name for step in self.steps}

    def parsed_by(self, parse: Parser) -> "Method":
        """The same prompts, with the answers read by another parser."""
        return replace(self, parse=parse)

    def program(
        self, fields: Mapping[str, Any]
    ) -> Generator[list[str], list[str | None], str | None]:
        """One sample: yields the prompts of a step, takes their texts, returns the answer.

        A method whose calls depend on more than that overrides this generator.
        """
        known = {name: lettered(value) for name, value in fields.items()}
        text: str | None = None
        items: dict[str, list[str]] = {}
        for step in self.steps:
            if step.each is None:
                (text,) = yield [step.prompt.format_map(known)]
                if text is None:
                    return None
                if step.split is not None:
                    items[step.name] = step.split(text)
                    if not isinstance(items[step.name], list | tuple):
                        raise TypeError(
                            f"split of step {step.name!r} must return a list, got {shown(items[step.name])}"
                        )
            else:
                one_each = items[step.each][: step.most]
                if not one_each:
                    return None
                texts = yield [step.prompt.format_map({**known, step.each: x}) for x in one_each]
                if any(each is None for each in texts):
                    return None
                text = "\n\n".join(f"{i}. {each.strip()}" for i, each in enumerate(texts, 1))
            known[step.name] = text
        return self.parse(text)


def lettered(value: Any) -> Any:
    """A list of options as prompts show it."""
    if not isinstance(value, list | tuple):
        return value
    return "\n".join(f"({chr(65 + i)}) {option}" for i, option in enumerate(value))


REPHRASE_AND_RESPOND = Method(
    "rephrase and respond, one call",
    (Step("response", '"{question}"\nRephrase and expand the question, and respond.'),),
    source="arXiv:2311.04205",
)
REPHRASE_THEN_RESPOND = Method(
    "rephrase and respond, two calls",
    (
        Step(
            "rephrased",
            '"{question}"\nGiven the above question, rephrase and expand it to help you do better '
            "answering. Maintain all information in the original question.",
        ),
        Step(
            "response",
            "(original) {question}\n(rephrased) {rephrased}\nUse your answer for the rephrased "
            "question to answer the original question.",
        ),
    ),
    source="arXiv:2311.04205",
)
SYSTEM_2_ATTENTION = Method(
    "System 2 attention",
    (
        Step(
            "context",
            "Given the following text by a user, extract the part that is unbiased and not their "
            "opinion, so that using that text alone would be good context for providing an unbiased "
            "answer to the question portion of the text.\n\nPlease include the actual question or "
            "query that the user is asking. Separate this into two categories labeled with “Unbiased "
            "text context (includes all content except user’s bias):” and “Question/Query (does not "
            "include user bias/preference):”.\n\nText by User: {question}",
        ),
        Step("response", "{context}\n\nAnswer in an unbiased way."),
    ),
    source="arXiv:2311.11829",
)
CHAIN_OF_THOUGHT = Method(
    "chain of thought, zero-shot",
    (Step("response", "Q: {question}\nA: Let's think step by step."),),
    source="arXiv:2205.11916",
)
BRANCH_SOLVE_MERGE = Method(
    "branch, solve, merge: which of two responses is better",
    (
        Step(
            "aspects",
            "Two responses to the question below are to be compared. List up to five aspects that "
            "matter for this question, one a line, numbered, without comparing anything yet.\n\n"
            "Question: {question}",
            split=listed,
        ),
        Step(
            "judged",
            "Compare two responses to a question in one aspect alone: {aspects}\n\nQuestion: "
            "{question}\n\nResponse A: {response_a}\n\nResponse B: {response_b}\n\nGive reasons, "
            "then a score from 1 to 5 to each.",
            each="aspects",
        ),
        Step(
            "verdict",
            "Two responses to a question were compared in several aspects.\n\nQuestion: {question}"
            "\n\n{judged}\n\nWeigh them and end with one line: The answer is A, or: The answer is B.",
        ),
    ),
    parse=Choice("AB"),
    source="the program of arXiv:2310.15123; the wording is this package's",
)
