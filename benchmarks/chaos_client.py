"""Clients of a cluster under faults: each notes everything it was sent, and judges nothing.

A `Question` is what can be asked again and must be answered the same; a `Try` is one HTTP exchange about it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: Of questions that are answered by sampling.
TEMPERATURE = 0.9
#: Longest wait that a refusal is believed to ask for.
MAX_RETRY_AFTER_S = 3.0
#: The wait after a refusal that names none, and after a connection that could not be made.
RETRY_AFTER_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request body, without how it is delivered."""

    name: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    #: None: greedy.
    seed: int | None = None
    ignore_eos: bool = True

    def body(self, *, stream: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": "demo",
            "prompt": self.prompt if isinstance(self.prompt, str) else list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0 if self.seed is None else TEMPERATURE,
            "ignore_eos": self.ignore_eos,
            "return_token_ids": True,
            "include_timeline": True,
            "stream": stream,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body


class End(Enum):
    #: The answer came to its end.
    WHOLE = "whole"
    #: An error object, before the first byte or as the stream's last event.
    ERROR = "error"
    #: No connection could be made: nobody saw the request.
    UNREACHED = "unreached"
    #: The client left.
    LEFT = "left"
    #: The connection ended, or the answer did not parse, and nothing said why.
    BROKEN = "broken"
    #: Nothing came to an end within the bound.
    UNANSWERED = "unanswered"


@dataclass(slots=True, kw_only=True)
class Try:
    """What one client saw. Times are on its own monotonic clock."""

    stream: bool
    sent_s: float
    end: End = End.BROKEN
    ended_s: float = 0.0
    status: int | None = None
    #: Code of the error object, and what it said.
    error: tuple[str, str] | None = None
    retry_after_s: float | None = None
    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    #: Arrival of each chunk that held tokens.
    stamps_s: list[float] = field(default_factory=list[float])
    finishes: list[str] = field(default_factory=list[str])
    usage: dict[str, int] | None = None
    num_done: int = 0
    #: Events after the one that ended the stream: there must be none.
    num_late: int = 0
    replays: int = 0
    #: Of a BROKEN one: how.
    how: str = ""

    @property
    def refused(self) -> bool:
        """Turned away before the first byte of an answer, and worth another try."""
        return self.end is End.UNREACHED or (self.end is End.ERROR and self.status in (429, 503))

    @property
    def writing(self) -> bool:
        """Between its first token and its end."""
        return bool(self.token_ids) and not self.ended_s

    @property
    def longest_gap(self) -> tuple[float, float]:
        """When the longest time without a new token began and ended, from the sending on; of streams with tokens."""
        marks = [self.sent_s, *self.stamps_s]
        return max(itertools.pairwise(marks), key=lambda gap: gap[1] - gap[0])


@dataclass(frozen=True, slots=True)
class Leaving:
    """When a client goes away: so long after sending, or once it has so many tokens."""

    after_s: float | None = None
    after_tokens: int | None = None


class _Left(Exception):
    pass


async def attempt(
    client: httpx.AsyncClient,
    question: Question,
    *,
    stream: bool,
    bound_s: float,
    leaving: Leaving | None = None,
    on_start: Callable[[Try], None] | None = None,
    on_token: Callable[[Try], Awaitable[None]] | None = None,
) -> Try:
    """One exchange; never raises for what the other side does. `bound_s` is when the client gives up hope.

    `on_start` is handed the growing record at once; `on_token` is awaited after each chunk with tokens.
    """
    record = Try(stream=stream, sent_s=time.monotonic())
    if on_start is not None:
        on_start(record)
    patience_s = leaving.after_s if leaving is not None and leaving.after_s is not None else bound_s
    try:
        async with asyncio.timeout(patience_s):
            if stream:
                await _stream(client, question, record, leaving, on_token)
            else:
                await _whole(client, question, record)
    except _Left:
        record.end = End.LEFT
    except TimeoutError:
        record.end = End.LEFT if patience_s != bound_s else End.UNANSWERED
    except httpx.ConnectError as error:
        record.end, record.how = End.UNREACHED, repr(error)
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        record.end, record.how = End.BROKEN, repr(error)
    record.ended_s = time.monotonic()
    return record


async def _whole(client: httpx.AsyncClient, question: Question, record: Try) -> None:
    response = await client.post("/v1/completions", json=question.body(stream=False))
    record.status = response.status_code
    if _take_refusal(response, record):
        return
    document: dict[str, Any] = response.json()
    _take_choices(document["choices"], record)
    record.usage = document["usage"]
    record.replays = int(document["timeline"]["replays"])
    record.num_done = 1
    record.end = End.WHOLE


async def _stream(
    client: httpx.AsyncClient,
    question: Question,
    record: Try,
    leaving: Leaving | None,
    on_token: Callable[[Try], Awaitable[None]] | None,
) -> None:
    enough = None if leaving is None else leaving.after_tokens
    async with client.stream("POST", "/v1/completions", json=question.body(stream=True)) as response:
        record.status = response.status_code
        if response.status_code != 200:
            await response.aread()
        if _take_refusal(response, record):
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            before = len(record.token_ids)
            _take_event(line.removeprefix("data: "), record)
            if len(record.token_ids) > before:
                record.stamps_s.append(time.monotonic())
                if on_token is not None:
                    await on_token(record)
            if enough is not None and len(record.token_ids) >= enough:
                raise _Left
        if record.error is not None:
            record.end = End.ERROR
        elif record.num_done:
            record.end = End.WHOLE
        else:
            record.how = "the stream ended without [DONE]"


def _take_refusal(response: httpx.Response, record: Try) -> bool:
    """Whether the answer is an error; httpx has read it by now."""
    if response.status_code == 200:
        return False
    error: dict[str, Any] = response.json()["error"]
    record.error = (str(error["code"]), str(error["message"]))
    after = response.headers.get("retry-after")
    record.retry_after_s = None if after is None else float(after)
    record.end = End.ERROR
    return True


def _take_event(data: str, record: Try) -> None:
    if record.num_done:
        record.num_late += 1
        return
    if data == "[DONE]":
        record.num_done = 1
        return
    event: dict[str, Any] = json.loads(data)
    if record.error is not None:
        record.num_late += 1
    elif "error" in event:
        record.error = (str(event["error"]["code"]), str(event["error"]["message"]))
    else:
        _take_choices(event["choices"], record)
        if event.get("usage") is not None:
            record.usage = event["usage"]
        if "timeline" in event:
            record.replays = int(event["timeline"]["replays"])


def _take_choices(choices: list[dict[str, Any]], record: Try) -> None:
    for choice in choices:
        record.token_ids += choice.get("token_ids") or []
        record.text += choice["text"]
        if choice.get("finish_reason") is not None:
            record.finishes.append(str(choice["finish_reason"]))


@dataclass(slots=True, kw_only=True)
class Outcome:
    """A question as its asker saw it to the end: all tries, the last of which counts."""

    question: Question
    tries: list[Try]

    @property
    def last(self) -> Try:
        return self.tries[-1]

    @property
    def refusals(self) -> list[Try]:
        """Tries that were turned away before one that counts."""
        return self.tries[:-1]


async def ask(
    client: httpx.AsyncClient,
    question: Question,
    *,
    stream: bool,
    bound_s: float,
    patience_s: float,
    leaving: Leaving | None = None,
    on_start: Callable[[Try], None] | None = None,
) -> Outcome:
    """Asks until an answer begins, as long as refusals come and `patience_s` lasts; waits as they say."""
    started_s = time.monotonic()
    outcome = Outcome(question=question, tries=[])
    while True:
        record = await attempt(client, question, stream=stream, bound_s=bound_s, leaving=leaving, on_start=on_start)
        outcome.tries.append(record)
        wait_s = RETRY_AFTER_S if record.retry_after_s is None else min(record.retry_after_s, MAX_RETRY_AFTER_S)
        if not record.refused or time.monotonic() + wait_s - started_s > patience_s:
            return outcome
        await asyncio.sleep(wait_s)
