"""One request's machine: what the client sees is each token once, in order, and every end is clean."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeVar

import msgspec
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
from contracts.messages import Peer, Placement, RequestKey
from contracts.requests import (
    ErrorInfo,
    GenerateRequest,
    SamplingParams,
    TokenDelta,
)
from gateway import events as ev
from gateway.limits import GatewayLimits
from gateway.ownership import Phase, RequestMachine

if TYPE_CHECKING:
    from contracts.requests import FinishReason

InstructionT = TypeVar("InstructionT", bound=ev.Instruction)

PREFILL = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(1), address="p:1")
DECODE = Peer(worker_id=WorkerId("d"), incarnation=Incarnation(2), address="d:1")
ID = RequestId("r")


#: Failures end a request: what is not about replays.
OFF = GatewayLimits(max_replays=0)
ONE = Attempt(1)


def machine(limits: GatewayLimits = OFF) -> RequestMachine:
    request = GenerateRequest(
        request_id=ID,
        gateway_id=GatewayId("g"),
        token_ids=(1, 2, 3),
        num_prompt_tokens=3,
        sampling=SamplingParams(max_tokens=100),
        deadline_s=10.0,
    )
    return RequestMachine(request, received_s=0.0, limits=limits)


def placement(prefill: Peer = PREFILL, decode: Peer = DECODE) -> Placement:
    return Placement(request_id=ID, prefill=prefill, decode=decode, reason="test")


def streaming(prefill: Peer = PREFILL, decode: Peer = DECODE, limits: GatewayLimits = OFF) -> RequestMachine:
    request = machine(limits)
    for event in (ev.Placed(placement(prefill, decode)), ev.StreamsOpened(ONE), ev.PrefillAccepted(ONE)):
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


def received(part: TokenDelta, peer: Peer = DECODE) -> ev.Received:
    return ev.Received(peer, part)


def life(peer: Peer, incarnation: int) -> Peer:
    return msgspec.structs.replace(peer, incarnation=Incarnation(incarnation))


def delivered(instructions: list[ev.Instruction]) -> list[int]:
    return [
        token_id
        for instruction in instructions
        if isinstance(instruction, ev.Deliver)
        for token_id in instruction.delta.token_ids
    ]


def end_of(instructions: list[ev.Instruction]) -> ev.End:
    ends = [instruction for instruction in instructions if isinstance(instruction, ev.End)]
    assert len(ends) == 1
    return ends[0]


def cancels_of(instructions: list[ev.Instruction]) -> list[ev.SendCancel]:
    return [instruction for instruction in instructions if isinstance(instruction, ev.SendCancel)]


def test_the_way_of_a_request() -> None:
    request = machine()
    item = request.dispatch_item(0.0)
    assert (item.prompt_tokens, item.max_tokens, item.avoid) == (3, 100, ())
    assert request.handle(ev.Placed(placement()), 1.0) == [ev.OpenStreams(ONE, placement())]
    sent = msgspec.structs.replace(request.request, deadline_s=8.0)
    assert request.handle(ev.StreamsOpened(ONE), 2.0) == [ev.SendPrefill(placement(), sent)]
    assert request.handle(ev.PrefillAccepted(ONE), 3.0) == [ev.Accept()]
    first = delta(0, 7)
    assert request.handle(received(first, PREFILL), 4.0) == [ev.Deliver(first)]
    out = request.handle(received(delta(1, 8, finish="length")), 5.0)
    assert delivered(out) == [8]
    end = end_of(out)
    assert end.error is None
    assert (end.timeline.outcome, end.timeline.num_output_tokens) == ("length", 2)
    assert (end.timeline.total_us, end.timeline.gateway_us) == (5_000_000, 2_000_000)
    assert request.over
    assert not cancels_of(out)


def test_tokens_may_overtake_the_answer_to_prefill() -> None:
    request = machine()
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    first = delta(0, 7)
    assert request.handle(received(first, PREFILL), 2.0) == [ev.Accept(), ev.Deliver(first)]
    assert request.handle(ev.PrefillAccepted(ONE), 2.0) == []
    assert request.phase is Phase.STREAMING


@pytest.mark.parametrize("limits", [OFF, GatewayLimits()])
def test_a_lost_answer_to_prefill_does_not_matter_once_tokens_came(limits: GatewayLimits) -> None:
    request = machine(limits)
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    request.handle(received(delta(0, 7), PREFILL), 2.0)
    assert request.handle(ev.PrefillFailed(ONE, DeadlineExceeded("no answer")), 6.0) == []
    assert delivered(request.handle(received(delta(1, 8, finish="length")), 7.0)) == [8]


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


@pytest.mark.parametrize(
    ("part", "peer", "reason"),
    [
        (delta(0, 1, attempt=2), DECODE, "attempt"),
        (delta(0, 1, owner_epoch=2), DECODE, "owner_epoch"),
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
    assert request.handle(received(delta(1, 8)), 2.0) == [ev.StartGapTimer()]
    out = request.handle(ev.GapExpired(), 5.0)
    assert isinstance(end_of(out).error, TransferAborted)
    assert "output token 0 never arrived" in str(end_of(out).error)
    assert cancels_of(out)[0].peers == (PREFILL, DECODE)


def test_a_filled_gap_stops_its_timer() -> None:
    request = streaming()
    request.handle(received(delta(1, 8)), 2.0)
    out = request.handle(received(delta(0, 7), PREFILL), 2.1)
    assert delivered(out) == [7, 8]
    assert out[-1] == ev.StopGapTimer()


def test_tokens_beyond_a_gap_are_bounded() -> None:
    request = streaming(limits=GatewayLimits(max_replays=0, max_early_tokens=3))
    assert not request.over
    request.handle(received(delta(1, 1, 2, 3)), 2.0)
    assert isinstance(end_of(request.handle(received(delta(4, 4)), 2.0)).error, TransferAborted)


@pytest.mark.parametrize(("peer", "role"), [(PREFILL, "prefill"), (DECODE, "decode")])
def test_a_lost_worker_ends_the_request_and_is_named(peer: Peer, role: str) -> None:
    request = streaming()
    out = request.handle(ev.WorkerLost(peer, "its stream ended"), 2.0)
    error = end_of(out).error
    assert isinstance(error, WorkerUnavailable)
    assert f"{role} worker {peer.worker_id}" in error.message
    assert len(cancels_of(out)) == 1


def test_a_lost_prefill_worker_does_not_matter_once_decoding() -> None:
    request = streaming()
    request.handle(received(delta(0, 1), PREFILL), 2.0)
    request.handle(received(delta(1, 2)), 2.0)
    assert request.handle(ev.WorkerLost(PREFILL, "killed"), 2.0) == []
    assert end_of(request.handle(ev.WorkerLost(DECODE, "killed"), 2.0)).error


def test_another_life_of_a_worker_does_not_matter() -> None:
    request = streaming()
    assert request.handle(ev.WorkerLost(life(DECODE, 1), "killed"), 2.0) == []


def test_a_mixed_worker_is_told_once() -> None:
    request = streaming(PREFILL, PREFILL)
    out = request.handle(ev.CancelAsked("gone"), 2.0)
    assert cancels_of(out) == [ev.SendCancel((PREFILL,), request.key, "gone")]


def test_cancelling_before_prefill_is_sent_tells_nobody() -> None:
    for events in ([], [ev.Placed(placement())]):
        request = machine()
        for event in events:
            request.handle(event, 1.0)
        out = request.handle(ev.CancelAsked("gone"), 2.0)
        assert end_of(out).error is None
        assert not cancels_of(out)
        assert request.over


@pytest.mark.parametrize(
    ("answer", "cancels"),
    [
        (ev.PrefillAccepted(ONE), True),
        (ev.PrefillFailed(ONE, DeadlineExceeded("no answer")), True),
        (ev.PrefillFailed(ONE, NoCapacity("full")), False),
    ],
)
def test_cancel_never_overtakes_prefill(answer: ev.Event, cancels: bool) -> None:
    request = machine()
    for event in (ev.Placed(placement()), ev.StreamsOpened(ONE)):
        request.handle(event, 1.0)
    out = request.handle(ev.CancelAsked("gone"), 2.0)
    assert end_of(out).error is None
    assert not cancels_of(out)
    assert not request.over
    assert bool(cancels_of(request.handle(answer, 3.0))) == cancels
    assert request.over


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (ev.Refused(NotReady("none")), NotReady),
        (ev.DeadlinePassed(10.0), DeadlineExceeded),
        (ev.Overflowed(3000), NoCapacity),
        (ev.Failed(NotReady("stopping")), NotReady),
        (received(delta(0, finish="cancelled")), WorkerUnavailable),
        (received(delta(0, finish="error", error=ErrorInfo(code="no_capacity", message="full"))), NoCapacity),
        (received(delta(3, finish="error", error=ErrorInfo(code="odd", message="?"))), Internal),
        (received(delta(0, finish="error")), Internal),
    ],
)
def test_failures_end_the_request_once(event: ev.Event, kind: type[TandemError]) -> None:
    request = streaming()
    out = request.handle(event, 2.0)
    assert type(end_of(out).error) is kind
    assert cancels_of(out)
    assert request.handle(event, 2.0) == []


def test_a_gap_timer_that_runs_out_late_means_nothing() -> None:
    assert streaming().handle(ev.GapExpired(), 2.0) == []


# --- replays ----------------------------------------------------------------------------------------

ON = GatewayLimits()
TWO = Attempt(2)
PREFILL2 = Peer(worker_id=WorkerId("p2"), incarnation=Incarnation(1), address="p2:1")
DECODE2 = Peer(worker_id=WorkerId("d2"), incarnation=Incarnation(1), address="d2:1")


def only(instructions: list[ev.Instruction], kind: type[InstructionT]) -> InstructionT:
    found = [instruction for instruction in instructions if isinstance(instruction, kind)]
    assert len(found) == 1, instructions
    return found[0]


def replayed(num_delivered: int = 3) -> RequestMachine:
    """Lost its decode worker after some tokens, and was sent to two others."""
    request = streaming(limits=ON)
    request.handle(received(delta(0, 7), PREFILL), 2.0)
    for index in range(1, num_delivered):
        request.handle(received(delta(index, 7 + index)), 2.0)
    request.handle(ev.WorkerLost(DECODE, "its stream ended"), 3.0)
    request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 3.0)
    request.handle(ev.StreamsOpened(TWO), 3.0)
    return request


def test_a_replay_is_a_new_attempt_with_what_was_delivered() -> None:
    request = streaming(limits=ON)
    for part, peer in ((delta(0, 7), PREFILL), (delta(1, 8), DECODE), (delta(3, 99), DECODE)):
        request.handle(received(part, peer), 2.0)
    out = request.handle(ev.WorkerLost(DECODE, "its stream ended"), 4.0)
    assert only(out, ev.SendCancel).peers == (PREFILL, DECODE)
    assert only(out, ev.SendCancel).key == RequestKey(ID, ONE)
    note = only(out, ev.NoteReplay)
    assert (note.reason, note.suspects, note.num_delivered) == ("worker_unavailable", ("d",), 2)
    assert only(out, ev.StopGapTimer)
    item = only(out, ev.AskPlacement).item
    assert (item.prompt_tokens, item.max_tokens, item.avoid) == (5, 98, ("d",))
    assert not [each for each in out if isinstance(each, ev.End)]
    request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 4.0)
    sent = only(request.handle(ev.StreamsOpened(TWO), 5.0), ev.SendPrefill).request
    assert (sent.token_ids, sent.num_prompt_tokens) == ((1, 2, 3, 7, 8), 3)
    assert (sent.attempt, sent.owner_epoch, sent.deadline_s) == (2, 2, 5.0)
    assert request.handle(ev.PrefillAccepted(TWO), 5.0) == [], "the client was told once"
    part = delta(2, 9, attempt=2, owner_epoch=2)
    assert request.handle(received(part, PREFILL2), 6.0) == [ev.NoteResumed(2.0), ev.Deliver(part)]
    out = request.handle(received(delta(3, 10, attempt=2, owner_epoch=2, finish="length"), DECODE2), 7.0)
    assert delivered(out) == [10], "the early token of the first try was thrown away"
    timeline = end_of(out).timeline
    assert (timeline.num_replays, timeline.num_output_tokens, timeline.prefill_worker) == (1, 4, "p2")
    phases = ("gateway_us", "queue_us", "prefill_us", "handoff_us", "decode_us")
    assert sum(getattr(timeline, phase) for phase in phases) == timeline.total_us == 7_000_000


def test_what_an_earlier_try_still_says_is_dropped_and_answered() -> None:
    request = replayed()
    out = request.handle(received(delta(3, 50), DECODE), 4.0)
    assert out == [ev.AnswerStray(DECODE, RequestKey(ID, ONE))]
    assert request.handle(received(delta(3, 50, finish="length"), DECODE), 4.0) == [], "it has stopped"
    failed = delta(3, finish="error", error=ErrorInfo(code="worker_unavailable", message="stopping"))
    assert request.handle(received(failed, DECODE), 4.0) == []
    assert request.dropped == {"attempt": 3}


def test_the_end_does_not_silence_the_answers_to_strays() -> None:
    request = replayed()
    request.handle(ev.CancelAsked("gone"), 4.0)
    assert request.handle(received(delta(3, 50), DECODE), 4.0) == [ev.AnswerStray(DECODE, RequestKey(ID, ONE))]
    assert request.handle(received(delta(3, 50, attempt=2, owner_epoch=2), DECODE2), 4.0) == []


@pytest.mark.parametrize(
    ("event", "suspects"),
    [
        (ev.WorkerLost(PREFILL, "killed"), ("p",)),
        (ev.WorkerLost(DECODE, "killed"), ("d",)),
        (received(delta(1, finish="error", error=ErrorInfo(code="transfer_aborted", message="cut"))), ("p", "d")),
        (received(delta(1, finish="error", error=ErrorInfo(code="internal", message="step")), PREFILL), ("p",)),
        (received(delta(1, finish="cancelled")), ("d",)),
    ],
)
def test_who_is_avoided(event: ev.Event, suspects: tuple[str, ...]) -> None:
    request = streaming(limits=ON)
    request.handle(received(delta(0, 7), PREFILL), 2.0)
    assert only(request.handle(event, 3.0), ev.AskPlacement).item.avoid == suspects


def test_a_gap_that_stays_is_replayed_without_either_worker() -> None:
    request = streaming(limits=ON)
    request.handle(received(delta(1, 8)), 2.0)
    assert only(request.handle(ev.GapExpired(), 5.0), ev.AskPlacement).item.avoid == ("p", "d")


def test_a_prefill_worker_that_handed_off_may_fail() -> None:
    """Its lease ran out because the acknowledgement was lost: the answer goes on elsewhere."""
    request = streaming(limits=ON)
    request.handle(received(delta(0, 7), PREFILL), 2.0)
    request.handle(received(delta(1, 8)), 2.0)
    failed = delta(1, finish="error", error=ErrorInfo(code="transfer_aborted", message="lease expired"))
    assert request.handle(received(failed, PREFILL), 3.0) == []
    assert request.dropped == {"handed_off": 1}


def test_a_prefill_worker_is_needed_until_its_token_is_here() -> None:
    request = streaming(limits=ON)
    request.handle(received(delta(1, 8)), 2.0)
    assert only(request.handle(ev.WorkerLost(PREFILL, "killed"), 2.0), ev.NoteReplay).suspects == ("p",)


def test_after_a_replay_the_new_prefill_worker_is_needed_again() -> None:
    request = replayed(num_delivered=3)
    request.handle(ev.PrefillAccepted(TWO), 3.0)
    request.handle(received(delta(3, 10, attempt=2, owner_epoch=2), PREFILL2), 4.0)
    assert only(request.handle(ev.WorkerLost(PREFILL2, "killed"), 4.0), ev.NoteReplay)


def test_a_try_whose_prefill_is_under_way_is_cancelled_when_that_was_answered() -> None:
    request = machine(ON)
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    out = request.handle(ev.WorkerLost(DECODE, "killed"), 2.0)
    assert only(out, ev.AskPlacement)
    assert not cancels_of(out)
    request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 3.0)
    (cancel,) = request.handle(ev.PrefillAccepted(ONE), 3.0)
    assert isinstance(cancel, ev.SendCancel)
    assert (cancel.peers, cancel.key) == ((PREFILL, DECODE), RequestKey(ID, ONE))
    assert only(request.handle(ev.StreamsOpened(TWO), 3.0), ev.SendPrefill)


def test_a_late_answer_about_an_earlier_try_does_not_touch_the_current_one() -> None:
    request = machine(ON)
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsFailed(ONE, DECODE.worker_id, WorkerUnavailable("gone")), 1.0)
    request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 1.0)
    assert request.handle(ev.StreamsOpened(ONE), 1.0) == []
    assert request.handle(ev.StreamsFailed(ONE, DECODE.worker_id, WorkerUnavailable("gone")), 1.0) == []
    assert request.phase is Phase.OPENING


def test_a_worker_lost_before_anything_was_sent_costs_no_replay() -> None:
    request = machine(ON)
    request.handle(ev.Placed(placement()), 1.0)
    out = request.handle(ev.WorkerLost(DECODE, "killed"), 1.0)
    assert only(out, ev.AskPlacement).item.avoid == ("d",)
    assert not cancels_of(out)
    assert request.history.num_replays == 0


def test_nobody_up_is_waited_for() -> None:
    request = replayed()
    request.handle(ev.PrefillFailed(TWO, NotReady("stopping")), 4.0)
    assert request.phase is Phase.WAITING
    assert only(request.handle(ev.RetryDue(), 4.1), ev.AskPlacement).item.avoid == ("d", "p2")
    wait = only(request.handle(ev.Refused(NotReady("nobody")), 4.1), ev.RetryLater)
    assert wait.delay_s == pytest.approx(0.2)
    request.handle(ev.RetryDue(), 4.3)
    request.handle(ev.Placed(placement(PREFILL, DECODE2)), 4.3)
    attempt = request.key.attempt
    assert only(request.handle(ev.StreamsOpened(attempt), 4.4), ev.SendPrefill).request.attempt == attempt
    assert request.history.num_replays == 1, "only the one that was lost"


def test_while_waiting_only_the_deadline_and_the_client_end_it() -> None:
    for event, error in ((ev.DeadlinePassed(10.0), DeadlineExceeded), (ev.CancelAsked("gone"), None)):
        request = replayed()
        request.handle(ev.PrefillFailed(TWO, NotReady("stopping")), 4.0)
        assert request.handle(ev.WorkerLost(DECODE, "again"), 4.0) == []
        end = end_of(request.handle(event, 5.0))
        assert (type(end.error) if end.error else None) == error
        assert request.handle(ev.RetryDue(), 6.0) == []


@pytest.mark.parametrize("event", [ev.DeadlinePassed(1.0), ev.Overflowed(9), ev.Failed(NotReady("stopping"))])
def test_what_is_not_the_workers_fault_is_not_replayed(event: ev.Event) -> None:
    out = streaming(limits=ON).handle(event, 2.0)
    assert end_of(out).error is not None
    assert cancels_of(out)


def test_a_full_prefill_worker_is_passed_over_once_and_then_it_is_429() -> None:
    request = machine(ON)
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    out = request.handle(ev.PrefillFailed(ONE, NoCapacity("p is full", retry_after_s=3.0)), 1.0)
    assert only(out, ev.AskPlacement).item.avoid == ("p",)
    assert not cancels_of(out)
    request.handle(ev.Placed(placement(PREFILL2, DECODE)), 1.0)
    request.handle(ev.StreamsOpened(TWO), 1.0)
    error = end_of(request.handle(ev.PrefillFailed(TWO, NoCapacity("p2 is full", retry_after_s=2.0)), 1.0)).error
    assert isinstance(error, NoCapacity)
    assert (error.message, error.retry_after_s) == ("p2 is full", 2.0)


def test_the_only_prefill_worker_is_not_asked_again_when_it_is_full() -> None:
    request = machine(ON)
    request.handle(ev.Placed(placement()), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    request.handle(ev.PrefillFailed(ONE, NoCapacity("p is full", retry_after_s=3.0)), 1.0)
    error = end_of(request.handle(ev.Placed(placement()), 1.0)).error
    assert isinstance(error, NoCapacity)
    assert error.retry_after_s == 3.0


def test_a_replay_that_meets_a_full_cluster_waits() -> None:
    request = replayed()
    assert only(request.handle(ev.PrefillFailed(TWO, NoCapacity("full")), 4.0), ev.RetryLater)
    request.handle(ev.RetryDue(), 4.1)
    assert only(request.handle(ev.Refused(NoCapacity("all full")), 4.1), ev.RetryLater)
    request.handle(ev.RetryDue(), 4.3)
    assert only(request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 4.3), ev.OpenStreams)


EVENTS: list[ev.Event] = [
    received(delta(0, 1), PREFILL),
    received(delta(1, 2)),
    received(delta(2, finish="length")),
    received(delta(0, 1, attempt=2, owner_epoch=2), PREFILL),
    received(delta(1, 2, attempt=2, owner_epoch=2)),
    received(delta(2, finish="length", attempt=3, owner_epoch=3)),
    received(delta(1, finish="error", error=ErrorInfo(code="internal", message="step"))),
    ev.WorkerLost(PREFILL, "killed"),
    ev.WorkerLost(DECODE, "killed"),
    ev.GapExpired(),
    ev.DeadlinePassed(10.0),
    ev.Overflowed(3000),
    ev.CancelAsked("gone"),
]
NO_PLACE: list[ev.Event] = [
    ev.Refused(NoCapacity("full")),
    ev.Refused(NotReady("nobody")),
    ev.Unanswered(NotReady("silent")),
]
ERRORS = (NoCapacity("full"), NotReady("stopping"), WorkerUnavailable("gone"), DeadlineExceeded("late"))


def answers_to(instruction: ev.Instruction, data: st.DataObject) -> ev.Event | None:
    """What the shell answers, once."""
    error = data.draw(st.sampled_from(ERRORS))
    is_well = data.draw(st.booleans())
    match instruction:
        case ev.AskPlacement():
            return ev.Placed(placement()) if is_well else data.draw(st.sampled_from(NO_PLACE))
        case ev.RetryLater():
            return ev.RetryDue()
        case ev.OpenStreams(attempt):
            return ev.StreamsOpened(attempt) if is_well else ev.StreamsFailed(attempt, DECODE.worker_id, error)
        case ev.SendPrefill(_, request):
            accepted = ev.PrefillAccepted(request.attempt)
            return accepted if is_well else ev.PrefillFailed(request.attempt, error)
        case _:
            return None


@given(st.data(), st.integers(0, 3))
def test_every_history_ends_once_and_nothing_follows_the_end(data: st.DataObject, max_replays: int) -> None:
    """Also: only who may hold a try is told to forget it; no token comes twice or is left out."""
    request = machine(GatewayLimits(max_replays=max_replays))
    pending: list[ev.Event] = [ev.Placed(placement())]
    out: list[ev.Instruction] = []
    for _ in range(data.draw(st.integers(0, 25))):
        choices = [*pending, *EVENTS]
        event = choices[data.draw(st.integers(0, len(choices) - 1))]
        if event in pending:
            pending.remove(event)
        step = request.handle(event, 1.0)
        pending += [answer for each in step if (answer := answers_to(each, data)) is not None]
        out += step
    out += request.handle(ev.CancelAsked("the test is over"), 2.0)
    for event in pending:
        out += request.handle(event, 2.0)
    kinds = [type(instruction) for instruction in out]
    assert kinds.count(ev.End) == 1
    assert kinds.count(ev.Accept) <= 1
    assert set(kinds[kinds.index(ev.End) + 1 :]) <= {ev.SendCancel, ev.AnswerStray}
    assert request.over, "every call was answered"
    sent = [each.request.attempt for each in out if isinstance(each, ev.SendPrefill)]
    assert sent == sorted(set(sent)), "no attempt is sent twice"
    cancelled = [each.key.attempt for each in out if isinstance(each, ev.SendCancel)]
    assert len(cancelled) == len(set(cancelled))
    assert set(cancelled) <= set(sent)
    indexes = [each.delta.index for each in out if isinstance(each, ev.Deliver)]
    assert indexes == list(range(len(indexes)))
    assert request.history.num_replays <= max_replays
