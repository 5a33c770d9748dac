"""Replays against a scripted cluster over real (in-memory) rpc, up to what a client of the API sees."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import (
    BadRequest,
    Internal,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import Attempt
from contracts.messages import RequestKey
from contracts.requests import ErrorInfo, SamplingParams, TokenDelta
from gateway.core import GatewayCore, Submission
from tests.unit.gateway.conftest import REPLAYING

if TYPE_CHECKING:
    import httpx

    from contracts.messages import Role
    from gateway.limits import GatewayLimits
    from gateway.stream import RequestStream
    from tests.support.fake_backend import FakeCluster, Script

FOUR: dict[str, Role] = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
TEN = list(range(10))


@pytest.fixture
def roles() -> dict[str, Role]:
    return FOUR


@pytest.fixture
def limits() -> GatewayLimits:
    return REPLAYING


def submission(max_tokens: int = 10, deadline_s: float = 60.0, logprobs: int | None = None) -> Submission:
    sampling = SamplingParams(max_tokens=max_tokens, logprobs=logprobs)
    return Submission(token_ids=(1, 2, 3), sampling=sampling, deadline_s=deadline_s)


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


@pytest.mark.parametrize(("victim", "stage"), [("prefill-0", 0), ("decode-0", 1), ("decode-0", 4)])
async def test_a_killed_worker_is_not_noticed(core: GatewayCore, cluster: FakeCluster, victim: str, stage: int) -> None:
    cluster.gates.close(stage)
    streams = [core.submit(submission(logprobs=1)) for _ in range(3)]
    await cluster.gates.reached(stage)
    await asyncio.gather(*(stream.accepted() for stream in streams))
    cluster.workers[victim].kill()
    cluster.gates.open(stage)
    for stream in streams:
        deltas = [delta async for delta in stream]
        assert [token_id for delta in deltas for token_id in delta.token_ids] == TEN
        assert [one.top[0].token_id for delta in deltas for one in delta.logprobs or ()] == TEN
        assert [delta.finish for delta in deltas if delta.finish] == ["length"]
        timeline = stream.timeline
        assert timeline is not None
        parts = timeline.gateway_us + timeline.queue_us + timeline.prefill_us + timeline.handoff_us
        assert parts + timeline.decode_us == timeline.total_us
        assert (timeline.num_replays, timeline.num_output_tokens) == (1, 10)
    assert core.stats.replays == {"worker_unavailable": 3}
    assert sum(core.stats.resumed.counts) == 3
    # The new worker was given what the client had got, and the avoided one was named.
    second = [ask for worker in cluster.workers.values() for ask in worker.accepted if ask.request.attempt == 2]
    assert len(second) == 3
    for ask in second:
        assert ask.request.token_ids == (1, 2, 3, *range(stage))
        assert (ask.request.num_prompt_tokens, ask.request.owner_epoch) == (3, 2)
    assert {item.avoid for call in cluster.dispatches for item in call.items} == {(), (victim,)}


@pytest.mark.parametrize("roles", [{"prefill-0": "prefill", "decode-0": "decode"}, {"mixed-0": "mixed"}])
async def test_the_only_worker_is_waited_for(core: GatewayCore, cluster: FakeCluster) -> None:
    victim = next(name for name in cluster.workers if name != "prefill-0")
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    role = cluster.workers[victim].role
    cluster.workers[victim].kill()
    while not core.stats.replays:  # noqa: ASYNC110 - the loss is noticed in the core
        await asyncio.sleep(0.005)
    cluster.gates.open(4)
    await cluster.start_worker(victim, role, incarnation=2)
    assert await tokens_of(stream) == TEN


async def test_a_worker_that_is_replaced_while_it_lives_is_fenced(core: GatewayCore, cluster: FakeCluster) -> None:
    """It was taken for dead and woke up: its tokens reach nobody, and it is told to stop."""
    cluster.gates.close(3)
    stream = core.submit(submission())
    await cluster.gates.reached(3)
    old = cluster.workers["decode-0"]
    old.send(_error(stream, 3, "transfer_aborted"))
    await old.wait_cancelled(stream.request_id)
    assert old.cancelled == [RequestKey(stream.request_id, Attempt(1))]
    for index in (3, 4, 5):
        old.send(TokenDelta(request_id=stream.request_id, index=index, token_ids=(77,)))
    cluster.gates.open(3)
    assert await tokens_of(stream) == TEN
    assert old.cancelled == [RequestKey(stream.request_id, Attempt(1))], "not more often than once a second"


async def test_a_stream_with_a_missing_frame_loses_nothing(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    stream = core.submit(submission())
    await cluster.gates.reached(2)
    worker = cluster.workers["decode-0"]
    worker.skip_frames(1)
    worker.send()
    worker.send()
    while not core.stats.replays:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    cluster.gates.open(2)
    assert await tokens_of(stream) == TEN


@pytest.mark.parametrize("limits", [replace(REPLAYING, gap_timeout_s=0.05)])
async def test_a_missing_token_is_written_again(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    stream = core.submit(submission())
    await cluster.gates.reached(2)
    cluster.workers["decode-0"].send(TokenDelta(request_id=stream.request_id, index=4, token_ids=(4,)))
    while not core.stats.replays:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    cluster.gates.open(2)
    assert await tokens_of(stream) == TEN
    assert core.stats.replays == {"transfer_aborted": 1}


@pytest.mark.parametrize(("num_failures", "is_served"), [(1, True), (2, False)])
async def test_a_failed_step_is_tried_once_more(
    core: GatewayCore, script: Script, cluster: FakeCluster, num_failures: int, is_served: bool
) -> None:
    cluster.gates.close("dispatch")
    stream, other = core.submit(submission()), core.submit(submission())
    script.failing_steps[stream.request_id] = num_failures
    cluster.gates.open("dispatch")
    if is_served:
        assert await tokens_of(stream) == TEN
    else:
        with pytest.raises(Internal, match="the step failed; after 1 replays"):
            await tokens_of(stream)
        assert core.stats.failed_after_replays == 1
    assert await tokens_of(other) == TEN


@pytest.mark.parametrize("error", [StaleIncarnation("restarted"), NotReady("stopping"), WorkerUnavailable("reset")])
async def test_a_worker_that_does_not_take_it_is_passed_over(
    core: GatewayCore, script: Script, cluster: FakeCluster, error: TandemError
) -> None:
    script.prefill_errors["prefill-0"] = error
    assert await tokens_of(core.submit(submission())) == TEN
    assert len(cluster.workers["prefill-1"].accepted) == 1


async def test_a_full_worker_is_passed_over_once(core: GatewayCore, script: Script, cluster: FakeCluster) -> None:
    script.prefill_errors["prefill-0"] = NoCapacity("512 wait", retry_after_s=3.0)
    assert await tokens_of(core.submit(submission())) == TEN
    script.prefill_errors["prefill-1"] = NoCapacity("511 wait", retry_after_s=2.0)
    with pytest.raises(NoCapacity, match="prefill worker prefill-1 is full: 511 wait") as caught:
        await core.submit(submission()).accepted()
    assert caught.value.retry_after_s == 2.0
    assert [len(call.items) for call in cluster.dispatches] == [1, 1, 1, 1]


async def test_what_is_wrong_with_the_request_itself_is_said_at_once(
    core: GatewayCore, script: Script, cluster: FakeCluster
) -> None:
    script.prefill_error = BadRequest("token id 9 is outside the vocabulary")
    with pytest.raises(BadRequest, match="outside the vocabulary"):
        await core.submit(submission()).accepted()
    assert len(cluster.dispatches) == 1


@pytest.mark.parametrize("limits", [replace(REPLAYING, replay_patience_s=0.2)])
async def test_patience_ends(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    for worker in cluster.workers.values():
        worker.kill()
    with pytest.raises(WorkerUnavailable, match=r"nobody took the request up for 0.2 s; after 1 replays"):
        await tokens_of(stream)


@pytest.mark.parametrize("limits", [replace(REPLAYING, dispatch_patience_s=0.1)])
async def test_a_dead_coordinator_is_asked_for_a_while(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.kill_coordinator()
    with pytest.raises(NotReady, match=r"the coordinator did not answer .*; nobody took the request up for 0.1 s"):
        await core.submit(submission()).accepted()


@pytest.mark.parametrize("limits", [REPLAYING, replace(REPLAYING, max_replays=0)])
async def test_a_first_request_waits_for_its_worker_to_start(
    core: GatewayCore, script: Script, cluster: FakeCluster
) -> None:
    script.rejection, script.reject_reason = ("not_ready", "decode-0 is being started", 1.0), "waking"
    stream = core.submit(submission())
    while len(cluster.dispatches) < 4:  # noqa: ASYNC110 - the coordinator is asked by the core
        await asyncio.sleep(0.005)
    script.rejection = None
    assert await tokens_of(stream) == TEN
    assert core.stats.replays == {}
    assert stream.timeline is not None
    assert 0 < stream.timeline.waking_us <= stream.timeline.gateway_us


@pytest.mark.parametrize("limits", [replace(REPLAYING, wake_patience_s=0.1)])
async def test_nobody_waits_for_ever_for_a_worker_to_start(core: GatewayCore, script: Script) -> None:
    script.rejection, script.reject_reason = ("not_ready", "decode-0 is being started", 1.0), "waking"
    with pytest.raises(NotReady, match=r"is being started; nobody took the request up for 0.1 s"):
        await core.submit(submission()).accepted()


@pytest.mark.parametrize("limits", [replace(REPLAYING, max_waiting_dispatch=2)])
async def test_more_replays_than_may_wait_for_the_coordinator(core: GatewayCore, cluster: FakeCluster) -> None:
    streams: list[RequestStream] = []
    cluster.gates.close(4)
    for _ in range(8):
        streams.append(core.submit(submission()))
        await streams[-1].accepted()
    await cluster.gates.reached(4)
    cluster.workers["decode-0"].kill()
    cluster.gates.open(4)
    assert await asyncio.gather(*map(tokens_of, streams)) == [TEN] * 8


async def test_a_cancel_in_the_midst_of_waiting(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    for worker in cluster.workers.values():
        worker.kill()
    while not core.stats.replays:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    stream.cancel("the client is gone")
    got = await tokens_of(stream)
    assert got == list(range(len(got)))
    await core.wait_idle()


@pytest.mark.parametrize("limits", [replace(REPLAYING, max_buffered_tokens=30)])
async def test_a_slow_client_in_the_midst_of_a_frame(core: GatewayCore, cluster: FakeCluster) -> None:
    """One delta closes a gap: more is delivered at once than the client may leave lying, and then its request
    ends. Nothing is delivered after that, and the frame's other requests go on."""
    cluster.gates.close(1)
    slow, other = core.submit(submission(100)), core.submit(submission())
    await asyncio.gather(slow.accepted(), other.accepted())
    await cluster.gates.reached(1)
    worker = cluster.workers["decode-0"]

    def part(stream: RequestStream, index: int, count: int) -> TokenDelta:
        return TokenDelta(request_id=stream.request_id, index=index, token_ids=tuple(range(index, index + count)))

    taken = asyncio.create_task(tokens_of(other))
    worker.send(part(slow, 22, 20), part(slow, 2, 20), part(slow, 50, 1), part(slow, 1, 1), part(other, 1, 1))
    await worker.wait_cancelled(slow.request_id)
    cluster.gates.open(1)
    got = [await anext(slow) for _ in range(4)]
    assert [token_id for delta in got for token_id in delta.token_ids] == list(range(42))
    with pytest.raises(NoCapacity, match="the client is too slow: 42 tokens wait for it"):
        await anext(slow)
    assert await taken == TEN
    assert core.stats.replays == {}
    assert core.stats.failed_after_replays == 0


# --- through the API --------------------------------------------------------------------------------


async def test_an_answer_of_several_choices_with_a_stop_string_is_whole(
    client: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    """Text, logprobs, finish reasons and usage are those of an undisturbed run."""
    body = {"model": "scripted", "prompt": "a b", "max_tokens": 12, "n": 2, "logprobs": 1, "temperature": 0}
    undisturbed = (await client.post("/v1/completions", json=body)).json()
    text = undisturbed["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    for more in ({}, {"stop": stop}):
        expected = (await client.post("/v1/completions", json=body | more)).json()
        cluster.gates.close(3)
        asked = asyncio.create_task(client.post("/v1/completions", json=body | more))
        await cluster.gates.reached(3)
        victim = cluster.workers["decode-0"]
        victim.kill()
        cluster.gates.open(3)
        got = (await asked).json()
        assert got["choices"] == expected["choices"]
        assert got["usage"] == expected["usage"]
        await cluster.start_worker("decode-0", "decode", incarnation=victim.incarnation + 1)


async def test_replays_are_measured(client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(3)
    stream = core.submit(submission())
    await cluster.gates.reached(3)
    cluster.workers["decode-0"].kill()
    cluster.gates.open(3)
    assert await tokens_of(stream) == TEN
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'tandem_request_replays_total{reason="worker_unavailable"} 1.0' in lines
    assert "tandem_request_replay_seconds_count 1.0" in lines
    assert 'tandem_request_replay_seconds_bucket{le="+Inf"} 1.0' in lines
    assert "tandem_requests_failed_after_replays_total 0.0" in lines


def _error(stream: RequestStream, index: int, code: str) -> TokenDelta:
    return TokenDelta(
        request_id=stream.request_id, index=index, finish="error", error=ErrorInfo(code=code, message="cut")
    )
