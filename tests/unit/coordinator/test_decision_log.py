"""What is written down of decisions: every line decodes, and together they say what a replay needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.messages import AnswerTally, WorkerLoad
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import ConductorSettings
from coordinator.costs import WorkerCosts
from coordinator.decision_log import ANSWERS_EVERY_S, MAX_HINTS, DecisionLog, hints_on_record
from coordinator.decision_records import (
    FIRST_BYTES,
    AnswerMeans,
    CostKind,
    Decision,
    Header,
    LinkCosts,
    Surroundings,
    Targets,
    WorkerGone,
    WorkerUp,
    record_of,
)
from coordinator.policy.settings import AdmissionRule
from tests.support.conductors import PLAIN, Costs, conductor_of, hold, info_of, item_of
from workload.slo import SloClass

if TYPE_CHECKING:
    from contracts.messages import DispatchItem
    from coordinator.decision_records import Record

SLO = SloClass("fast", 300.0, 50.0)
SETTINGS = ConductorSettings(policy="ttft_min", admission=AdmissionRule(hysteresis=0.1))


class Office:
    """A conductor that keeps a log."""

    def __init__(self, *workers: str) -> None:
        self.costs = Costs()
        self.conductor = conductor_of(
            workers, costs=self.costs, slos=(SLO,), default_slo="fast", settings=SETTINGS, now_s=100.0
        )
        self.log = DecisionLog(
            self.conductor,
            self.costs,
            settings=SETTINGS,
            slos={"fast": SLO},
            default_slo="fast",
            surroundings=Surroundings(max_sequences={"decode": 7}),
            version="1.2",
            started_at=1e9,
            started_s=100.0,
        )

    def ask(self, item: DispatchItem, now_s: float = 101.0) -> list[Record]:
        return records(self.log.decided(item, self.conductor.decide(item, now_s), now_s))


def records(lines: bytes) -> list[Record]:
    assert lines.endswith(b"\n")
    found = [record_of(line) for line in lines.splitlines()]
    return [each for each in found if each is not None] if None not in found else []


def test_a_header_says_who_is_there_and_by_what_rules() -> None:
    office = Office("p0", "d0")
    opening = office.log.opening(100.5)
    assert opening.startswith(FIRST_BYTES)
    (header,) = records(opening)
    assert isinstance(header, Header)
    assert (header.version, header.started_at, header.at_s) == ("1.2", 1e9, 0.5)
    assert header.settings == SETTINGS
    assert (header.slos, header.default_slo) == ({"fast": Targets(300.0, 50.0)}, "fast")
    assert header.surroundings.max_sequences == {"decode": 7}
    assert [(each.worker_id, each.role, each.total_blocks, each.costs) for each in header.workers] == [
        ("d0", "decode", 1000, 0),
        ("p0", "prefill", 1000, 0),
    ]
    assert header.costs == (CostKind(number=0, latency=PLAIN, max_batch_tokens=512, between_steps_s=0.0),)
    assert (header.link.bandwidth_bytes_s, header.link.kv_token_bytes) == (2.0**40, 1024)


def test_a_worker_is_told_with_its_limits() -> None:
    office = Office("d0")
    limits = {"max_batch_tokens": 96, "max_sequences": 5, "handoff_blocks": 70}
    office.conductor.add(msgspec.structs.replace(info_of("p0"), **limits), 100.0)
    (header,) = records(office.log.opening(100.5))
    assert isinstance(header, Header)
    (worker,) = [each for each in header.workers if each.worker_id == "p0"]
    assert {name: getattr(worker, name) for name in limits} == limits


def test_a_store_is_told_without_costs() -> None:
    office = Office("p0", "d0", "s0")
    hold(office.conductor, "s0", range(30))
    (header,) = records(office.log.opening(100.5))
    assert isinstance(header, Header)
    assert [(each.worker_id, each.role, each.costs) for each in header.workers][2] == ("s0", "store", None)
    placed = office.ask(item_of(600, 16, blocks=range(36)))[-1]
    assert isinstance(placed, Decision)
    assert (placed.prefill, placed.decode, placed.source, placed.source_blocks) == ("p0", "d0", "s0", 30)
    gone = office.conductor
    gone.remove(WorkerId("s0"))
    told = office.ask(item_of(600, 16))
    assert [each.worker_id for each in told if isinstance(each, WorkerGone)] == ["s0"]


def test_a_placement_is_one_line_with_what_was_predicted() -> None:
    office = Office("p0", "p1", "d0")
    hold(office.conductor, "p1", range(4))
    *told, placed = office.ask(item_of(100, 16, blocks=range(6), waited_s=0.25, priority=2))
    assert [type(each) for each in told] == [CostKind, WorkerUp, WorkerUp, WorkerUp, LinkCosts]
    assert isinstance(placed, Decision)
    assert placed.is_placed
    assert (placed.at_s, placed.request, placed.prompt_tokens, placed.max_tokens) == (1.0, "r", 100, 16)
    assert (placed.prefill, placed.decode, placed.source) == ("p1", "d0", "")
    assert (placed.local_blocks, placed.best_held_blocks, placed.priority, placed.waited_s) == (4, 4, 2, 0.25)
    assert (placed.slo_class, placed.ttft_limit_s, placed.tpot_limit_s) == ("fast", 0.3, 0.05)
    assert placed.answer_tokens == 16
    assert placed.predicted is not None
    assert placed.predicted.ttft_s == sum(
        (placed.predicted.waited_s, placed.predicted.queue_s, placed.predicted.transfer_s, placed.predicted.prefill_s)
    )
    assert placed.hint_blocks == 1
    assert len(placed.hints) == 8 * 6


def test_a_refusal_has_its_inputs() -> None:
    office = Office("p0", "d0")
    late = office.ask(item_of(5000, name="late"))[-1]
    assert isinstance(late, Decision)
    assert (late.outcome, late.prefill, late.decode) == ("ttft", "p0", "d0")
    assert late.retry_after_s > 0
    assert late.predicted is not None
    assert late.predicted.ttft_s > late.ttft_limit_s == 0.3
    assert not late.was_refusing
    again = office.ask(item_of(5000, name="again"))[-1]
    assert isinstance(again, Decision)
    assert again.was_refusing, "the class's limits are smaller now"
    assert again.ttft_limit_s == 0.3 * 0.9


def test_a_request_that_nobody_can_take_names_no_worker() -> None:
    (nobody,) = [each for each in Office("p0").ask(item_of()) if isinstance(each, Decision)]
    assert (nobody.outcome, nobody.prefill, nobody.decode, nobody.predicted) == ("no_decode", "", "", None)


def test_only_what_changed_is_told_again() -> None:
    office = Office("p0", "d0")
    office.ask(item_of(name="first"))
    assert len(office.ask(item_of(name="second"))) == 1
    office.conductor.add(info_of("d1"), 102.0)
    office.conductor.remove(WorkerId("d0"))
    up, gone, _ = office.ask(item_of(name="third"), 103.0)
    assert isinstance(up, WorkerUp)
    assert (up.worker_id, up.at_s, up.costs) == ("d1", 3.0, 0)
    assert gone == WorkerGone(at_s=3.0, worker_id="d0")


def test_costs_that_changed_are_told_before_their_worker() -> None:
    office = Office("p0", "d0")
    office.ask(item_of())
    slower = WorkerCosts(latency=PLAIN, max_batch_tokens=256, between_steps_s=0.5)
    office.costs.named["d0"] = slower
    office.conductor.fleet.set_costs(office.conductor.fleet.row_of(WorkerId("d0")), slower)
    kind, worker, _ = office.ask(item_of(name="then"))
    assert isinstance(kind, CostKind)
    assert isinstance(worker, WorkerUp)
    assert (kind.max_batch_tokens, kind.between_steps_s) == (256, 0.5)
    assert (worker.worker_id, worker.costs) == ("d0", kind.number)
    (header,) = records(office.log.opening(105.0))
    assert isinstance(header, Header)
    assert {each.number for each in header.costs} == {each.costs for each in header.workers}


def test_a_link_that_changed_is_told() -> None:
    office = Office("p0", "d0")
    office.ask(item_of())
    office.costs.transfer = LinkTransfer(latency_s=0.5, bandwidth_bytes_s=100.0)
    link, _ = office.ask(item_of(name="then"))
    assert link == LinkCosts(latency_s=0.5, bandwidth_bytes_s=100.0, efficiency=1.0, kv_token_bytes=1024)


def test_how_long_answers_get_is_told_from_time_to_time() -> None:
    office = Office("p0", "d0")
    office.ask(item_of(100, name="first"))
    tally = (AnswerTally(0, 0),) * 7 + (AnswerTally(1000, 40_000),)
    load = WorkerLoad(free_blocks=1000, answers=tally)
    office.conductor.report(WorkerId("d0"), load, 102.0)
    assert len(office.ask(item_of(100, name="soon"), 103.0)) == 1
    means, _ = office.ask(item_of(100, name="later"), 100.0 + ANSWERS_EVERY_S)
    assert isinstance(means, AnswerMeans)
    assert list(means.tokens) == [7]
    assert 40 < means.tokens[7] < 42


@given(shared=st.integers(0, 900), more=st.tuples(st.integers(0, 900), st.integers(0, 900)))
def test_equal_beginnings_can_be_told_from_what_is_kept(shared: int, more: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    common = rng.integers(0, 2**63, shared, np.uint64)
    first, second = (np.concatenate([common, rng.integers(0, 2**63, count, np.uint64)]) for count in more)
    kept = [hints_on_record(keys.tobytes()) for keys in (first, second)]
    for (hints, every), keys in zip(kept, (first, second), strict=True):
        assert len(hints) // 8 == len(keys) // every <= MAX_HINTS
    coarsest = max(every for _, every in kept)
    ids = [
        [hints[at : at + 8] for at in range(0, len(hints), 8)][coarsest // every - 1 :: coarsest // every]
        for hints, every in kept
    ]
    equal = 0
    while equal < min(map(len, ids)) and ids[0][equal] == ids[1][equal]:
        equal += 1
    assert equal == shared // coarsest


def test_half_a_key_is_none() -> None:
    assert hints_on_record(bytes(range(12))) == ("00010203", 1)
