"""A record as texts: its prompt, and the messages of a chat."""

from collections.abc import Callable, Mapping
from typing import Any

from ...scalars import shown
from .prompts import Step, lettered

Prompt = str | Callable[[Any], str]


def part_of(record: Any, name: str, default: Any = None) -> Any:
    """A field of a record, or of a row of its JSONL."""
    if isinstance(record, Mapping):
        return record.get(name, default)
    return getattr(record, name, default)


def prompt_of(record: Any, prompt: Prompt = "{question}") -> str:
    """The text that is asked at once: what the student gets, without the method's prompts."""
    value = part_of(record, "input")
    if callable(prompt):
        text = prompt(value)
        if not isinstance(text, str):
            raise TypeError(f"prompt must return a str, got {shown(text)}")
        return text
    if isinstance(value, str):
        value = {"question": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"records must have an input, a str or a mapping, got {shown(record)}")
    missing = sorted(Step("prompt", prompt).names - set(value))
    if missing:
        raise ValueError(
            f"prompt needs the field {missing[0]!r} of each input, got {sorted(value)}"
        )
    return prompt.format_map({name: lettered(x) for name, x in value.items()})


def to_messages(
    record: Any, *, prompt: Prompt = "{question}", system: str | None = None
) -> list[dict[str, str]]:
    """A record as a chat: what is asked, and the answer at once, for chat templates and their trainers.

    ``[system,] user: prompt, assistant: target``: none of the method's own prompts and reasoning is in it.
    A kept :class:`Record`, or its row of a JSONL, goes in; a list of role and content comes out.

    Example:
        >>> from distill_ops.methods.system2 import Record, to_messages
        >>> record = Record(0, "Last letters of Joe Day?", "ey", 1.0, True, "kept", "")
        >>> to_messages(record)
        [{'role': 'user', 'content': 'Last letters of Joe Day?'}, {'role': 'assistant', 'content': 'ey'}]

    Args:
        record: with ``input`` and ``target``.
        prompt: as ``str.format`` takes it, with the input's fields (a string is "question"), or a
            function of the input.
        system: the first message, if there is to be one.

    Raises:
        ValueError: the record has no answer, or its input lacks a field.
    """
    target = part_of(record, "target")
    if not isinstance(target, str) or not part_of(record, "kept", True):
        raise ValueError(f"record must be kept, with a target, got {shown(record)}")
    first = [] if system is None else [{"role": "system", "content": system}]
    return [
        *first,
        {"role": "user", "content": prompt_of(record, prompt)},
        {"role": "assistant", "content": target},
    ]
