"""Asks over a real client, and waits."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from loadtest.http.client import HttpClient
from loadtest.http.reader import AnswerReader
from loadtest.record import RequestRecord
from loadtest.settings import Limits
from tests.support.raw_server import raw_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from loadtest.http.sending import Sending
    from tests.support.raw_server import Serve

#: Short, so that what hangs ends soon; long enough for a busy machine.
LIMITS = Limits(connect_s=5.0, total_s=5.0)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":" a"}]}\n\n'
FINISH = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


WHOLE = STREAM_HEAD + chunk(TOKEN) + chunk(TOKEN) + chunk(FINISH) + chunk(DONE) + END


class Asked:
    """One request, and how often its end was told."""

    def __init__(self, client: HttpClient, body: bytes, cancel_after_tokens: int | None) -> None:
        self.record = RequestRecord(
            index=0,
            item=0,
            turn=0,
            slo_class="default",
            prompt_tokens=8,
            output_tokens=4,
            cancel_after_tokens=cancel_after_tokens,
        )
        self.num_ends = 0
        self._ended = asyncio.Event()
        reader = AnswerReader(self.record, now_s=time.perf_counter, keep_text=False)
        self.sending: Sending = client.send("/v1/completions", body, reader, self._end)
        assert self.num_ends == 0, "told from within send"

    def _end(self) -> None:
        self.num_ends += 1
        self._ended.set()

    async def ended(self) -> RequestRecord:
        async with asyncio.timeout(10):
            await self._ended.wait()
        return self.record


def ask(client: HttpClient, body: bytes = b"{}", *, cancel_after_tokens: int | None = None) -> Asked:
    return Asked(client, body, cancel_after_tokens)


@asynccontextmanager
async def http_client(
    url: str, limits: Limits = LIMITS, *, verify: bool = True, now_s: Callable[[], float] = time.perf_counter
) -> AsyncGenerator[HttpClient]:
    """Closed at the end, with nothing left open."""
    client = HttpClient(url, headers=[("x-extra", "yes")], limits=limits, now_s=now_s, verify=verify)
    try:
        yield client
    finally:
        await client.close()
    assert client.num_open == 0


async def answer_of(serve: Serve, *, limits: Limits = LIMITS, cancel_after_tokens: int | None = None) -> RequestRecord:
    """What becomes of one request; its end is told once, and no connection is left."""
    async with raw_server(serve) as url, http_client(url, limits) as client:
        asked = ask(client, cancel_after_tokens=cancel_after_tokens)
        record = await asked.ended()
        # What still comes must not end it again.
        asked.sending.cancel(record.outcome)
        await asyncio.sleep(0.01)
    assert asked.num_ends == 1
    return record
