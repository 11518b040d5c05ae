"""``curate``: a stream of inputs, several samples of each, and a record of what they agree on."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ...scalars import flag, integer, shown
from .answers import normalize_answer
from .journal import Journal
from .progress import no_bar, rich_bar
from .prompts import Method
from .records import FAILED, Record, Summary
from .sampling import Call, drive, drive_async
from .windows import Input, Options, Perturbation, Windows

BLOCK = 256  # lines that are read before those that failed among them are asked again


def curate(
    inputs: Iterable[Input],
    method: Method,
    sample_fn: Callable[[list[str]], list[str]],
    *,
    n: int = 8,
    perturbations: Sequence[Perturbation] = (),
    normalize: Callable[[str], str | None] = normalize_answer,
    min_agreement: float = 0.5,
    path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    retries: int = 2,
    retry_wait_s: float = 1.0,
    max_failures: int = 10,
    retry_failed: bool = False,
    progress: bool = False,
    total: int | None = None,
) -> "Curation":
    """Targets for direct answers: n samples of a slow method for each input, kept where they agree.

    ``majority_vote`` of n answers of each version of an input, then ``perturbation_consistent`` over versions.
    Inputs without labels go in; an iterator of :class:`Record` comes out, one an input, in their order.

    Example:
        >>> from distill_ops.methods.system2 import REPHRASE_AND_RESPOND, curate
        >>> def sample_fn(prompts):  # of a model that knows one of two answers
        ...     return [f"The answer is {'ey' if 'Joe' in x else i}." for i, x in enumerate(prompts)]
        >>> asked = ["Last letters of Joe Day?", "Last letters of Ann Lee?"]
        >>> curation = curate(asked, REPHRASE_AND_RESPOND, sample_fn, n=4)
        >>> [(record.target, record.reason) for record in curation]
        [('ey', 'kept'), (None, 'tie')]
        >>> curation.summary.share
        0.5

    System 2 distillation (arXiv:2407.06023), its unsupervised curation; :func:`to_labels` makes the
    records into ids and labels. No model is inside. docs/system2.md has the knobs.

    Args:
        inputs: strings, or mappings of fields that the method's prompts name, of JSON's types: a string
            is the field "question". Read as they are needed; only some are held at a time.
        method: a :class:`Method`.
        sample_fn: a list of prompts to as many texts, sampled (at a temperature above 0: equal texts
            agree and say nothing); None for a prompt that got no text. It may be async: use
            ``async for`` where an event loop runs already, else ``for`` runs one.
        n: samples of each version of an input. A prompt is n times in the list.
        perturbations: functions of an input's fields to the changed ones and how an answer is undone
            (see :func:`perturbation_consistent`), such as :class:`ShuffledOptions` and :class:`Swapped`.
            Each is one version more, and all versions must have one answer.
        normalize, min_agreement: as in :func:`majority_vote`, of each version's samples.
        path: a JSONL file, written a whole line at a time. A call with the same arguments resumes it,
            and yields what it holds first; a last line that was cut off is made again.
        settings: whatever else the samples depend on, such as a model's name and temperature. With ``path``, a
            resume with other inputs, method, n, perturbations, normalize, min_agreement or settings is
            refused: data are compared by value, functions by name, defaults and what they close over (a
            lambda also by its code), objects by class and what pickle keeps of them. So an edit inside
            of a function is not seen: put a version here.
        batch_size: the most prompts of a call; those of several inputs are put together.
        retries: how often a call that raised is made again, after ``retry_wait_s`` seconds, then twice as
            many, and so on; then each input's prompts are tried alone, once, and an input that
            fails there has the reason "failed" and the error as its detail; nothing more is asked for it.
        max_failures: so many inputs that fail in a row, as where a server is gone, at whatever step, are an
            error. What was done before them is yielded first; they are not written, and a resume begins
            with them.
        retry_failed: whether a resume of ``path`` asks the inputs again whose reason is "failed"; their lines
            are replaced.
        progress: whether to show a bar and print the summary (needs rich).
        total: the number of inputs, for the bar, where inputs has no length.

    Returns:
        :class:`Curation`: an iterator, also an async one, to be used once; ``.summary`` counts what it
        yielded by reason.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; from the iterator for
            an input that lacks a field, for texts that are no list of strings, one a prompt, and for
            a path of other inputs or settings; and with ``path``, TypeError for what pickle refuses.
        RuntimeError: from the iterator, after ``max_failures``, as an event loop runs, or where a function of
            yours (a perturbation and its undo, normalize, parse) raised: with the input, and the error as
            its cause. ValueError and TypeError stay what they are.
        BlockingIOError: from the iterator: another process writes ``path``.
    """
    if isinstance(inputs, str | bytes | Mapping) or not hasattr(inputs, "__iter__"):
        raise TypeError(f"inputs must be an iterable of strings or mappings, got {shown(inputs)}")
    if not callable(sample_fn):
        raise TypeError(f"sample_fn must be a function, got {shown(sample_fn)}")
    options = Options(
        method, n, tuple(perturbations), normalize, min_agreement,
        batch_size, retries, retry_wait_s, max_failures,
    )  # fmt: skip
    if total is None:
        total = len(inputs) if hasattr(inputs, "__len__") else None
    else:
        integer("total", total, 0)
    bar = rich_bar() if flag("progress", progress) else no_bar
    if flag("retry_failed", retry_failed) and path is None:
        raise ValueError("retry_failed=True is of a file that is resumed: pass path=")
    journal = nullcontext
    if path is not None:
        journal = Journal(Path(path), options.digest(settings)).open
    return Curation(inputs, options, sample_fn, journal, partial(bar, total), retry_failed)


class Curation:
    """The iterator that :func:`curate` returns.

    Example:
        >>> from distill_ops.methods.system2 import CHAIN_OF_THOUGHT, curate
        >>> curation = curate(["1 + 1?"], CHAIN_OF_THOUGHT, lambda prompts: ["2"] * len(prompts))
        >>> kept = [record for record in curation if record.kept]
        >>> curation.summary.reasons["kept"]
        1
    """

    def __init__(
        self,
        inputs: Iterable[Input],
        options: Options,
        sample_fn: Callable,
        open_journal: Callable[[], AbstractContextManager[Journal | None]],
        open_bar: Callable[[Summary], AbstractContextManager[Callable[[], None]]],
        retry_failed: bool = False,
    ):
        self.summary = Summary()
        self._program = _program(
            inputs, options, self.summary, open_journal, open_bar, retry_failed
        )
        self._records = drive(self._program, sample_fn)
        self._records_async = drive_async(self._program, sample_fn)

    def __iter__(self) -> "Curation":
        return self

    def __next__(self) -> Record:
        return next(self._records)

    def __aiter__(self) -> "Curation":
        return self

    async def __anext__(self) -> Record:
        return await anext(self._records_async)

    def close(self) -> None:
        """Ends the iterator, sync or async, and closes the file, as the end of the inputs does."""
        self._records.close()
        self._program.close()

    async def aclose(self) -> None:
        """:meth:`close`, awaited."""
        await self._records_async.aclose()
        self._program.close()


# a function, not a method: an iterator that is dropped is freed, and its file with it, at once
def _program(
    inputs: Iterable[Input],
    options: Options,
    summary: Summary,
    open_journal,
    open_bar,
    retry_failed: bool,
) -> Generator[Record | Call, Any, None]:
    inputs, windows = enumerate(inputs), Windows(options, summary)
    with open_bar(summary) as advance, open_journal() as journal:

        def counted(record: Record) -> Record:
            summary.add(record)
            advance()
            return record

        def written(records: list[Record]) -> Iterator[Record]:
            for record in records:
                if journal is not None:
                    journal.append(record)
                yield counted(record)

        if journal is not None:
            stored = journal.stored(inputs)
            if retry_failed and journal.has_failed():
                with journal.rewritten():
                    while block := list(islice(stored, BLOCK)):
                        done, error = yield from _again(block, options.width, windows)
                        yield from written(done)
                        if error is not None:
                            raise error
            yield from map(counted, stored)
        held: list[Record] = []  # that failed, since the last one that did not
        while window := list(islice(inputs, options.width)):
            records, error = yield from windows.records(window)
            for record in records:
                held.append(record)
                if record.reason != FAILED:
                    yield from written(held)
                    held = []
            if error is not None:
                raise error
        yield from written(held)


def _again(
    block: list[Record], width: int, windows: Windows
) -> Generator[Call, Any, tuple[list[Record], RuntimeError | None]]:
    """Records, those that failed asked again, up to the first one for which that came to an end."""
    left = [(record.index, record.input) for record in block if record.reason == FAILED]
    found, error = {}, None
    while left and error is None:
        records, error = yield from windows.records(left[:width])
        found |= {record.index: record for record in records}
        left = left[width:]
    while error and found and found[next(reversed(found))].reason == FAILED:
        found.popitem()  # in a row with those that ended it
    block = [found.get(record.index) if record.reason == FAILED else record for record in block]
    return block[: block.index(None)] if error else block, error
