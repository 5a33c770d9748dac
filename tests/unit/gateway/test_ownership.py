"""One request's machine: what the client sees is each token once, in order, and every end is clean."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import (
    DeadlineExceeded,
    Internal,
    NoCapacity,
    NotReady,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import Attempt, GatewayId, Incarnation, OwnerEpoch, RequestId, WorkerId
from contracts.messages import Peer, Placement
from contracts.requests import (
    ErrorInfo,
    GenerateRequest,
    SamplingParams,
    TokenDelta,
    TokenLogprobs,
)
from gateway import ownership as own

if TYPE_CHECKING:
    from contracts.requests import FinishReason

PREFILL = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(1), address="p:1")
DECODE = Peer(worker_id=WorkerId("d"), incarnation=Incarnation(2), address="d:1")
ID = RequestId("r")


def machine(max_early_tokens: int = 1000) -> own.RequestMachine:
    request = GenerateRequest(
        request_id=ID,
        gateway_id=GatewayId("g"),
        token_ids=(1, 2, 3),
        num_prompt_tokens=3,
        sampling=SamplingParams(max_tokens=100),
        deadline_s=10.0,
    )
    return own.RequestMachine(request, received_s=0.0, max_early_tokens=max_early_tokens)


def placement(prefill: Peer = PREFILL, decode: Peer = DECODE) -> Placement:
    return Placement(request_id=ID, prefill=prefill, decode=decode, reason="test")


def streaming(prefill: Peer = PREFILL, decode: Peer = DECODE) -> own.RequestMachine:
    request = machine()
    for event in (own.Placed(placement(prefill, decode)), own.StreamsOpened(), own.PrefillAccepted()):
        request.handle(event, 1.0)
    return request


def delta(
    index: int,
    *token_ids: int,
    finish: FinishReason | None = None,
    attempt: int = 1,
    owner_epoch: int = 1,
    error: ErrorInfo | None = None,
) -> TokenDelta:
    return TokenDelta(
        request_id=ID,
        attempt=Attempt(attempt),
        owner_epoch=OwnerEpoch(owner_epoch),
        index=index,
        token_ids=token_ids,
        finish=finish,
        error=error,
    )


def received(part: TokenDelta, peer: Peer = DECODE) -> own.Received:
    return own.Received(peer.worker_id, peer.incarnation, part)


def delivered(instructions: list[own.Instruction]) -> list[int]:
    return [
        token_id
        for instruction in instructions
        if isinstance(instruction, own.Deliver)
        for token_id in instruction.delta.token_ids
    ]


def end_of(instructions: list[own.Instruction]) -> own.End:
    ends = [instruction for instruction in instructions if isinstance(instruction, own.End)]
    assert len(ends) == 1
    return ends[0]


def cancels_of(instructions: list[own.Instruction]) -> list[own.SendCancel]:
    return [instruction for instruction in instructions if isinstance(instruction, own.SendCancel)]


def test_the_way_of_a_request() -> None:
    request = machine()
    assert request.handle(own.Placed(placement()), 1.0) == [own.OpenStreams(placement())]
    assert request.handle(own.StreamsOpened(), 2.0) == [own.SendPrefill(placement())]
    assert request.handle(own.PrefillAccepted(), 3.0) == [own.Accept()]
    first = delta(0, 7)
    assert request.handle(received(first, PREFILL), 4.0) == [own.Deliver(first)]
    out = request.handle(received(delta(1, 8, finish="length")), 5.0)
    assert delivered(out) == [8]
    end = end_of(out)
    assert end.error is None
    assert (end.timeline.outcome, end.timeline.num_output_tokens) == ("length", 2)
    assert (end.timeline.total_us, end.timeline.gateway_us) == (5_000_000, 2_000_000)
    assert request.over
    assert not cancels_of(out)


@given(data=st.data(), num_tokens=st.integers(1, 30))
def test_any_order_and_any_repeats_give_each_token_once(data: st.DataObject, num_tokens: int) -> None:
    """Pieces of the answer, overlapping and repeated, from two unordered streams."""
    starts = data.draw(st.lists(st.integers(0, num_tokens - 1), max_size=20))
    spans = [(start, data.draw(st.integers(start, num_tokens))) for start in starts]
    spans += [(index, index + 1) for index in range(num_tokens)]
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    rng.shuffle(spans)
    request = streaming()
    seen: list[int] = []
    for start, stop in spans:
        finish: FinishReason | None = "length" if stop == num_tokens else None
        seen += delivered(request.handle(received(delta(start, *range(start, stop), finish=finish)), 2.0))
        assert seen == list(range(len(seen)))
    assert seen == list(range(num_tokens))
    assert request.over


def test_logprobs_are_cut_with_their_tokens() -> None:
    request = streaming()
    request.handle(received(delta(0, 5)), 2.0)
    part = TokenDelta(request_id=ID, index=0, token_ids=(5, 6), logprobs=(TokenLogprobs(-1.0), TokenLogprobs(-2.0)))
    out = request.handle(received(part), 2.0)
    assert [instruction.delta for instruction in out if isinstance(instruction, own.Deliver)] == [
        TokenDelta(request_id=ID, index=1, token_ids=(6,), logprobs=(TokenLogprobs(-2.0),))
    ]


@pytest.mark.parametrize(
    ("part", "peer", "reason"),
    [
        (delta(0, 1, attempt=2), DECODE, "attempt"),
        (delta(0, 1, owner_epoch=0), DECODE, "owner_epoch"),
        (delta(0, 1), Peer(worker_id=WorkerId("x"), incarnation=Incarnation(1), address=""), "worker"),
        (delta(0, 1), Peer(worker_id=WorkerId("d"), incarnation=Incarnation(1), address=""), "worker"),
    ],
)
def test_tokens_of_others_are_dropped(part: TokenDelta, peer: Peer, reason: str) -> None:
    request = streaming()
    assert request.handle(received(part, peer), 2.0) == []
    assert request.dropped == {reason: 1}


def test_a_gap_is_waited_for_and_then_fails_the_request() -> None:
    request = streaming()
    assert request.handle(received(delta(1, 8)), 2.0) == [own.StartGapTimer()]
    out = request.handle(own.GapExpired(), 5.0)
    assert isinstance(end_of(out).error, TransferAborted)
    assert "output token 0 never arrived" in str(end_of(out).error)
    assert cancels_of(out)[0].peers == (PREFILL, DECODE)


def test_a_filled_gap_stops_its_timer() -> None:
    request = streaming()
    request.handle(received(delta(1, 8)), 2.0)
    out = request.handle(received(delta(0, 7), PREFILL), 2.1)
    assert delivered(out) == [7, 8]
    assert out[-1] == own.StopGapTimer()


def test_tokens_beyond_a_gap_are_bounded() -> None:
    request = machine(max_early_tokens=3)
    for event in (own.Placed(placement()), own.StreamsOpened(), own.PrefillAccepted()):
        request.handle(event, 1.0)
    assert not request.over
    request.handle(received(delta(1, 1, 2, 3)), 2.0)
    assert isinstance(end_of(request.handle(received(delta(4, 4)), 2.0)).error, TransferAborted)


@pytest.mark.parametrize(("peer", "role"), [(PREFILL, "prefill"), (DECODE, "decode")])
def test_a_lost_worker_ends_the_request_and_is_named(peer: Peer, role: str) -> None:
    request = streaming()
    out = request.handle(own.WorkerLost(peer.worker_id, peer.incarnation, "its stream ended"), 2.0)
    error = end_of(out).error
    assert isinstance(error, WorkerUnavailable)
    assert f"{role} worker {peer.worker_id}" in error.message
    assert len(cancels_of(out)) == 1


def test_a_lost_prefill_worker_does_not_matter_once_decoding() -> None:
    request = streaming()
    request.handle(received(delta(0, 1), PREFILL), 2.0)
    request.handle(received(delta(1, 2)), 2.0)
    assert request.handle(own.WorkerLost(PREFILL.worker_id, PREFILL.incarnation, "killed"), 2.0) == []
    assert end_of(request.handle(own.WorkerLost(DECODE.worker_id, DECODE.incarnation, "killed"), 2.0)).error


def test_another_life_of_a_worker_does_not_matter() -> None:
    request = streaming()
    assert request.handle(own.WorkerLost(DECODE.worker_id, Incarnation(1), "killed"), 2.0) == []


def test_a_mixed_worker_is_told_once() -> None:
    request = streaming(PREFILL, PREFILL)
    out = request.handle(own.CancelAsked("gone"), 2.0)
    assert cancels_of(out) == [own.SendCancel((PREFILL,), request.key, "gone")]


def test_cancelling_before_prefill_is_sent_tells_nobody() -> None:
    for events in ([], [own.Placed(placement())]):
        request = machine()
        for event in events:
            request.handle(event, 1.0)
        out = request.handle(own.CancelAsked("gone"), 2.0)
        assert end_of(out).error is None
        assert not cancels_of(out)
        assert request.over


@pytest.mark.parametrize(
    ("answer", "cancels"),
    [
        (own.PrefillAccepted(), True),
        (own.PrefillFailed(DeadlineExceeded("no answer")), True),
        (own.PrefillFailed(NoCapacity("full")), False),
    ],
)
def test_cancel_never_overtakes_prefill(answer: own.Event, cancels: bool) -> None:
    request = machine()
    for event in (own.Placed(placement()), own.StreamsOpened()):
        request.handle(event, 1.0)
    out = request.handle(own.CancelAsked("gone"), 2.0)
    assert end_of(out).error is None
    assert not cancels_of(out)
    assert not request.over
    assert bool(cancels_of(request.handle(answer, 3.0))) == cancels
    assert request.over


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (own.Refused(NotReady("none")), NotReady),
        (own.DeadlinePassed(10.0), DeadlineExceeded),
        (own.Overflowed(3000), NoCapacity),
        (own.Failed(NotReady("stopping")), NotReady),
        (received(delta(0, finish="cancelled")), WorkerUnavailable),
        (received(delta(0, finish="error", error=ErrorInfo(code="no_capacity", message="full"))), NoCapacity),
        (received(delta(3, finish="error", error=ErrorInfo(code="odd", message="?"))), Internal),
        (received(delta(0, finish="error")), Internal),
    ],
)
def test_failures_end_the_request_once(event: own.Event, kind: type[TandemError]) -> None:
    request = streaming()
    out = request.handle(event, 2.0)
    assert type(end_of(out).error) is kind
    assert cancels_of(out)
    assert request.handle(event, 2.0) == []


EVENTS: list[own.Event] = [
    own.Placed(placement()),
    own.Refused(NotReady("none")),
    own.StreamsOpened(),
    own.PrefillAccepted(),
    own.PrefillFailed(NoCapacity("full")),
    own.PrefillFailed(WorkerUnavailable("gone")),
    received(delta(0, 1), PREFILL),
    received(delta(1, 2)),
    received(delta(2, finish="length")),
    own.WorkerLost(DECODE.worker_id, DECODE.incarnation, "killed"),
    own.GapExpired(),
    own.DeadlinePassed(10.0),
    own.CancelAsked("gone"),
]


#: What the shell answers to each instruction, once; other events may come at any time.
ANSWERS: dict[type, tuple[type, ...]] = {
    own.OpenStreams: (own.StreamsOpened,),
    own.SendPrefill: (own.PrefillAccepted, own.PrefillFailed),
}
SOLICITED = (own.Placed, own.Refused, own.StreamsOpened, own.PrefillAccepted, own.PrefillFailed)


@given(st.lists(st.sampled_from(EVENTS), max_size=12))
def test_every_history_ends_at_most_once_and_nothing_follows_the_end(history: list[own.Event]) -> None:
    """Also: only who may hold the request is told to forget it."""
    request = machine()
    expected: tuple[type, ...] = (own.Placed, own.Refused)
    out: list[own.Instruction] = []
    for event in history:
        if isinstance(event, SOLICITED):
            if not isinstance(event, expected):
                continue
            expected = ()
        step = request.handle(event, 1.0)
        for instruction in step:
            expected = ANSWERS.get(type(instruction), expected)
        out += step
    kinds = [type(instruction) for instruction in out]
    assert kinds.count(own.End) <= 1
    assert kinds.count(own.SendCancel) <= kinds.count(own.End)
    if own.End in kinds:
        assert set(kinds[kinds.index(own.End) + 1 :]) <= {own.SendCancel}
    if own.SendCancel in kinds:
        assert own.SendPrefill in kinds[: kinds.index(own.SendCancel)]
