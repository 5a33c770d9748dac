"""The decision table of replays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    ContextLengthExceeded,
    CorruptKv,
    DeadlineExceeded,
    IncompatiblePeer,
    Internal,
    InvariantBroken,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    TransferAborted,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.ids import WorkerId
from gateway.limits import GatewayLimits
from gateway.replay import Failure, GiveUp, History, Retry, Stage, decide

LIMITS = GatewayLimits(
    max_replays=3, replay_patience_s=30.0, dispatch_patience_s=5.0, replay_backoff_s=0.1, max_replay_backoff_s=1.0
)
NEW = History()
PLACED = History(was_placed=True)
RUNNING = History(was_placed=True, accepted=True)


def retried(history: History, stage: Stage, error: TandemError, now_s: float = 100.0) -> Retry | None:
    verdict = decide(history, Failure(stage, error), now_s, LIMITS)
    return verdict if isinstance(verdict, Retry) else None


@pytest.mark.parametrize(
    ("history", "stage", "error", "goes_on"),
    [
        # The coordinator.
        (NEW, Stage.UNANSWERED, NotReady("silent"), True),
        (RUNNING, Stage.UNANSWERED, NotReady("silent"), True),
        (NEW, Stage.REJECTED, NotReady("nobody"), False),
        (replace(NEW, since_s=99.0), Stage.REJECTED, NotReady("nobody yet"), True),
        (replace(NEW, since_s=99.0), Stage.REJECTED, NoCapacity("full"), False),
        (NEW, Stage.REJECTED, NoCapacity("full"), False),
        (NEW, Stage.REJECTED, ContextLengthExceeded("long"), False),
        (PLACED, Stage.REJECTED, NotReady("nobody left"), True),
        (PLACED, Stage.REJECTED, NoCapacity("full"), False),
        (RUNNING, Stage.REJECTED, NotReady("nobody left"), True),
        (RUNNING, Stage.REJECTED, NoCapacity("full"), True),
        (RUNNING, Stage.REJECTED, ContextLengthExceeded("only small workers are left"), True),
        # The chosen worker, before anything was started.
        (PLACED, Stage.UNSENT, WorkerUnavailable("refused"), True),
        (PLACED, Stage.UNSENT, StaleIncarnation("restarted"), True),
        (PLACED, Stage.UNSENT, DeadlineExceeded("silent"), True),
        (PLACED, Stage.REFUSED, NotReady("stopping"), True),
        (PLACED, Stage.REFUSED, StaleIncarnation("restarted"), True),
        (PLACED, Stage.REFUSED, NoCapacity("512 wait"), True),
        (replace(PLACED, num_refusals=1), Stage.REFUSED, NoCapacity("512 wait here too"), False),
        (replace(RUNNING, num_refusals=9), Stage.REFUSED, NoCapacity("512 wait"), True),
        (PLACED, Stage.REFUSED, BadRequest("token id"), False),
        # Lost on the way.
        (RUNNING, Stage.STARTED, WorkerUnavailable("killed"), True),
        (RUNNING, Stage.STARTED, StaleIncarnation("restarted"), True),
        (RUNNING, Stage.STARTED, TransferAborted("cut"), True),
        (RUNNING, Stage.STARTED, CorruptKv("checksum"), True),
        (RUNNING, Stage.STARTED, DeadlineExceeded("no answer to Prefill"), True),
        (RUNNING, Stage.STARTED, NotReady("stopping"), True),
        (RUNNING, Stage.STARTED, Internal("the step failed"), True),
        (RUNNING, Stage.STARTED, InvariantBroken("a bug"), True),
        (replace(RUNNING, num_failed_steps=1), Stage.STARTED, Internal("again"), False),
        (replace(RUNNING, num_failed_steps=1), Stage.STARTED, InvariantBroken("again"), False),
        (replace(RUNNING, num_failed_steps=1), Stage.STARTED, WorkerUnavailable("killed"), True),
        (RUNNING, Stage.STARTED, NoCapacity("the answer outgrew the worker"), False),
        (RUNNING, Stage.STARTED, BadRequest("bad"), False),
        (RUNNING, Stage.STARTED, Unauthorized("who"), False),
        (RUNNING, Stage.STARTED, IncompatiblePeer("other model"), False),
        (replace(RUNNING, num_replays=2), Stage.STARTED, WorkerUnavailable("killed"), True),
        (replace(RUNNING, num_replays=3), Stage.STARTED, WorkerUnavailable("killed"), False),
        # What was never started costs no replay.
        (replace(RUNNING, num_replays=3), Stage.UNSENT, WorkerUnavailable("refused"), True),
        (replace(RUNNING, num_replays=3), Stage.REJECTED, NotReady("nobody"), True),
    ],
)
def test_what_is_taken_up_again(history: History, stage: Stage, error: TandemError, goes_on: bool) -> None:
    assert (retried(history, stage, error) is not None) == goes_on


@pytest.mark.parametrize("kind", ERROR_BY_CODE.values())
@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("history", [NEW, PLACED, RUNNING])
def test_switched_off_every_failure_is_final(kind: type[TandemError], stage: Stage, history: History) -> None:
    """But where a worker does not take what was meant for it, as it drains or has another role by now."""
    error = kind("?")
    verdict = decide(history, Failure(stage, error), 0.0, GatewayLimits(max_replays=0))
    if (stage, kind) == (Stage.REFUSED, NotReady):
        assert isinstance(verdict, Retry)
        assert verdict.history.num_replays == history.num_replays
    else:
        assert verdict == GiveUp(error)


def test_who_is_sent_on_is_not_sent_on_for_ever() -> None:
    history, now_s, limits = NEW, 0.0, GatewayLimits(max_replays=0)
    refused = Failure(Stage.REFUSED, NotReady("it drains"))
    num_tries = 0
    while isinstance(verdict := decide(history, refused, now_s, limits), Retry):
        history, now_s, num_tries = verdict.history, now_s + verdict.delay_s, num_tries + 1
        assert num_tries < 1000
    assert now_s <= max(limits.dispatch_patience_s, limits.replay_patience_s)


def test_the_first_try_elsewhere_is_at_once_then_less_and_less_often() -> None:
    history, now_s, delays = RUNNING, 50.0, list[float]()
    while True:
        stage = Stage.UNSENT if delays else Stage.STARTED
        verdict = retried(history, stage, WorkerUnavailable("gone"), now_s)
        if verdict is None:
            break
        assert verdict.replay_reason == (None if delays else "worker_unavailable"), "one loss is one replay"
        delays.append(verdict.delay_s)
        history, now_s = verdict.history, now_s + verdict.delay_s
    assert delays[:7] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert 29.0 < sum(delays) <= 30.0
    assert history.num_replays == 1


def test_a_new_request_waits_shortly_for_the_coordinator() -> None:
    first = retried(NEW, Stage.UNANSWERED, NotReady("silent"), 0.0)
    assert first is not None
    assert first.replay_reason is None, "nothing was lost"
    assert retried(first.history, Stage.UNANSWERED, NotReady("silent"), 4.8) is not None
    verdict = decide(first.history, Failure(Stage.UNANSWERED, NotReady("silent")), 5.0, LIMITS)
    assert isinstance(verdict, GiveUp)
    assert verdict.error.message == "silent; nobody took the request up for 5 s"


WAKING = NotReady("a worker is being started", reason="waking")


@pytest.mark.parametrize("max_replays", [0, 3])
@pytest.mark.parametrize("history", [NEW, PLACED, RUNNING])
def test_a_worker_that_is_being_started_is_waited_for(history: History, max_replays: int) -> None:
    """Whether or not a failure would be: nothing has failed. Never at once, and for longer than a lost worker."""
    limits = replace(LIMITS, max_replays=max_replays, wake_patience_s=120.0)
    now_s, delays = 50.0, list[float]()
    while True:
        verdict = decide(history, Failure(Stage.REJECTED, WAKING), now_s, limits)
        if isinstance(verdict, GiveUp):
            break
        delays.append(verdict.delay_s)
        history, now_s = verdict.history, now_s + verdict.delay_s
    assert delays[:5] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.8])
    assert 118.0 < sum(delays) <= 120.0
    assert verdict.error.message.endswith("nobody took the request up for 120 s")
    assert history.num_replays == 0


def test_who_was_told_to_wait_for_a_worker_is_not_put_off_by_less() -> None:
    woken = retried(NEW, Stage.REJECTED, WAKING, 100.0)
    assert woken is not None
    for stage, error in ((Stage.REJECTED, NotReady("nobody yet")), (Stage.UNANSWERED, NotReady("silent"))):
        assert retried(woken.history, stage, error, 150.0) is not None
        assert retried(woken.history, stage, error, 221.0) is None
    assert retried(woken.history, Stage.REJECTED, NoCapacity("full"), 150.0) is None
    begun = woken.history.placed().taken_up()
    lost = retried(begun, Stage.STARTED, WorkerUnavailable("killed"), 500.0)
    assert lost is not None
    assert retried(lost.history, Stage.UNSENT, WorkerUnavailable("refused"), 531.0) is None, "that is over"


def test_only_the_coordinator_tells_of_workers_that_are_being_started() -> None:
    assert retried(NEW, Stage.UNANSWERED, WAKING, 100.0) is not None
    refused = Failure(Stage.REFUSED, NoCapacity("full", reason="waking"))
    assert isinstance(decide(replace(PLACED, num_refusals=1), refused, 0.0, LIMITS), GiveUp)


def test_patience_counts_from_the_loss_and_anew_after_each() -> None:
    lost = retried(RUNNING, Stage.STARTED, WorkerUnavailable("killed"), 100.0)
    assert lost is not None
    assert retried(lost.history, Stage.UNSENT, WorkerUnavailable("refused"), 129.0) is not None
    assert retried(lost.history, Stage.UNSENT, WorkerUnavailable("refused"), 131.0) is None
    again = lost.history.taken_up()
    assert retried(again, Stage.STARTED, WorkerUnavailable("killed"), 500.0) is not None
    assert again.num_replays == 1


def test_the_last_error_tells_what_was_tried() -> None:
    history = replace(RUNNING, num_replays=3, since_s=70.0)
    verdict = decide(history, Failure(Stage.REJECTED, NoCapacity("full", retry_after_s=2.5)), 101.0, LIMITS)
    assert isinstance(verdict, GiveUp)
    assert isinstance(verdict.error, NoCapacity)
    assert verdict.error.message == "full; nobody took the request up for 30 s; after 3 replays"
    assert verdict.error.retry_after_s == 2.5


def test_suspects_are_remembered_once_and_in_order() -> None:
    history = RUNNING
    for suspects in (("d0",), ("p0", "d0"), ("d0",)):
        failure = Failure(Stage.STARTED, WorkerUnavailable("gone"), tuple(WorkerId(name) for name in suspects))
        verdict = decide(history, failure, 1.0, LIMITS)
        assert isinstance(verdict, Retry)
        history = verdict.history
    assert history.avoid == ("d0", "p0")


@given(
    st.lists(
        st.tuples(st.sampled_from(Stage), st.sampled_from(sorted(ERROR_BY_CODE)), st.floats(0, 20), st.booleans()),
        max_size=60,
    ),
    st.integers(0, 4),
)
def test_whatever_fails_it_ends_within_the_bounds(
    failures: list[tuple[Stage, str, float, bool]], max_replays: int
) -> None:
    """Replays are counted, and nobody waits longer than the patience without a worker."""
    limits = replace(LIMITS, max_replays=max_replays)
    history, now_s = History(), 0.0
    for stage, code, after_s, was_taken_up in failures:
        if stage in (Stage.UNSENT, Stage.REFUSED, Stage.STARTED):
            history = history.placed()
        if was_taken_up and stage is Stage.STARTED:
            history = history.taken_up()
        now_s += after_s
        verdict = decide(history, Failure(stage, ERROR_BY_CODE[code]("?")), now_s, limits)
        if isinstance(verdict, GiveUp):
            assert verdict.error.code == code
            return
        history = verdict.history
        assert history.num_replays <= max_replays
        assert history.num_failed_steps <= 1
        assert history.since_s is not None
        assert now_s + verdict.delay_s - history.since_s <= limits.replay_patience_s
        assert 0 <= verdict.delay_s <= limits.max_replay_backoff_s
