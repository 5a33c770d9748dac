"""Tasks that nobody awaits while they run: what ends one early is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def in_background(
    work: Coroutine[object, object, None], name: str, say: Callable[[str], None], *, without: str
) -> asyncio.Task[None]:
    """The task of `work`. When it fails, `say` hears of it, and what goes on `without` it."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            say(f"{name} has failed, a bug: {error!r}; {without}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task
