"""An event loop in a thread: asynchronous requests behind blocking calls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import CancelledError as FutureCancelled
from typing import TYPE_CHECKING, Any, TypeVar

from contracts.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

_END_TIMEOUT_S = 10.0


class LoopThread:
    """An event loop in a thread, started with its first question."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. However this ends, `work` has ended before. Raises Cancelled when this is closed."""
        ended = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                ended.set()

        try:
            future = asyncio.run_coroutine_threadsafe(watched(), self._started())
        except BaseException:
            work.close()
            raise
        try:
            return future.result()
        except FutureCancelled:
            raise Cancelled("the object store was closed") from None
        except BaseException:
            if not future.done():
                # Ctrl-C: the caller's memory is still being written to.
                future.cancel()
                ended.wait(_END_TIMEOUT_S)
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._is_closed:
                raise Cancelled("the object store is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="object-store", daemon=True)
                self._thread.start()
            return self._loop

    def close(self) -> None:
        """Ends what runs. Idempotent."""
        with self._lock:
            loop, self._loop, self._is_closed = self._loop, None, True
        if loop is None or self._thread is None:
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), loop).result(_END_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(_END_TIMEOUT_S)
        if not self._thread.is_alive():
            loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
