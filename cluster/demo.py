"""`tandem demo`: three chats through the REST API of a fresh cluster, and where each request's time went.

The chats are chosen so that wrong KV would show: one has two turns, and one asks for a fact that was given
some 300 tokens earlier.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from cluster.serve import EXIT_LOST, EXIT_OK, first_of, run_cluster, say
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cluster.following import LocalCluster
    from contracts.config import ClusterConfig

#: A whole answer of the demo model takes well under a second; a large model may take its time.
ANSWER_TIMEOUT_S = 120.0

MAX_ANSWER_TOKENS = 48

FILLER = (
    "The weather is sunny today.",
    "The small dog slept near the river.",
    "Many people like bread and cheese.",
    "The train to Paris is often late on Monday.",
    "There was a blue lamp on the table.",
    "Some people went to the market in the morning.",
    "On Friday the park is quiet and bright.",
    "A brown horse waited behind the old house.",
    "We talked about the weather and the soup.",
    "The shop opens in the morning and closes at night.",
    "The bus has 42 seats.",
    "I saw a rabbit near the forest this evening.",
    "It takes 15 minutes to walk to the school.",
    "The sun was warm and the sky was blue.",
)

PHASES = ("gateway", "queue", "prefill", "handoff", "decode")


@dataclass(frozen=True, slots=True)
class Chat:
    title: str
    #: What the user says, turn by turn.
    turns: tuple[str, ...]


CHATS = (
    Chat("a question", ("Who are you?",)),
    Chat("two turns", ("Please remember: Anna's locker number is 4821.", "What is Anna's locker number?")),
    Chat(
        "a fact from 300 tokens ago",
        ("The gate code is 7305. " + " ".join((*FILLER, *FILLER, *FILLER)) + " What is the gate code?",),
    ),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One request: what the client's clock says and what the gateway reports."""

    label: str
    total_ms: float
    timeline: dict[str, Any]


def run_demo(config: ClusterConfig) -> int:
    """Exit status 0 when every chat was answered and every process is gone."""
    keys = [key.get_secret_value() for key in config.gateway.api_keys]
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}

    async def body(cluster: LocalCluster, stop_wanted: asyncio.Event) -> int:
        async with httpx.AsyncClient(base_url=cluster.base_url, headers=headers, timeout=ANSWER_TIMEOUT_S) as client:
            return await _chats_unless_stopped(client, cluster, stop_wanted)

    return run_cluster(config, state_file=None, body=body)


async def _chats_unless_stopped(client: httpx.AsyncClient, cluster: LocalCluster, stop_wanted: asyncio.Event) -> int:
    chatting = asyncio.create_task(_hold_chats(client, cluster.model_name))
    done = asyncio.Event()
    chatting.add_done_callback(lambda _: done.set())
    await first_of(done, stop_wanted, cluster.hopeless)
    if not chatting.done():
        chatting.cancel()
        await asyncio.wait([chatting])
        return EXIT_OK if stop_wanted.is_set() else EXIT_LOST
    for line in timeline_table(chatting.result()):
        say(line)
    return EXIT_OK


async def _hold_chats(client: httpx.AsyncClient, model_name: str) -> list[Measured]:
    measured: list[Measured] = []
    for number, chat in enumerate(CHATS, 1):
        say(f"\nchat {number}: {chat.title}")
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(chat.turns, 1):
            say(f"  user:      {shorten(text)}")
            messages.append({"role": "user", "content": text})
            label = f"{number}" if len(chat.turns) == 1 else f"{number}.{turn}"
            answer, figures = await _ask(client, model_name, messages, label)
            messages.append({"role": "assistant", "content": answer})
            measured.append(figures)
    return measured


async def _ask(
    client: httpx.AsyncClient, model_name: str, messages: list[dict[str, str]], label: str
) -> tuple[str, Measured]:
    clock = LiveClock()
    started_s = clock.now_s()
    body = {
        "model": model_name,
        "messages": messages,
        "max_tokens": MAX_ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "include_timeline": True,
    }
    answer, timeline = "", dict[str, Any]()
    print("  assistant: ", end="", flush=True)
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for event in _events(response):
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            print(piece, end="", flush=True)
            answer += piece
            timeline = event.get("timeline") or timeline
    print(flush=True)
    return answer, Measured(label, (clock.now_s() - started_s) * 1000, timeline)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON bodies of a server-sent event stream, up to `[DONE]`."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data != line and data != "[DONE]":
            yield json.loads(data)


def shorten(text: str, max_words: int = 24) -> str:
    """Long texts by their first and last words."""
    words = text.split()
    if len(words) <= max_words:
        return text
    head, tail = words[: max_words // 2], words[-max_words // 3 :]
    return f"{' '.join(head)} ... ({len(words) - len(head) - len(tail)} words) ... {' '.join(tail)}"


def timeline_table(rows: Sequence[Measured]) -> list[str]:
    """One row for each request: phases, their sum, what the gateway and what the client measured."""
    head = ["request", "prompt", "answer", *PHASES, "sum", "measured", "client", "workers"]
    table = [head, *(_table_row(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return ["", "where the time went (ms; prompt and answer in tokens)", *lines]


def _table_row(row: Measured) -> list[str]:
    timeline = row.timeline
    phases = [float(timeline[f"{phase}_ms"]) for phase in PHASES]
    numbers = [*phases, sum(phases), float(timeline["total_ms"]), row.total_ms]
    workers = dict.fromkeys((str(timeline["prefill_worker"]), str(timeline["decode_worker"])))
    return [
        row.label,
        str(timeline["prompt_tokens"]),
        str(timeline["completion_tokens"]),
        *(f"{number:.1f}" for number in numbers),
        " -> ".join(workers),
    ]
