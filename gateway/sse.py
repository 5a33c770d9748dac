"""Server-sent events: one generation as a stream of chunks, kept alive, holding little for its client."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from contracts.errors import Cancelled, TandemError
from gateway.generation import run_all
from gateway.web import cancel_and_wait, error_object, until_disconnect

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from contracts.clock import Clock
    from gateway.formats import Format
    from gateway.generation import Choice, Generation
    from gateway.settings import GatewaySettings

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """Sends a generation's answers as they come, and closes the generation in the end.

    A failure after the first byte is an event with an `error` object; no normal finish follows it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, form: Format, created: int, clock: Clock, settings: GatewaySettings
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # Not known in advance, and set by the base class for its empty body.
        del self.headers["content-length"]
        self._generation = generation
        self._form = form
        self._clock = clock
        self._settings = settings
        self._head = {
            "id": form.id_prefix + generation.request_id,
            "object": form.chunk_name,
            "created": created,
            "model": generation.plan.model,
        }
        #: What stands before and after the only part of a chunk that changes.
        self._before = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if generation.plan.include_usage else b"]}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            sink = _Sink(send, self._clock)
            await until_disconnect(receive, self._write(sink))
        except Cancelled:
            # Nobody is left to be told.
            return
        finally:
            self._generation.close("the client is gone")

    async def _write(self, sink: _Sink) -> None:
        keeper = asyncio.create_task(sink.keep_alive(self._settings.keep_alive_s))
        try:
            await self._write_answers(sink)
        finally:
            await cancel_and_wait(keeper)

    async def _write_answers(self, sink: _Sink) -> None:
        try:
            await run_all([self._write_choice(choice, sink) for choice in self._generation.choices])
        except Cancelled:
            raise
        except TandemError as error:
            await sink.end(_event({"error": error_object(error)}) + _DONE)
        else:
            await sink.end(self._last_chunk() + _DONE)

    async def _write_choice(self, choice: Choice, sink: _Sink) -> None:
        """A chunk for each delta, also where its text is held back: clients see the pace."""
        opening = self._form.opening(choice)
        async for piece in self._generation.pieces(choice):
            await sink.send(self._chunks(opening + self._form.chunks(choice, piece)))
            opening = []

    def _chunks(self, choices: list[dict[str, Any]]) -> bytes:
        return b"".join(self._before + orjson.dumps(choice) + self._after for choice in choices)

    def _last_chunk(self) -> bytes:
        plan = self._generation.plan
        if not (plan.include_usage or plan.include_timeline):
            return b""
        chunk: dict[str, object] = {**self._head, "choices": [], "usage": self._generation.usage()}
        if plan.include_timeline:
            chunk["timeline"] = self._generation.timeline()
        return _event(chunk)


class _Sink:
    """The body of one response, written by several tasks."""

    def __init__(self, send: Send, clock: Clock) -> None:
        self._send = send
        self._clock = clock
        self._turn = asyncio.Lock()
        self._last_s = clock.now_s()

    async def send(self, data: bytes, *, more: bool = True) -> None:
        """Raises Cancelled when the client takes nothing for too long."""
        async with self._turn:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._last_s = self._clock.now_s()

    async def end(self, data: bytes) -> None:
        await self.send(data, more=False)

    async def keep_alive(self, interval_s: float) -> None:
        """Comments, which clients skip, wherever nothing else was sent for so long."""
        while True:
            wait_s = self._last_s + interval_s - self._clock.now_s()
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            else:
                await self.send(_KEEP_ALIVE)


def _event(content: object) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
