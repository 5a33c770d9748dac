"""The core against a scripted cluster over real (in-memory) rpc: streams, failures, cancels, bounds."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import (
    DeadlineExceeded,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import Incarnation
from contracts.messages import Predicted, TtftTally
from contracts.requests import PhaseTimes, SamplingParams, TokenDelta
from gateway.core import GatewayCore, Submission
from gateway.limits import GatewayLimits
from gateway.terms import Terms
from tests.unit.gateway.conftest import QUICK, run_core

if TYPE_CHECKING:
    from gateway.stream import RequestStream
    from rpc import MemoryNetwork
    from tests.support.fake_backend import FakeCluster, Script, Stage


def submission(max_tokens: int = 5, deadline_s: float = 30.0) -> Submission:
    return Submission(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=max_tokens), deadline_s=deadline_s)


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


async def test_tokens_of_both_workers_arrive_in_order(core: GatewayCore, cluster: FakeCluster) -> None:
    stream = core.submit(submission())
    await stream.accepted()
    deltas = [delta async for delta in stream]
    assert [delta.index for delta in deltas] == [0, 1, 2, 3, 4]
    assert [delta.finish for delta in deltas] == [None] * 4 + ["length"]
    prefill = cluster.workers["prefill-0"].accepted[0]
    assert prefill.decode == cluster.workers["decode-0"].peer
    assert prefill.request.token_ids == (1, 2, 3)
    assert not core.num_open


@pytest.mark.parametrize("roles", [{"mixed-0": "mixed"}])
async def test_a_mixed_worker_does_both(core: GatewayCore, cluster: FakeCluster) -> None:
    assert await tokens_of(core.submit(submission())) == [0, 1, 2, 3, 4]


async def test_the_timeline_sums_to_the_measured_time(core: GatewayCore, script: Script) -> None:
    script.first_phases = PhaseTimes(queue_s=1.0, prefill_s=1e-5)
    stream = core.submit(submission())
    assert stream.timeline is None
    await tokens_of(stream)
    timeline = stream.timeline
    assert timeline is not None
    parts = timeline.gateway_us + timeline.queue_us + timeline.prefill_us
    assert parts + timeline.handoff_us + timeline.decode_us == timeline.total_us
    assert (timeline.prefill_us, timeline.num_output_tokens, timeline.outcome) == (10, 5, "length")
    assert (timeline.prefill_worker, timeline.decode_worker) == ("prefill-0", "decode-0")


async def test_requests_that_come_together_share_a_dispatch(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close("dispatch")
    streams = [core.submit(submission())]
    await cluster.gates.reached("dispatch")
    streams += [core.submit(submission()) for _ in range(100)]
    cluster.gates.open("dispatch")
    answers = await asyncio.gather(*map(tokens_of, streams))
    assert all(answer == [0, 1, 2, 3, 4] for answer in answers)
    assert [len(call.items) for call in cluster.dispatches] == [1, 64, 36]


async def test_what_became_of_the_accepted_goes_with_the_next_dispatch(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    def judged(ttft_target_s: float) -> Submission:
        return replace(submission(), terms=Terms(slo_class="a", ttft_target_s=ttft_target_s))

    await tokens_of(core.submit(judged(60.0)))
    script.predicted = Predicted(waited_s=0.0, queue_s=30.0, transfer_s=0.0, prefill_s=0.0, ttft_s=30.0, tpot_s=0.0)
    for each in (judged(60.0), judged(60.0), judged(1e-9), submission()):
        await tokens_of(core.submit(each))
    told = [call.outcomes for call in cluster.dispatches]
    half, none = TtftTally.of("a", 0.5, is_late=False), TtftTally.of("a", 1e9, is_late=True)
    assert told == [(), (), (half,), (half,), (none,)], "nothing was predicted of the first"


async def test_one_stream_per_worker_for_all_requests(core: GatewayCore, cluster: FakeCluster) -> None:
    await asyncio.gather(*(tokens_of(core.submit(submission())) for _ in range(10)))
    await asyncio.gather(*(tokens_of(core.submit(submission())) for _ in range(10)))
    assert [worker.num_streams for worker in cluster.workers.values()] == [1, 1]


@pytest.mark.parametrize(
    ("rejection", "kind"), [("not_ready", NotReady), ("no_capacity", NoCapacity), ("new_code", NoCapacity)]
)
async def test_a_rejection_is_raised_with_its_numbers(
    core: GatewayCore, script: Script, rejection: str, kind: type[TandemError]
) -> None:
    script.rejection = (rejection, "17 wait already", 2.5)
    stream = core.submit(submission())
    with pytest.raises(kind, match="17 wait already") as caught:
        await stream.accepted()
    assert caught.value.retry_after_s == 2.5


@pytest.mark.parametrize("roles", [{}])
async def test_a_dead_coordinator_means_not_ready(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.kill_coordinator()
    with pytest.raises(NotReady, match="the coordinator did not answer"):
        await core.submit(submission()).accepted()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (NoCapacity("17 wait", retry_after_s=3.0), NoCapacity, "prefill worker prefill-0 is full: 17 wait"),
        (StaleIncarnation("127.0.0.1:40001 restarted"), WorkerUnavailable, "the call failed"),
        (TandemError("odd"), TandemError, "odd"),
    ],
)
async def test_a_refusing_prefill_worker(
    core: GatewayCore, script: Script, error: TandemError, kind: type[TandemError], message: str
) -> None:
    script.prefill_error = error
    with pytest.raises(kind, match=message) as caught:
        await core.submit(submission()).accepted()
    assert "127.0.0.1" not in caught.value.message
    assert caught.value.retry_after_s == error.retry_after_s


@pytest.mark.parametrize("stage", ["dispatch", "prefill", 0, 1, 3])
async def test_cancel_at_every_stage_leaves_nothing_behind(
    core: GatewayCore, cluster: FakeCluster, stage: Stage
) -> None:
    cluster.gates.close(stage)
    stream = core.submit(submission())
    await cluster.gates.reached(stage)
    stream.cancel("the test says so")
    collected = await tokens_of(stream)
    assert collected == list(range(len(collected)))
    assert stream.timeline is not None
    assert stream.timeline.outcome == "cancelled"
    cluster.gates.open(stage)
    await core.wait_idle()
    if stage != "dispatch":
        async with asyncio.timeout(5):
            for worker in cluster.workers.values():
                await worker.wait_cancelled(stream.request_id)
    assert not cluster.workers["prefill-0"].num_answering


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_killed_worker_ends_its_requests_at_once(core: GatewayCore, cluster: FakeCluster, victim: str) -> None:
    cluster.gates.close(0 if victim == "prefill-0" else 2)
    streams = [core.submit(submission()) for _ in range(3)]
    await cluster.gates.reached(0 if victim == "prefill-0" else 2)
    await asyncio.gather(*(stream.accepted() for stream in streams))
    cluster.workers[victim].kill()
    for stream in streams:
        with pytest.raises(WorkerUnavailable, match=f"worker {victim} was lost"):
            await tokens_of(stream)
    survivor = next(worker for name, worker in cluster.workers.items() if name != victim)
    await survivor.wait_cancelled(streams[-1].request_id)


async def test_a_restarted_worker_serves_again(core: GatewayCore, cluster: FakeCluster) -> None:
    assert await tokens_of(core.submit(submission())) == [0, 1, 2, 3, 4]
    cluster.workers["decode-0"].kill()
    await cluster.start_worker("decode-0", "decode", incarnation=2)
    assert await tokens_of(core.submit(submission())) == [0, 1, 2, 3, 4]


async def test_a_newer_life_ends_the_requests_of_the_older(core: GatewayCore, cluster: FakeCluster) -> None:
    """The old life is not dead, only replaced: it was taken for dead and woke up."""
    cluster.gates.close(2)
    old = core.submit(submission())
    await cluster.gates.reached(2)
    await cluster.start_worker("decode-0", "decode", incarnation=2)
    new = core.submit(submission())
    with pytest.raises(WorkerUnavailable, match="it has restarted"):
        await tokens_of(old)
    cluster.gates.open(2)
    assert await tokens_of(new) == [0, 1, 2, 3, 4]


async def test_a_placement_on_a_life_that_is_over_is_refused(core: GatewayCore, cluster: FakeCluster) -> None:
    first = cluster.workers["decode-0"]
    await cluster.start_worker("decode-0", "decode", incarnation=2)
    await tokens_of(core.submit(submission()))
    cluster.workers["decode-0"] = first
    with pytest.raises(WorkerUnavailable):
        await core.submit(submission()).accepted()


async def test_a_missing_frame_is_a_lost_stream(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    stream = core.submit(submission())
    await cluster.gates.reached(2)
    worker = cluster.workers["decode-0"]
    worker.skip_frames(1)
    worker.send()
    worker.send()
    with pytest.raises(WorkerUnavailable, match=r"its stream failed \(internal\)"):
        await tokens_of(stream)


async def test_a_missing_token_fails_its_request_only(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    stream, other = core.submit(submission()), core.submit(submission())
    await cluster.gates.reached(2)
    cluster.workers["decode-0"].send(TokenDelta(request_id=stream.request_id, index=4, token_ids=(4,)))
    with pytest.raises(TandemError, match="output token 2 never arrived"):
        await tokens_of(stream)
    cluster.gates.open(2)
    assert await tokens_of(other) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limits", [GatewayLimits(max_buffered_tokens=100)])
async def test_a_slow_client_is_cancelled_and_others_go_on(core: GatewayCore, cluster: FakeCluster) -> None:
    slow, other = core.submit(submission(200)), core.submit(submission(100))
    assert len(await tokens_of(other)) == 100
    await cluster.workers["decode-0"].wait_cancelled(slow.request_id)
    with pytest.raises(NoCapacity, match="the client is too slow: 101 tokens wait"):
        await tokens_of(slow)


async def test_the_deadline_ends_a_request(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(1)
    stream = core.submit(submission(deadline_s=0.05))
    with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
        await tokens_of(stream)
    await cluster.workers["prefill-0"].wait_cancelled(stream.request_id)


async def test_forgotten_requests_are_cancelled_again(core: GatewayCore, cluster: FakeCluster) -> None:
    """A worker that still streams a request that ended: its Cancel was lost."""
    await tokens_of(core.submit(submission()))
    worker = cluster.workers["decode-0"]
    for index in range(3):
        worker.send(TokenDelta(request_id=worker.stray_id, index=index, token_ids=(1,)))
    await worker.wait_cancelled(worker.stray_id)
    await tokens_of(core.submit(submission()))
    assert core.stats.dropped_deltas == {"forgotten": 3}
    assert [key.request_id for key in worker.cancelled] == [worker.stray_id]


@pytest.mark.parametrize("limits", [GatewayLimits(max_open_requests=2)])
async def test_open_requests_are_bounded(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close("prefill")
    for _ in range(2):
        core.submit(submission())
    with pytest.raises(NoCapacity, match="2 requests are open"):
        core.submit(submission())
    cluster.gates.open("prefill")
    await core.wait_idle()
    assert await tokens_of(core.submit(submission())) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("limits", [GatewayLimits(max_waiting_dispatch=2)])
async def test_waiting_for_the_coordinator_is_bounded(core: GatewayCore, cluster: FakeCluster) -> None:
    for _ in range(2):
        core.submit(submission())
    with pytest.raises(NoCapacity, match="wait for the coordinator"):
        core.submit(submission())
    assert core.num_open == 2


async def test_stopping_ends_requests_and_tells_workers(network: MemoryNetwork, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    async with run_core(network, cluster, QUICK) as core:
        stream = core.submit(submission())
        await cluster.gates.reached(2)
    with pytest.raises(NotReady, match="the gateway is stopping"):
        await tokens_of(stream)
    assert [key.request_id for key in cluster.workers["decode-0"].cancelled] == [stream.request_id]
    with pytest.raises(NotReady):
        core.submit(submission())


async def test_leaving_the_stream_cancels_it(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(2)
    async with core.submit(submission()) as stream:
        await cluster.gates.reached(2)
    await cluster.workers["decode-0"].wait_cancelled(stream.request_id)


async def test_members_are_the_coordinators(core: GatewayCore, cluster: FakeCluster) -> None:
    assert [member.info.worker_id for member in await core.members()] == ["prefill-0", "decode-0"]


async def test_a_worker_of_another_life_at_the_address_is_stale(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.workers["decode-0"].incarnation = Incarnation(9)
    with pytest.raises(WorkerUnavailable):
        await core.submit(submission()).accepted()


async def test_the_books_are_readable(core: GatewayCore) -> None:
    stream = core.submit(submission())
    assert repr(core) == "<GatewayCore gw [1 open | 1 submitted]>"
    await tokens_of(stream)
    assert repr(core) == "<GatewayCore gw [0 open | 1 submitted]>"
