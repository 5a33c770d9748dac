"""Requests that move, against a scripted cluster over real (in-memory) rpc, up to what a client of the API sees."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from contracts.errors import WorkerUnavailable
from contracts.ids import Attempt, OwnerEpoch
from contracts.messages import ClaimVerdict, RequestKey
from contracts.requests import Claim, ErrorInfo, SamplingParams, TokenDelta
from gateway.claims import Outcome
from gateway.core import GatewayCore, Submission
from tests.unit.gateway import tokenizers_for_tests as small
from tests.unit.gateway.conftest import REPLAYING

if TYPE_CHECKING:
    import httpx

    from contracts.ids import RequestId
    from contracts.messages import Role
    from contracts.requests import GenerateRequest
    from gateway.limits import GatewayLimits
    from gateway.stream import RequestStream
    from tests.support.fake_backend import FakeCluster, FakeWorker, Script

TEN = list(range(10))
TWO = OwnerEpoch(2)


@pytest.fixture
def roles() -> dict[str, Role]:
    return {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode", "mixed-0": "mixed"}


@pytest.fixture
def limits() -> GatewayLimits:
    return REPLAYING


def submission(logprobs: int | None = None) -> Submission:
    sampling = SamplingParams(max_tokens=10, logprobs=logprobs)
    return Submission(token_ids=(1, 2, 3), sampling=sampling, deadline_s=60.0)


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


def claim(request_id: RequestId, num_outputs: int, *, reads: bool = False) -> Claim:
    return Claim(request_id=request_id, attempt=Attempt(1), owner_epoch=TWO, num_outputs=num_outputs, reads=reads)


def key(request_id: RequestId, owner_epoch: int = 2) -> RequestKey:
    return RequestKey(request_id, Attempt(1), OwnerEpoch(owner_epoch))


def last_request(cluster: FakeCluster) -> GenerateRequest:
    return cluster.workers["prefill-0"].accepted[-1].request


def owned_anew(request: GenerateRequest) -> GenerateRequest:
    return msgspec.structs.replace(request, owner_epoch=TWO)


async def granted_to(worker: FakeWorker, request_id: RequestId, num_outputs: int) -> ClaimVerdict:
    """Claims the request and returns what the gateway says."""
    await worker.wait_streams()
    num_before = sum(map(len, worker.verdicts))
    worker.claim(claim(request_id, num_outputs))
    return (await worker.wait_verdicts(num_before + 1))[-1]


async def test_streams_are_open_before_anything_is_placed(core: GatewayCore, cluster: FakeCluster) -> None:
    """A worker takes nobody in whose gateway it could not ask."""
    async with asyncio.timeout(5):
        for worker in cluster.workers.values():
            await worker.wait_streams()
    late = await cluster.start_worker("decode-2", "decode")
    await core.members()
    async with asyncio.timeout(5):
        await late.wait_streams()


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_a_move_is_not_noticed(core: GatewayCore, cluster: FakeCluster, logprobs: int | None) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission(logprobs))
    await cluster.gates.reached(4)
    source, destination = cluster.workers["decode-0"], cluster.workers["decode-1"]
    verdict = await granted_to(destination, stream.request_id, 4)
    assert verdict == ClaimVerdict(key=key(stream.request_id), granted=True, next_index=4)
    await source.wait_cancelled(stream.request_id)
    assert source.cancelled == [key(stream.request_id, 1)]
    # The former owner wakes up and writes on.
    source.send(TokenDelta(request_id=stream.request_id, index=4, token_ids=(77,)))
    destination.write_on(owned_anew(last_request(cluster)), 4)
    deltas = [delta async for delta in stream]
    assert [token_id for delta in deltas for token_id in delta.token_ids] == TEN
    assert [one.top[0].token_id for delta in deltas for one in delta.logprobs or ()] == (TEN if logprobs else [])
    timeline = stream.timeline
    assert timeline is not None
    assert (timeline.num_moves, timeline.num_replays, timeline.decode_worker) == (1, 0, "decode-1")
    assert timeline.as_json()["moves"] == 1
    assert core.stats.claims == {"granted": 1}
    assert core.stats.replays == {}
    assert sum(core.stats.move_gaps.counts) == 1


async def test_a_claim_that_overtakes_tokens_waits_for_them(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    source, destination = cluster.workers["decode-0"], cluster.workers["decode-1"]
    await destination.wait_streams()
    destination.claim(claim(stream.request_id, 6))
    # Refused at once: when this is answered, so would the other be.
    assert not (await granted_to(destination, source.stray_id, 0)).granted
    source.send(TokenDelta(request_id=stream.request_id, index=4, token_ids=(4, 5)))
    assert (await destination.wait_verdicts(2))[-1].next_index == 6
    destination.write_on(owned_anew(last_request(cluster)), 6)
    assert await tokens_of(stream) == TEN


async def test_a_source_that_dies_with_its_last_tokens_does_not_matter(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    source, destination = cluster.workers["decode-0"], cluster.workers["decode-1"]
    await destination.wait_streams()
    destination.claim(claim(stream.request_id, 6))
    assert not (await granted_to(destination, source.stray_id, 0)).granted
    source.kill()
    verdict = (await destination.wait_verdicts(2))[-1]
    assert verdict == ClaimVerdict(key=key(stream.request_id), granted=True, next_index=4)
    destination.write_on(owned_anew(last_request(cluster)), verdict.next_index)
    assert await tokens_of(stream) == TEN
    assert core.stats.replays == {}


async def test_a_destination_that_dies_after_the_grant_is_replayed(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    destination = cluster.workers["decode-1"]
    assert (await granted_to(destination, stream.request_id, 4)).granted
    destination.kill()
    cluster.gates.open(4)
    assert await tokens_of(stream) == TEN
    assert stream.timeline is not None
    assert (stream.timeline.num_moves, stream.timeline.num_replays) == (1, 1)
    assert last_request(cluster).owner_epoch == 3


async def test_a_destination_that_cannot_go_on_says_so(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    source, destination = cluster.workers["decode-0"], cluster.workers["decode-1"]
    assert (await granted_to(destination, stream.request_id, 4)).granted
    cut = ErrorInfo(code="transfer_aborted", message="cut")
    failed = TokenDelta(request_id=stream.request_id, index=4, finish="error", error=cut)
    # The former owner's failure means nothing any more, the new one's does.
    source.send(failed)
    destination.send(msgspec.structs.replace(failed, owner_epoch=TWO))
    cluster.gates.open(4)
    assert await tokens_of(stream) == TEN
    assert core.stats.replays == {"transfer_aborted": 1}


async def test_claims_that_come_together_are_answered_together(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    streams = [core.submit(submission()) for _ in range(3)]
    await asyncio.gather(*(stream.accepted() for stream in streams))
    for stream in streams:
        got = [await anext(stream) for _ in range(4)]
        assert [token_id for delta in got for token_id in delta.token_ids] == TEN[:4]
    worker = cluster.workers["decode-1"]
    known = [claim(stream.request_id, 4) for stream in streams]
    worker.claim(*known, claim(worker.stray_id, 0))
    await worker.wait_verdicts(4)
    (call,) = worker.verdicts
    assert [(verdict.key.request_id, verdict.granted) for verdict in call] == [
        *((stream.request_id, True) for stream in streams),
        (worker.stray_id, False),
    ]
    assert call[-1].reason == Outcome.FORGOTTEN.text
    assert core.stats.claims == {"granted": 3, "forgotten": 1}


async def test_a_lost_answer_is_given_again(core: GatewayCore, cluster: FakeCluster, script: Script) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    worker = cluster.workers["decode-1"]
    await worker.wait_streams()
    script.grant_error = WorkerUnavailable("reset")
    worker.claim(claim(stream.request_id, 4))
    await cluster.workers["decode-0"].wait_cancelled(stream.request_id)
    while not core.num_dropped_verdicts:  # noqa: ASYNC110 - it is lost in the core
        await asyncio.sleep(0.005)
    script.grant_error = None
    assert (await granted_to(worker, stream.request_id, 4)).granted
    assert core.stats.claims == {"granted": 1, "repeated": 1}


async def test_a_waiting_prompt_moves(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(0)
    stream = core.submit(submission())
    await cluster.gates.reached(0)
    await stream.accepted()
    source, destination = cluster.workers["prefill-0"], cluster.workers["mixed-0"]
    await destination.wait_streams()
    destination.claim(claim(stream.request_id, 0, reads=True))
    assert (await destination.wait_verdicts(1))[0].granted
    await source.wait_cancelled(stream.request_id)
    assert not source.num_answering
    destination.write_on(owned_anew(last_request(cluster)), 0)
    stream_tokens = asyncio.create_task(tokens_of(stream))
    assert await stream_tokens == TEN
    assert stream.timeline is not None
    assert stream.timeline.prefill_worker == "mixed-0"


async def test_moves_are_measured(client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    worker = cluster.workers["decode-1"]
    await granted_to(worker, worker.stray_id, 0)
    await granted_to(worker, stream.request_id, 4)
    worker.write_on(owned_anew(last_request(cluster)), 4)
    assert await tokens_of(stream) == TEN
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'tandem_requests_moved_total{result="granted"} 1.0' in lines
    assert 'tandem_requests_moved_total{result="forgotten"} 1.0' in lines
    assert "tandem_move_gap_seconds_count 1.0" in lines
    assert "tandem_dropped_verdicts_total 0.0" in lines


# --- through the API --------------------------------------------------------------------------------

TEXT = "héllo 日本 the 🚀 END of it"


@pytest.mark.parametrize("more", [{}, {"stop": "END"}, {"stop": "END", "include_stop_str_in_output": True}])
async def test_text_that_is_split_by_a_move_is_whole(
    client: httpx.AsyncClient, cluster: FakeCluster, script: Script, more: dict[str, Any]
) -> None:
    """At every token: in the midst of characters of several bytes, and of the stop string."""
    tokenizer = small.chat_tokenizer()
    reply = tokenizer.encode(TEXT + small.EOS, add_special_tokens=False)
    script.reply = lambda _: reply
    body = {"model": "scripted", "prompt": "a b", "max_tokens": 100, "logprobs": 1, "temperature": 0, **more}
    undisturbed = (await client.post("/v1/completions", json=body)).json()
    (expected,) = undisturbed["choices"]
    num_used = undisturbed["usage"]["completion_tokens"]
    cuts = range(1, num_used)
    texts = [b"".join(map(tokenizer.token_bytes, reply[:cut])).decode(errors="replace") for cut in cuts]
    assert sum(text.endswith("\ufffd") for text in texts) > 3, "some are within characters"
    assert not more or any(text.endswith(("E", "EN")) for text in texts), "and within the stop string"
    destination = cluster.workers["decode-1"]
    for cut in cuts:
        cluster.gates.forget(cut)
        cluster.gates.close(cut)
        asked = asyncio.create_task(client.post("/v1/completions", json=body))
        await cluster.gates.reached(cut)
        request = last_request(cluster)
        assert (await granted_to(destination, request.request_id, cut)).granted
        destination.write_on(owned_anew(request), cut)
        got = (await asked).json()
        assert got["choices"] == [expected]
        assert got["usage"] == undisturbed["usage"]
        # The former owner writes on to its end.
        cluster.gates.open(cut)
        while cluster.workers["prefill-0"].num_answering:  # noqa: ASYNC110 - its task ends by itself
            await asyncio.sleep(0)
