"""The reader's end of one request: deltas as they come, kept until they are taken."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.errors import TandemError
    from contracts.ids import RequestId
    from contracts.requests import TokenDelta
    from gateway.timeline import Timeline

    Cancel = Callable[[RequestId, str, str], None]


class RequestStream:
    """One request's answer: iterate it for deltas in order, the last with `finish`; then it ends.

    Iterating raises the TandemError that ended the request, after what had arrived before it. One reader.
    Leaving `async with` cancels the request unless it has ended.
    """

    def __init__(self, request_id: RequestId, cancel: Cancel) -> None:
        """`cancel(request_id, reason, outcome)` ends the request, wherever it is."""
        self.request_id = request_id
        #: Where the time went; set when the request has ended.
        self.timeline: Timeline | None = None
        self._cancel = cancel
        #: Deltas that the reader has not taken, and how many tokens they hold.
        self._deltas: deque[TokenDelta] = deque()
        self.num_buffered_tokens = 0
        self._error: TandemError | None = None
        #: What the reader waits for; done when it does not.
        self._news: asyncio.Future[None] | None = None
        self._is_accepted = False

    def cancel(self, reason: str, *, outcome: str = "cancelled") -> None:
        """Ends the request now, wherever it is. Iterating then ends without an error. May be repeated."""
        self._cancel(self.request_id, reason, outcome)

    async def accepted(self) -> None:
        """Returns once a worker has the request (or it ended well); raises what ended it before that."""
        while not (self._is_accepted or self.timeline):
            await self._next_news()
        if not self._is_accepted and self._error is not None:
            raise self._error

    async def __anext__(self) -> TokenDelta:
        while not self._deltas:
            if self.timeline is not None:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._next_news()
        delta = self._deltas.popleft()
        self.num_buffered_tokens -= len(delta.token_ids)
        return delta

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel("the client is gone")

    def put(self, delta: TokenDelta) -> None:
        """For the core; not after `end`."""
        assert self.timeline is None, f"{self.request_id}: tokens after the end"
        self._deltas.append(delta)
        self.num_buffered_tokens += len(delta.token_ids)
        self._wake()

    def accept(self) -> None:
        """For the core."""
        self._is_accepted = True
        self._wake()

    def end(self, error: TandemError | None, timeline: Timeline) -> None:
        """For the core; once."""
        assert self.timeline is None, f"{self.request_id}: ended twice"
        self._error, self.timeline = error, timeline
        self._wake()

    def _next_news(self) -> asyncio.Future[None]:
        assert self._news is None or self._news.done(), f"{self.request_id}: two readers"
        self._news = asyncio.get_running_loop().create_future()
        return self._news

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
