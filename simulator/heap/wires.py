"""KV on its way between workers: pulls that share the network interfaces of both ends.

A pull of so many bytes that is one of f at the busier of its two ends proceeds at `1 / transfer_s(bytes, f)` of
itself per second; f changes as others begin and end (processor sharing). So a pull with constant company takes
exactly what the model says. All announced blocks of a lease go in one pull: the windows of a live reader are not
modelled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contracts.latency import TransferModel
    from simulator.heap.events import EventHeap
    from simulator.heap.request import Request


class PullEnded(Protocol):
    def __call__(self, request: Request, num_blocks: int) -> None: ...


class Interface:
    """Of one worker: the pulls that it takes part in, in either direction."""

    __slots__ = ("flows",)

    def __init__(self) -> None:
        self.flows: dict[Flow, None] = {}


class Flow:
    """One pull under way."""

    __slots__ = (
        "active_flows",
        "done",
        "due_s",
        "num_blocks",
        "num_bytes",
        "on_ended",
        "rate",
        "request",
        "since_s",
        "source",
        "started_s",
        "target",
    )

    def __init__(
        self,
        source: Interface,
        target: Interface,
        request: Request,
        num_blocks: int,
        num_bytes: int,
        on_ended: PullEnded,
        now_s: float,
    ) -> None:
        self.source = source
        self.target = target
        self.request = request
        self.num_blocks = num_blocks
        self.num_bytes = num_bytes
        self.on_ended = on_ended
        self.started_s = now_s
        #: Share that was done at `since_s`; from then on it grows by `rate` a second.
        self.done = 0.0
        self.since_s = now_s
        self.rate = 0.0
        self.active_flows = 0
        #: When the heap looks at it next; not after its end.
        self.due_s = math.inf


class Wires:
    def __init__(self, heap: EventHeap, transfer: TransferModel, block_bytes: int) -> None:
        self._heap = heap
        self._transfer = transfer
        self.block_bytes = block_bytes
        #: Of all pulls that have ended.
        self.num_bytes = 0

    def pull(
        self, source: Interface, target: Interface, request: Request, num_blocks: int, on_ended: PullEnded
    ) -> Flow:
        """Starts a pull; `on_ended(request, num_blocks)` is called at its end."""
        num_bytes = num_blocks * self.block_bytes
        flow = Flow(source, target, request, num_blocks, num_bytes, on_ended, self._heap.now_s)
        source.flows[flow] = target.flows[flow] = None
        self._share(source)
        self._share(target)
        return flow

    def _share(self, end: Interface) -> None:
        """Sets the pace of every pull here whose company has changed."""
        now_s = self._heap.now_s
        for flow in end.flows:
            active_flows = max(len(flow.source.flows), len(flow.target.flows))
            if active_flows == flow.active_flows:
                continue
            flow.done += (now_s - flow.since_s) * flow.rate
            flow.since_s = now_s
            flow.active_flows = active_flows
            flow.rate = 1.0 / self._transfer.transfer_s(flow.num_bytes, active_flows)
            self._look_at_end(flow)

    def _look_at_end(self, flow: Flow) -> None:
        """A pull that became slower is found unfinished when it is looked at, and looked at again."""
        end_s = flow.since_s + max(0.0, 1.0 - flow.done) / flow.rate
        if end_s < flow.due_s:
            flow.due_s = end_s
            self._heap.at(end_s, self._look, (flow, end_s))

    def _look(self, seen: tuple[Flow, float]) -> None:
        flow, due_s = seen
        if due_s != flow.due_s:
            self._heap.overtaken()
            return
        flow.due_s = math.inf
        end_s = flow.since_s + max(0.0, 1.0 - flow.done) / flow.rate
        if end_s > due_s:
            self._heap.overtaken()
            self._look_at_end(flow)
            return
        del flow.source.flows[flow]
        del flow.target.flows[flow]
        self._share(flow.source)
        self._share(flow.target)
        self.num_bytes += flow.num_bytes
        flow.on_ended(flow.request, flow.num_blocks)
