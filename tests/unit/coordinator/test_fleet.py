"""The columns follow reports and placements, whoever comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DispatchItem, Role, WorkerInfo, WorkerLoad
from coordinator.fleet import Fleet
from coordinator.policy.fleet_view import LARGEST_COUNT

GRACE_S = 0.25
NAMES = ["a", "b", "w-10", "w-2", "z"]


def info_of(name: str, role: Role = "mixed", fingerprint: str = "m") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(1),
        role=role,
        address=f"{name}:1",
        model="m",
        identity=KvIdentity(
            model_fingerprint=fingerprint,
            layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=8, dtype="float32"),
            rope_base=10000.0,
            protocol_version=1,
        ),
        total_blocks=10,
        max_context_tokens=64,
    )


def ask(prompt_tokens: int, max_tokens: int) -> DispatchItem:
    return DispatchItem(request_id=RequestId("r"), prompt_tokens=prompt_tokens, max_tokens=max_tokens)


def fleet_of(*infos: WorkerInfo) -> Fleet:
    fleet = Fleet(GRACE_S)
    for info in infos:
        fleet.add(info)
    return fleet


def test_rows_stand_in_order_of_worker_id() -> None:
    fleet = fleet_of(*(info_of(name) for name in reversed(NAMES)))
    assert [info.worker_id for info in fleet.view().infos] == NAMES
    assert [fleet.row_of(WorkerId(name)) for name in NAMES] == [0, 1, 2, 3, 4]
    assert len(fleet) == 5


def test_columns_tell_what_a_worker_is() -> None:
    view = fleet_of(info_of("p", "prefill", "old"), info_of("d", "decode", "new"), info_of("m", "mixed", "old")).view()
    assert [info.worker_id for info in view.infos] == ["d", "m", "p"]
    assert view.is_writer.tolist() == [True, False, False]
    assert view.is_mixed.tolist() == [False, True, False]
    assert view.can_read.tolist() == [False, True, True]
    assert view.kv_class[1] == view.kv_class[2] != view.kv_class[0]
    assert view.max_prompt_tokens.tolist() == [63, 63, 63], "one token of the answer must fit too"


def test_a_view_is_a_window_and_its_columns_are_read_only() -> None:
    fleet = fleet_of(info_of("w"))
    view = fleet.view()
    fleet.report(0, WorkerLoad(pending_prompt_tokens=3, context_tokens=5, waiting_requests=1), 0.0)
    fleet.book(ask(7, 2), 0, 0, 0.0)
    assert fleet.view() is view
    assert (view.prefill_load_tokens[0], view.decode_load_tokens[0], view.waiting_requests[0]) == (10, 14, 2)
    for column in (view.can_read, view.max_prompt_tokens, view.prefill_load_tokens, view.waiting_requests):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


def test_absurd_figures_count_as_very_many() -> None:
    fleet = fleet_of(info_of("w"))
    absurd = WorkerLoad(pending_prompt_tokens=2**64, context_tokens=2**64, waiting_requests=2**64)
    fleet.report(0, absurd, 0.0)
    fleet.book(ask(1, 2**64), 0, 0, 0.0)
    view = fleet.view()
    assert view.waiting_requests.tolist() == [LARGEST_COUNT + 1]
    assert view.prefill_load_tokens.tolist() == [LARGEST_COUNT + 1]
    assert view.decode_load_tokens.tolist() == [2 * LARGEST_COUNT]


def test_misuse_is_named() -> None:
    fleet = fleet_of(info_of("w"))
    with pytest.raises(ValueError, match="worker w is in the fleet already"):
        fleet.add(info_of("w"))
    for name in ("v", "x"):
        with pytest.raises(KeyError, match=name):
            fleet.row_of(WorkerId(name))
        with pytest.raises(KeyError, match=name):
            fleet.remove(WorkerId(name))


def test_who_was_read_counts_no_more() -> None:
    fleet = fleet_of(info_of("m"))
    view = fleet.view()
    others = msgspec.structs.replace(ask(30, 1), block_keys=b"another " * 3)
    unknown = msgspec.structs.replace(ask(20, 1), block_keys=b"block-a.")
    asked = msgspec.structs.replace(ask(20, 5), block_keys=b"block-a.block-b.")
    for placed in (others, asked, asked, unknown):
        fleet.book(placed, 0, 0, 1.0)
    # With 9 tokens that were there already, and two of these.
    fleet.report(0, WorkerLoad(pending_prompt_tokens=9 + 20 + 20, waiting_requests=2), 1.1)
    fleet.note_held(0, b"block-a.")
    assert (view.prefill_load_tokens[0], view.waiting_requests[0]) == (139, 6), "half of it is not all"
    fleet.note_held(0, b"block-a.block-b.block-c.")
    assert (view.prefill_load_tokens[0], view.waiting_requests[0]) == (9 + 50, 4)
    assert view.decode_load_tokens[0] == 31 + 2 * 25 + 21, "the answers are yet to be written"
    fleet.note_held(0, b"block-a.block-b.block-c.")
    assert view.prefill_load_tokens[0] == 9 + 50, "once, and not who has more blocks than are named"
    fleet.report(0, WorkerLoad(pending_prompt_tokens=4), 1.2)
    assert (view.prefill_load_tokens[0], view.waiting_requests[0]) == (54, 2)
    fleet.report(0, WorkerLoad(), 1.25)
    assert (view.prefill_load_tokens[0], view.decode_load_tokens[0], view.waiting_requests[0]) == (0, 0, 0)


@dataclass
class Known:
    """A worker as a list of what was said and placed."""

    load: WorkerLoad = field(default_factory=WorkerLoad)
    #: (time, prompt tokens, context tokens, requests), as long as no report contains it.
    bookings: list[tuple[float, int, int, int]] = field(default_factory=list[tuple[float, int, int, int]])

    def figures(self) -> tuple[int, int, int]:
        return (
            self.load.pending_prompt_tokens + sum(booking[1] for booking in self.bookings),
            self.load.context_tokens + sum(booking[2] for booking in self.bookings),
            self.load.waiting_requests + sum(booking[3] for booking in self.bookings),
        )


class FleetBesideLists(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.fleet = Fleet(GRACE_S)
        self.known: dict[str, Known] = {}

    @rule(name=st.sampled_from(NAMES))
    def comes_or_goes(self, name: str) -> None:
        if self.known.pop(name, None) is None:
            self.known[name] = Known()
            self.fleet.add(info_of(name))
        else:
            self.fleet.remove(WorkerId(name))

    @rule(passed=st.sampled_from([0.125, 0.25, 0.5]))
    def time_passes(self, passed: float) -> None:
        self.now_s += passed

    @precondition(lambda self: bool(self.known))
    @rule(data=st.data(), pending=st.integers(0, 9), context=st.integers(0, 9), waiting=st.integers(0, 9))
    def reports(self, data: st.DataObject, pending: int, context: int, waiting: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        worker = self.known[name]
        worker.load = WorkerLoad(pending_prompt_tokens=pending, context_tokens=context, waiting_requests=waiting)
        worker.bookings = [booking for booking in worker.bookings if booking[0] > self.now_s - GRACE_S]
        self.fleet.report(self.fleet.row_of(WorkerId(name)), worker.load, self.now_s)

    @precondition(lambda self: bool(self.known))
    @rule(data=st.data(), prompt_tokens=st.integers(1, 99), max_tokens=st.integers(1, 99))
    def is_given_a_request(self, data: st.DataObject, prompt_tokens: int, max_tokens: int) -> None:
        names = st.sampled_from(sorted(self.known))
        reader, writer = data.draw(names), data.draw(names)
        self.known[reader].bookings.append((self.now_s, prompt_tokens, 0, 1))
        self.known[writer].bookings.append((self.now_s, 0, prompt_tokens + max_tokens, 0))
        rows = [self.fleet.row_of(WorkerId(name)) for name in (reader, writer)]
        self.fleet.book(ask(prompt_tokens, max_tokens), rows[0], rows[1], self.now_s)

    @invariant()
    def columns_tell_the_same(self) -> None:
        view = self.fleet.view()
        columns = (view.prefill_load_tokens, view.decode_load_tokens, view.waiting_requests)
        told = zip(*(column.tolist() for column in columns), strict=True)
        assert {str(info.worker_id): figures for info, figures in zip(view.infos, told, strict=True)} == {
            name: worker.figures() for name, worker in self.known.items()
        }
        assert [info.worker_id for info in view.infos] == sorted(self.known)


TestFleetBesideLists = FleetBesideLists.TestCase
TestFleetBesideLists.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
