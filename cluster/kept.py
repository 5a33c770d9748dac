"""A part of this process that is begun anew where a bug ends it, while the other parts go on."""

from __future__ import annotations

import asyncio
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

    from contracts.clock import Clock

PartT = TypeVar("PartT")

#: From the end of one life to the beginning of the next; doubles with each that ends within `_STABLE_S`.
RESTART_DELAY_S = 1.0
MAX_RESTART_DELAY_S = 30.0
_STABLE_S = 60.0


@asynccontextmanager
async def kept(
    name: str,
    make: Callable[[], AbstractAsyncContextManager[PartT]],
    clock: Clock,
    log: Callable[[str], None],
    *,
    on_down: Callable[[str], None] = lambda _: None,
    on_up: Callable[[PartT], None] = lambda _: None,
) -> AsyncGenerator[PartT]:
    """Yields what the first `make()` yields; what its start raises comes out.

    Each life is entered and left in a task of its own, which its task groups may cancel. Where one ends by itself,
    `on_down(reason)` is called, and after a delay `make()` again; `on_up` hears of what it yields. A later start that
    fails is an end too.
    """
    loop = asyncio.get_running_loop()
    first: asyncio.Future[PartT] = loop.create_future()
    leaving = asyncio.Event()

    async def live() -> None:
        async with make() as part:
            if first.done():
                log(f"{name}: goes on")
                on_up(part)
            else:
                first.set_result(part)
            await leaving.wait()

    async def run() -> None:
        delay_s = RESTART_DELAY_S
        while True:
            began_s = clock.now_s()
            try:
                return await live()
            except Exception as error:
                if not first.done():
                    first.set_exception(error)
                    return
                reason = f"{name} has failed: {cause_of(error)!r}"
                log("".join(traceback.format_exception(error)).rstrip())
            if leaving.is_set():
                return
            if clock.now_s() - began_s >= _STABLE_S:
                delay_s = RESTART_DELAY_S
            log(f"{reason}; it begins anew in {delay_s:g} s")
            on_down(reason)
            waiting = asyncio.create_task(leaving.wait())
            resting = asyncio.create_task(clock.sleep(delay_s))
            try:
                await asyncio.wait([waiting, resting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
                resting.cancel()
            if leaving.is_set():
                return
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)

    task = asyncio.create_task(run(), name=name)
    try:
        yield await asyncio.shield(first)
    finally:
        leaving.set()
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if not first.done():
            first.cancel()


def cause_of(error: BaseException) -> BaseException:
    """The one error of all that it holds which people want to read: not what came of a task group that was ending
    because of another one."""
    leaves = list(_leaves(error, set()))
    return next((leaf for leaf in leaves if not _is_consequence(leaf)), leaves[0])


def _leaves(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    if id(error) in seen:
        return
    seen.add(id(error))
    if isinstance(error, BaseExceptionGroup):
        for each in cast("BaseExceptionGroup[BaseException]", error).exceptions:
            yield from _leaves(each, seen)
    else:
        yield error
    if error.__context__ is not None:
        yield from _leaves(error.__context__, seen)


def _is_consequence(error: BaseException) -> bool:
    if isinstance(error, asyncio.CancelledError):
        return True
    # Of a task group that takes no more tasks.
    return isinstance(error, RuntimeError) and "is shutting down" in str(error)
