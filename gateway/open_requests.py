"""The requests that a gateway's core has open, and what it knows of them without asking."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import (
    ConfigError,
    Internal,
    NoCapacity,
    NotFound,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from gateway import events as ev
from gateway.snapshot import OwnLoad

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable

    from contracts.ids import WorkerId
    from contracts.messages import Predicted
    from gateway.ownership import RequestMachine
    from gateway.stream import RequestStream
    from gateway.terms import Terms


@dataclass(slots=True)
class OpenRequest:
    """An open request: its machine, its reader's end, its timers."""

    machine: RequestMachine
    stream: RequestStream
    terms: Terms
    received_s: float
    deadline: asyncio.TimerHandle | None = None
    gap: asyncio.TimerHandle | None = None
    retry: asyncio.TimerHandle | None = None
    was_replayed: bool = False
    #: What happened and was not handled yet: an instruction may cause an event, which must not overtake the
    #: instructions after it.
    events: deque[ev.Event] = field(default_factory=deque[ev.Event])
    is_handling: bool = False

    @property
    def predicted(self) -> Predicted | None:
        """What was, where no failure came between."""
        placement = self.machine.placement
        return None if placement is None or self.was_replayed else placement.predicted

    def stop_gap_timer(self) -> None:
        if self.gap is not None:
            self.gap.cancel()
            self.gap = None

    def stop_timers(self) -> None:
        self.stop_gap_timer()
        for timer in (self.deadline, self.retry):
            if timer is not None:
                timer.cancel()
        self.deadline = self.retry = None


def own_loads(requests: Iterable[OpenRequest]) -> dict[WorkerId, OwnLoad]:
    """What is where, by worker."""
    loads: dict[WorkerId, OwnLoad] = {}
    for entry in requests:
        held = entry.machine.held
        if held is None:
            continue
        if held.is_read:
            where, load = held.decode, OwnLoad(running_decodes=1, context_tokens=held.num_tokens)
        else:
            where, load = held.prefill, OwnLoad(waiting_requests=1, pending_prompt_tokens=held.num_tokens)
        loads[where] = loads.get(where, OwnLoad()) + load
    return loads


def for_client(error: TandemError, who: str) -> TandemError:
    """Errors between our own processes must not look like the client's fault, nor show addresses."""
    if isinstance(error, NoCapacity):
        message = f"{who} is full: {error.message}"
        return NoCapacity(message, retry_after_s=error.retry_after_s, reason="full")
    if isinstance(error, Unauthorized | NotFound | ConfigError):
        return Internal(f"{who} refused the gateway ({error.code})")
    if isinstance(error, WorkerUnavailable):
        return WorkerUnavailable(f"{who} cannot be reached")
    if error.retryable:
        return type(error)(f"{who}: the call failed ({error.code})", retry_after_s=error.retry_after_s)
    return error
