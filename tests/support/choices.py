"""Requests with several answers, and with log probabilities: each answer is recorded, and judged, as one of its own."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.chaos_client import End, Question, Try
from tests.support.chaos_asking import BOUND_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.support.chaos_asking import Asker

#: Of a token, computed in other company: the last bits differ.
LOGPROB_TOLERANCE = 1e-3
NUM_TOP = 2


@dataclass(slots=True)
class Choice:
    """One of the answers to a request, as it came."""

    record: Try
    #: By token: its own, then those of the likeliest, likeliest first.
    logprobs: list[tuple[float, ...]] = field(default_factory=list[tuple[float, ...]])


def each_alone(asked: Question, n: int) -> list[Question]:
    """The questions with one answer each whose answers are the `n` ones to `asked`: seeds count up."""
    return [
        asked if asked.seed is None else replace(asked, name=f"{asked.name} answer {number}", seed=asked.seed + number)
        for number in range(n)
    ]


async def ask_choices(
    client: httpx.AsyncClient, asked: Question, n: int, on_start: Callable[[list[Choice]], None] | None = None
) -> list[Choice]:
    """Streams `n` answers with log probabilities; never raises for what the other side does."""
    choices = [Choice(Try(stream=True, sent_s=time.monotonic())) for _ in range(n)]
    if on_start is not None:
        on_start(choices)
    try:
        async with asyncio.timeout(BOUND_S):
            await _stream(client, {**asked.body(stream=True), "n": n, "logprobs": NUM_TOP}, choices)
    except TimeoutError:
        _end(choices, End.UNANSWERED, "")
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        _end(choices, End.BROKEN, repr(error))
    return choices


async def checked_choices(
    asker: Asker, asked: Question, n: int, on_start: Callable[[list[Choice]], None] | None = None
) -> list[Choice]:
    """As `ask_choices`; every token is checked. What each answer must be, the asker has learned before."""
    choices = await ask_choices(asker.client, asked, n, on_start)
    for alone, choice in zip(each_alone(asked, n), choices, strict=True):
        await asker.check(alone, choice.record)
        assert choice.record.end is not End.WHOLE or len(choice.logprobs) == len(choice.record.token_ids)
    return choices


def same_logprobs(ours: Choice, right: Choice) -> bool:
    return len(ours.logprobs) == len(right.logprobs) and all(
        len(a) == len(b) and all(abs(x - y) <= LOGPROB_TOLERANCE for x, y in zip(a, b, strict=True))
        for a, b in zip(ours.logprobs, right.logprobs, strict=True)
    )


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], choices: list[Choice]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            error = response.json()["error"]
            for choice in choices:
                choice.record.status = response.status_code
                choice.record.error = (str(error["code"]), str(error["message"]))
            _end(choices, End.ERROR, "")
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if any(choice.record.num_done for choice in choices):
                choices[0].record.num_late += 1
            elif data == "[DONE]":
                for choice in choices:
                    choice.record.num_done = 1
                    # The request's own counts all answers; here each stands for itself.
                    choice.record.usage = {"completion_tokens": len(choice.record.token_ids)}
            else:
                _take(json.loads(data), choices)
    ended = choices[0].record
    if ended.error is not None:
        _end(choices, End.ERROR, "")
    elif ended.num_done:
        _end(choices, End.WHOLE, "")
    else:
        _end(choices, End.BROKEN, "the stream ended without [DONE]")


def _take(event: dict[str, Any], choices: Sequence[Choice]) -> None:
    if "error" in event:
        for choice in choices:
            choice.record.error = (str(event["error"]["code"]), str(event["error"]["message"]))
        return
    for piece in event["choices"]:
        choice = choices[int(piece["index"])]
        record = choice.record
        token_ids: list[int] = piece.get("token_ids") or []
        if token_ids:
            record.stamps_s.append(time.monotonic())
        record.token_ids += token_ids
        record.text += piece["text"]
        if piece.get("finish_reason") is not None:
            record.finishes.append(str(piece["finish_reason"]))
        logprobs = piece.get("logprobs")
        if logprobs is not None:
            choice.logprobs += [
                (own, *sorted(top.values(), reverse=True))
                for own, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
            ]
    for timeline in _timelines(event):
        for choice in choices:
            choice.record.replays += int(timeline["replays"])


def _timelines(event: dict[str, Any]) -> list[dict[str, Any]]:
    timeline = event.get("timeline")
    if timeline is None:
        return []
    return timeline.get("choices") or [timeline]


def _end(choices: list[Choice], end: End, how: str) -> None:
    for choice in choices:
        choice.record.end, choice.record.how, choice.record.ended_s = end, how, time.monotonic()
