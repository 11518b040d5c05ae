"""Records of a curation: what one is, its line of a JSONL file, and the summary of many."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

KEPT, FAILED = "kept", "failed"
BEGINNING = b'{"index": 0, "key": "'  # of every file


class Record(NamedTuple):
    """One input and what its samples agreed on; a line of the JSONL that :func:`curate` writes.

    Example:
        >>> from distill_ops.methods.system2 import curate, CHAIN_OF_THOUGHT
        >>> answer = lambda prompts: ["The answer is 4."] * len(prompts)
        >>> record, = curate(["2 + 2?"], CHAIN_OF_THOUGHT, answer, n=3)
        >>> record.target, record.agreement, record.kept, record.reason
        ('4', 1.0, True, 'kept')
    """

    index: int  #: of the input, from 0
    input: str | Mapping[str, Any]  #: as it was given
    target: str | None  #: the answer to train on, None where none is kept
    #: the share of the samples that gave the most frequent answer, of several versions of an input its mean;
    #: with the reason "inconsistent" the share of the *versions* that have the most frequent answer, with
    #: another reason that of the samples of the input as it was, and 0 where it failed
    agreement: float
    kept: bool  #: whether there is a target
    reason: (
        str  #: "kept", or why not: "tie", "low agreement", "unparsable", "inconsistent", "failed"
    )
    detail: str  #: what the answers were, or the error; for people


@dataclass
class Summary:
    """How many inputs were kept, and why the others were not.

    Example:
        >>> from distill_ops.methods.system2 import Summary
        >>> summary = Summary({"kept": 3, "tie": 1}, agreement_of_kept=2.75, n_texts=32)
        >>> summary.n, summary.kept, summary.share
        (4, 3, 0.75)
        >>> print(summary)
        reason    inputs  share
        kept           3  75.0%
        tie            1  25.0%
        all            4
        mean agreement of the kept: 0.917; texts sampled: 32
    """

    reasons: dict[str, int] = field(default_factory=Counter)  #: inputs of each reason
    agreement_of_kept: float = 0.0  #: summed over the kept
    n_texts: int = 0  #: that ``sample_fn`` returned, to this call alone

    @property
    def n(self) -> int:
        return sum(self.reasons.values())

    @property
    def kept(self) -> int:
        return self.reasons.get(KEPT, 0)

    @property
    def share(self) -> float:
        """Of the inputs that were kept; 0 of none."""
        return self.kept / self.n if self.n else 0.0

    def add(self, record: Record) -> None:
        self.reasons[record.reason] = self.reasons.get(record.reason, 0) + 1
        self.agreement_of_kept += record.agreement * record.kept

    def __str__(self) -> str:
        rows = sorted(self.reasons.items(), key=lambda item: (item[0] != KEPT, -item[1], item[0]))
        width = max(8, *(len(reason) for reason, _ in rows)) if rows else 8
        lines = [f"{'reason':<{width}}  inputs  share"]
        lines += [f"{name:<{width}}  {count:>6}  {count / self.n:5.1%}" for name, count in rows]
        lines.append(f"{'all':<{width}}  {self.n:>6}")
        mean = f"{self.agreement_of_kept / self.kept:.3f}" if self.kept else "none"
        lines.append(f"mean agreement of the kept: {mean}; texts sampled: {self.n_texts}")
        return "\n".join(lines)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def line_of(record: Record, key: str) -> bytes:
    """One line of JSON, of the same keys and types for every record, in UTF-8 wherever it can be."""
    fields = record._asdict()
    content = {"index": fields.pop("index"), "key": key, **fields}
    try:
        text = _encode(content).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 does not have
        text = json.dumps(content, allow_nan=False).encode()
    return text + b"\n"


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """Keys and records, one at a time; a last line without its end, of a killed writer, is left out.

    Raises:
        ValueError: a line that is no record, named.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
                key, record = str(content.pop("key")), Record(**content)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is no record of curate: {error}"
                ) from None
            yield key, record


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a JSONL file that :func:`curate` wrote, one at a time.

    Line ``i`` is the record of input ``i``; a last line that a killed writer did not end is left out.
    A path goes in, an iterator of :class:`Record` comes out.

    Example:
        >>> import tempfile
        >>> from distill_ops.methods.system2 import CHAIN_OF_THOUGHT, curate, read_records
        >>> path = tempfile.mkdtemp() + "/records.jsonl"
        >>> answer = lambda prompts: ["The answer is 4."] * len(prompts)
        >>> records = list(curate(["2 + 2?"], CHAIN_OF_THOUGHT, answer, path=path))
        >>> list(read_records(path)) == records
        True

    Raises:
        ValueError: a line that is no record, named.
    """
    for _, record in read_lines(Path(path)):
        yield record
