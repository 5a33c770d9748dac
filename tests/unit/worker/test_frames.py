"""Frames: one per flush and gateway, signs of life, and gateways that stop reading."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from contracts.errors import WorkerUnavailable
from contracts.ids import GatewayId, Incarnation, WorkerId
from contracts.requests import Frame, TokenDelta
from tests.support.roles import HandClock, generate
from worker import FrameOutbox
from worker.frames import UNATTENDED_S

GATEWAY = GatewayId("g")


@dataclass
class Post:
    """An outbox and who was given up."""

    max_pending_deltas: int = 100
    given_up: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    clock: HandClock = field(default_factory=HandClock)

    def __post_init__(self) -> None:
        self.outbox = FrameOutbox(
            worker_id=WorkerId("w0"),
            incarnation=Incarnation(3),
            clock=self.clock,
            max_pending_deltas=self.max_pending_deltas,
            on_given_up=lambda gateway_id, reason: self.given_up.append((gateway_id, reason)),
        )

    def emit(self, *indices: int) -> None:
        request = generate()
        for index in indices:
            self.outbox.emit(request, TokenDelta(request_id=request.request_id, index=index, token_ids=(7,)))


def indices(frame: Frame) -> list[int]:
    return [delta.index for delta in frame.deltas]


async def test_a_step_is_one_frame() -> None:
    post = Post()
    stream = aiter(post.outbox.stream(GATEWAY))
    assert indices(await anext(stream)) == [], "the first frame says that the stream stands"
    post.emit(0, 1)
    post.outbox.flush()
    post.emit(2)
    assert indices(await anext(stream)) == [0, 1, 2], "what is there when the stream comes to it leaves together"
    post.emit(3)
    post.outbox.flush()
    frame = await anext(stream)
    assert (indices(frame), frame.sequence_number, frame.incarnation) == ([3], 2, 3)


async def test_deltas_before_the_stream_are_not_lost() -> None:
    post = Post()
    post.emit(0)
    assert indices(await anext(aiter(post.outbox.stream(GATEWAY)))) == [0]


async def test_a_newer_stream_takes_over_without_loss() -> None:
    post = Post()
    older = aiter(post.outbox.stream(GATEWAY))
    await anext(older)
    waiting = asyncio.ensure_future(anext(older))
    await asyncio.sleep(0)
    newer = aiter(post.outbox.stream(GATEWAY))
    await anext(newer)
    post.emit(5)
    post.outbox.flush()
    with pytest.raises(WorkerUnavailable, match="a newer one took over"):
        await waiting
    assert indices(await anext(newer)) == [5]


async def test_a_gateway_that_falls_behind_is_given_up() -> None:
    post = Post(max_pending_deltas=2)
    stream = aiter(post.outbox.stream(GATEWAY))
    await anext(stream)
    post.emit(0, 1, 2)
    post.outbox.flush()
    assert post.given_up == [("g", "fell 3 deltas behind")]
    with pytest.raises(WorkerUnavailable):
        await anext(stream)


async def test_a_gateway_that_went_away_is_given_up_after_a_while() -> None:
    post = Post()
    stream = post.outbox.stream(GATEWAY)
    await anext(aiter(stream))
    post.outbox.expire(UNATTENDED_S + 1)
    assert post.given_up == [], "its stream stands"
    post.clock.time_s = 5.0
    await stream.aclose()
    post.outbox.expire(5.0 + UNATTENDED_S)
    assert post.given_up == []
    post.outbox.expire(5.1 + UNATTENDED_S)
    assert post.given_up == [("g", "has had no frame stream for 3 s")]
