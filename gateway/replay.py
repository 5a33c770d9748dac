"""Whether a request that cannot go on is taken up again, how soon, and why not. Pure.

Two bounds hold together. A try that a worker may have started and that was lost costs work, and may have been
the request's own doing: there are at most `max_replays` of them. While nobody has the request (no worker is
up, the one that was chosen is gone or full) nothing is lost by asking again: that goes on, less and less
often, for `replay_patience_s`. The request's own deadline ends both.

Before a worker has had the request, a full cluster, or one in which it would miss its targets, is the client's
answer (429) at once: it knows better than we whether to ask again. Afterwards the answer has begun, and a full cluster
is waited for like any other hindrance.

A pool that is scaled to zero has no worker until a request comes. The coordinator then starts one and says so: for
that a request waits `wake_patience_s`, whether it has been placed before or not. However long the delay until the next
question: it is asked at once when the coordinator names a worker that it has not named before (`gateway.core`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from contracts.errors import (
    DeadlineExceeded,
    Internal,
    InvariantBroken,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)

if TYPE_CHECKING:
    from contracts.ids import WorkerId
    from gateway.limits import GatewayLimits

#: A rejection's reason while the worker that the request needs is being started.
WAKING = "waking"

#: Not the request's fault: another worker, or a later life of the same one, may finish it.
_OF_THE_WORKER = (WorkerUnavailable, StaleIncarnation, TransferAborted, DeadlineExceeded, NotReady)
#: A step that raises may be the request's own doing: it is tried once more.
_OF_A_STEP = (Internal, InvariantBroken)


class Stage(Enum):
    """How far a try had come when it failed."""

    #: The coordinator could not be asked.
    UNANSWERED = "unanswered"
    #: The coordinator had no place for it.
    REJECTED = "rejected"
    #: Placed, but nothing was sent: a chosen worker cannot reach us.
    UNSENT = "unsent"
    #: The prefill worker said no; it holds nothing.
    REFUSED = "refused"
    #: A worker may have started it; what it did is lost.
    STARTED = "started"


@dataclass(frozen=True, slots=True)
class Failure:
    stage: Stage
    error: TandemError
    #: Workers that the next try should go without, as long as there are others.
    suspects: tuple[WorkerId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What happened to one request so far."""

    #: A worker has had it: the client may have been told so.
    accepted: bool = False
    #: The coordinator found a place for it once.
    was_placed: bool = False
    #: A worker was being started for it, since nobody has the request.
    is_awaited: bool = False
    #: Tries that were started, lost, and taken up again.
    num_replays: int = 0
    #: Those among them whose step raised.
    num_failed_steps: int = 0
    #: Since when nobody has the request; None while somebody has, and before anything failed.
    since_s: float | None = None
    #: Failures since then.
    num_waits: int = 0
    #: Refusals for lack of room since then.
    num_refusals: int = 0
    #: Workers seen to fail with this request, oldest first.
    avoid: tuple[WorkerId, ...] = ()

    def placed(self) -> History:
        return self if self.was_placed else replace(self, was_placed=True)

    def taken_up(self) -> History:
        """A worker has the request (again)."""
        if self.accepted and self.since_s is None:
            return self
        return replace(self, accepted=True, is_awaited=False, since_s=None, num_waits=0, num_refusals=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Ask the coordinator (again), after `delay_s`."""

    history: History
    delay_s: float
    #: The error's code, when with this failure something placed was lost; None: still waiting.
    replay_reason: str | None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """What the client hears."""

    error: TandemError


def decide(history: History, failure: Failure, now_s: float, limits: GatewayLimits) -> Retry | GiveUp:
    """`history` is the request's before this failure."""
    is_started = failure.stage is Stage.STARTED
    is_waking = _is_waking(failure)
    # To wait for a worker is no replay, and neither is to go elsewhere when one does not take it any more: because it
    # drains, or has another role than when the request was placed.
    is_sent_on = failure.stage is Stage.REFUSED and isinstance(failure.error, NotReady)
    if not (is_waking or is_sent_on or (limits.max_replays and _may_go_on(history, failure))):
        return GiveUp(_final(failure.error, history))
    if is_started and history.num_replays >= limits.max_replays:
        return GiveUp(_final(failure.error, history))
    since_s = now_s if history.since_s is None else history.since_s
    # Nothing is lost that could be elsewhere at once.
    delay_s = _delay_s(max(1, history.num_waits) if is_waking else history.num_waits, limits)
    patience_s = _patience_s(history, limits, is_awaited=is_waking or history.is_awaited)
    if now_s + delay_s - since_s > patience_s:
        return GiveUp(_final(failure.error, history, f"nobody took the request up for {patience_s:g} s"))
    begins = history.was_placed and history.since_s is None
    return Retry(
        history=_after(history, failure, since_s),
        delay_s=delay_s,
        replay_reason=failure.error.code if begins or is_started else None,
    )


def _may_go_on(history: History, failure: Failure) -> bool:
    error = failure.error
    if failure.stage is Stage.UNANSWERED:
        return True
    if failure.stage is Stage.REJECTED:
        if isinstance(error, NoCapacity):
            return history.accepted
        # Placed once, so there was a worker for it, which may come back. A coordinator that did not answer
        # before may have restarted, and will know its workers in a moment.
        return history.was_placed or (isinstance(error, NotReady) and history.since_s is not None)
    if isinstance(error, NoCapacity):
        # Elsewhere there may be room. An answer that outgrew its worker is another matter.
        return failure.stage is Stage.REFUSED and (history.accepted or not history.num_refusals)
    if isinstance(error, _OF_A_STEP):
        return not history.num_failed_steps
    return isinstance(error, _OF_THE_WORKER)


def _patience_s(history: History, limits: GatewayLimits, *, is_awaited: bool) -> float:
    if not history.was_placed:
        return limits.wake_patience_s if is_awaited else limits.dispatch_patience_s
    return max(limits.replay_patience_s, limits.wake_patience_s) if is_awaited else limits.replay_patience_s


def _is_waking(failure: Failure) -> bool:
    return failure.stage is Stage.REJECTED and failure.error.reason == WAKING


def _delay_s(num_waits: int, limits: GatewayLimits) -> float:
    """Nothing before the first try elsewhere, then doubling."""
    if not num_waits:
        return 0.0
    return min(limits.replay_backoff_s * 2.0 ** min(num_waits - 1, 30), limits.max_replay_backoff_s)


def _after(history: History, failure: Failure, since_s: float) -> History:
    suspects = tuple(worker for worker in failure.suspects if worker not in history.avoid)
    return replace(
        history,
        num_replays=history.num_replays + (failure.stage is Stage.STARTED),
        num_failed_steps=history.num_failed_steps + _is_failed_step(failure),
        since_s=since_s,
        is_awaited=history.is_awaited or _is_waking(failure),
        num_waits=history.num_waits + 1,
        num_refusals=history.num_refusals + isinstance(failure.error, NoCapacity),
        avoid=history.avoid + suspects,
    )


def _is_failed_step(failure: Failure) -> bool:
    """Whatever a coordinator answered, or did not: nothing was computed."""
    is_the_coordinators = failure.stage in (Stage.UNANSWERED, Stage.REJECTED)
    return not is_the_coordinators and isinstance(failure.error, _OF_A_STEP)


def _final(error: TandemError, history: History, why: str = "") -> TandemError:
    """`error`, with what was tried before it."""
    parts = [error.message, why, f"after {history.num_replays} replays" if history.num_replays else ""]
    message = "; ".join(part for part in parts if part)
    if message == error.message:
        return error
    return type(error)(message, param=error.param, retry_after_s=error.retry_after_s, reason=error.reason)
