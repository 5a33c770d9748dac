"""Pulls that share an interface: when they end."""

from __future__ import annotations

import pytest

from contracts.transfer_models import LinkTransfer
from simulator.heap.events import EventHeap
from simulator.heap.request import Request
from simulator.heap.wires import Interface, Wires

#: A block takes a second on an idle wire.
WIRE = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=100.0)


class Transfers:
    def __init__(self, transfer: LinkTransfer = WIRE) -> None:
        self.heap = EventHeap()
        self.wires = Wires(self.heap, transfer, block_bytes=100)
        self.ended: dict[int, float] = {}

    def pull(self, name: int, at_s: float, source: Interface, target: Interface, num_blocks: int) -> None:
        request = Request(name, 0.0, 1, 1, 0.0)

        def start(_: None) -> None:
            self.wires.pull(source, target, request, num_blocks, self._note)

        self.heap.at(at_s, start, None)

    def _note(self, request: Request, num_blocks: int) -> None:
        assert num_blocks
        self.ended[request.row] = self.heap.now_s


def test_alone_a_pull_takes_what_the_model_says() -> None:
    transfers = Transfers(LinkTransfer(latency_s=0.25, bandwidth_bytes_s=100.0))
    transfers.pull(0, 1.0, Interface(), Interface(), 3)
    transfers.heap.run()
    assert transfers.ended == {0: pytest.approx(4.25)}
    assert transfers.wires.num_bytes == 300
    assert transfers.heap.num_events == 2


@pytest.mark.parametrize("shared_end", ["source", "target"])
def test_pulls_at_one_end_share_it(shared_end: str) -> None:
    shared, others = Interface(), [Interface(), Interface()]
    transfers = Transfers()
    for name, other in enumerate(others):
        ends = (shared, other) if shared_end == "source" else (other, shared)
        # The first has 3 s to itself; from then on both have half: it needs 2 s for its last second, and the other
        # is half way through when the wire is its own again.
        transfers.pull(name, 3.0 * name, *ends, num_blocks=4 if name == 0 else 2)
    transfers.heap.run()
    assert transfers.ended == {0: pytest.approx(5.0), 1: pytest.approx(6.0)}


def test_pulls_between_other_workers_do_not_matter() -> None:
    transfers = Transfers()
    for name in range(3):
        transfers.pull(name, 0.5 * name, Interface(), Interface(), 2)
    transfers.heap.run()
    assert transfers.ended == {name: pytest.approx(2.0 + 0.5 * name) for name in range(3)}


def test_the_busier_end_counts() -> None:
    """Three pulls leave one worker, one of them to a worker that has no other."""
    transfers = Transfers()
    source = Interface()
    for name in range(3):
        transfers.pull(name, 0.0, source, Interface(), 1)
    transfers.heap.run()
    assert transfers.ended == {name: pytest.approx(3.0) for name in range(3)}
