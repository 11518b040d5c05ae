"""Calls of a user's ``sample_fn``: what it may return, and one program driven with or without an event loop."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Set
from typing import Any, NamedTuple

from ...scalars import shown

IN_A_LOOP = (
    "sample_fn is async, and an event loop runs already (as in a notebook): iterate with "
    "`async for record in curate(...)`"
)


class Call(NamedTuple):
    """A call that a program wants made: it is answered with the texts, or the exception."""

    prompts: list[str]
    wait_s: float  # before it


class WrongTexts(Exception):
    """What ``sample_fn`` returned is no list of texts: its author's mistake, which no retry mends."""


Program = Generator[Any, list[str | None] | Exception | None, None]


def checked_texts(texts: Any, n_prompts: int) -> list[str | None]:
    unordered = isinstance(texts, str | Mapping | Set)
    if unordered or not hasattr(texts, "__len__") or not hasattr(texts, "__iter__"):
        raise WrongTexts(TypeError(f"sample_fn must return a list of texts, got {shown(texts)}"))
    if len(texts) != n_prompts:
        raise WrongTexts(
            ValueError(
                f"sample_fn must return one text for each of the {n_prompts} prompts, got {len(texts)}"
            )
        )
    for i, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise WrongTexts(
                TypeError(
                    f"sample_fn must return strings, or None for no text, got {shown(text)} at {i}"
                )
            )
    return list(texts)


def drive(program: Program, sample_fn: Callable) -> Iterator[Any]:
    """What the program yields, its calls made; an async ``sample_fn`` gets one event loop for all of them."""
    loop = None
    try:
        answer = None
        while True:
            try:
                item = program.send(answer)
            except StopIteration:
                return
            if not isinstance(item, Call):
                answer = None
                yield item
                continue
            if item.wait_s:
                time.sleep(item.wait_s)
            try:
                texts = sample_fn(list(item.prompts))
                if inspect.isawaitable(texts):
                    loop = loop or _new_loop(texts)
                    texts = loop.run_until_complete(_awaited(texts))
                answer = checked_texts(texts, len(item.prompts))
            except (WrongTexts, _LoopRunsError) as error:
                raise error.args[0] from None
            except Exception as error:
                answer = error
    finally:
        program.close()
        if loop is not None:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


class _LoopRunsError(Exception):
    pass


def _new_loop(awaitable) -> asyncio.AbstractEventLoop:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.new_event_loop()
    if inspect.iscoroutine(awaitable):
        awaitable.close()  # it is not to be warned of as never awaited
    raise _LoopRunsError(RuntimeError(IN_A_LOOP))


async def _awaited(awaitable):
    return await awaitable


async def drive_async(program: Program, sample_fn: Callable) -> AsyncIterator[Any]:
    """:func:`drive` in the loop that runs: a ``sample_fn`` that is not async works in a thread meanwhile."""
    try:
        answer = None
        while True:
            try:
                item = program.send(answer)
            except StopIteration:
                return
            if not isinstance(item, Call):
                answer = None
                yield item
                continue
            await asyncio.sleep(item.wait_s)
            try:
                if inspect.iscoroutinefunction(sample_fn):
                    texts = await sample_fn(list(item.prompts))
                else:
                    texts = await asyncio.to_thread(sample_fn, list(item.prompts))
                    if inspect.isawaitable(texts):
                        texts = await texts
                answer = checked_texts(texts, len(item.prompts))
            except WrongTexts as error:
                raise error.args[0] from None
            except Exception as error:
                answer = error
    finally:
        program.close()
