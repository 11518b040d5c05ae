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
    """A call that a program wants made: it is answered with what comes back, or the exception."""

    prompts: list[str]
    wait_s: float  # before it


Program = Generator[Any, Any, None]


def checked_texts(texts: Any, n_prompts: int) -> list[str | None]:
    """As a list. What is none is its author's mistake, which no retry mends."""
    unordered = isinstance(texts, str | Mapping | Set)
    if unordered or not hasattr(texts, "__len__") or not hasattr(texts, "__iter__"):
        raise TypeError(f"sample_fn must return a list of texts, got {shown(texts)}")
    if len(texts) != n_prompts:
        raise ValueError(
            f"sample_fn must return one text for each of the {n_prompts} prompts, got {len(texts)}"
        )
    for i, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise TypeError(
                f"sample_fn must return strings, or None for no text, got {shown(text)} at {i}"
            )
    return list(texts)


def drive(program: Program, sample_fn: Callable) -> Iterator[Any]:
    """What the program yields, its calls made; an async ``sample_fn`` gets one event loop for all of them."""
    loop = answer = None
    try:
        while (item := _next(program, answer)) is not None:
            answer = None
            if not isinstance(item, Call):
                yield item
                continue
            if item.wait_s:
                time.sleep(item.wait_s)
            try:
                answer = sample_fn(list(item.prompts))
                if inspect.isawaitable(answer):
                    loop = loop or _new_loop(answer)
                    answer = loop.run_until_complete(_awaited(answer))
            except _LoopRunsError:
                raise RuntimeError(IN_A_LOOP) from None
            except Exception as error:
                answer = error
    finally:
        program.close()
        if loop is not None:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()


async def drive_async(program: Program, sample_fn: Callable) -> AsyncIterator[Any]:
    """:func:`drive` in the loop that runs: a ``sample_fn`` that is not async works in a thread meanwhile."""
    answer = None
    try:
        while (item := _next(program, answer)) is not None:
            answer = None
            if not isinstance(item, Call):
                yield item
                continue
            await asyncio.sleep(item.wait_s)
            try:
                if inspect.iscoroutinefunction(sample_fn):
                    answer = sample_fn(list(item.prompts))
                else:
                    answer = await asyncio.to_thread(sample_fn, list(item.prompts))
                if inspect.isawaitable(answer):
                    answer = await answer
            except Exception as error:
                answer = error
    finally:
        program.close()


def _next(program: Program, answer: Any) -> Any:
    """None at its end."""
    try:
        return program.send(answer)
    except StopIteration:
        return None


class _LoopRunsError(Exception):
    pass


def _new_loop(awaitable) -> asyncio.AbstractEventLoop:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.new_event_loop()
    if inspect.iscoroutine(awaitable):
        awaitable.close()  # it is not to be warned of as never awaited
    raise _LoopRunsError


async def _awaited(awaitable):
    return await awaitable
