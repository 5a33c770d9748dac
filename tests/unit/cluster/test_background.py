"""A task that nobody awaits is heard of when it fails, and only then."""

from __future__ import annotations

import asyncio

from cluster.background import in_background


async def test_a_failure_is_told_with_what_goes_on_without_it() -> None:
    async def fails() -> None:
        raise ZeroDivisionError("nought")

    said = list[str]()
    task = in_background(fails(), "standby", said.append, without="workers start as programs of their own")
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert said == ["standby has failed, a bug: ZeroDivisionError('nought'); workers start as programs of their own"]


async def test_an_end_and_a_cancellation_are_not_told() -> None:
    said = list[str]()
    done = in_background(asyncio.sleep(0), "done", said.append, without="")
    cancelled = in_background(asyncio.sleep(60), "cancelled", said.append, without="")
    await asyncio.wait([done])
    cancelled.cancel()
    await asyncio.wait([cancelled])
    await asyncio.sleep(0)
    assert said == []
