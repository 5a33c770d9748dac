"""Which worker writes the answer; and mixed workers, alone and beside others."""

from __future__ import annotations

from typing import Literal

import pytest

from contracts.ids import WorkerId
from contracts.latency_models import FittedLatency
from contracts.messages import Placement, WorkerInfo, WorkerLoad
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings
from coordinator.costs import WorkerCosts
from coordinator.decision import Chosen, Refused
from tests.support.conductors import MILLI, PLAIN, Costs, conductor_of, hold, info_of, item_of
from workload.slo import SloClass

SLO = SloClass("chat", 60_000.0, 40 * MILLI * 1e3)
NOT_REFUSED = AdmissionRule(form="none")


def writing(name: str, decodes: int, context: int = 0, free_blocks: int = 1000) -> tuple[WorkerInfo, WorkerLoad]:
    load = WorkerLoad(running_decodes=decodes, context_tokens=context, free_blocks=free_blocks)
    return info_of(name), load


def made_of(
    *writers: tuple[WorkerInfo, WorkerLoad],
    way: Literal["spread", "pack"] = "spread",
    slo: str | None = None,
    costs: Costs | None = None,
) -> Conductor:
    return conductor_of(
        ["p0", *writers],
        costs=costs,
        slos=[SLO],
        default_slo=slo,
        settings=ConductorSettings(decode=way, admission=NOT_REFUSED),
    )


def pair(made: Conductor, decision: Chosen | Refused) -> tuple[str, str]:
    assert isinstance(decision, Chosen)
    infos = made.fleet.view().infos
    return infos[decision.prefill_row].worker_id, infos[decision.decode_row].worker_id


def writer(made: Conductor, prompt_tokens: int = 10, max_tokens: int = 16) -> str:
    return pair(made, made.decide(item_of(prompt_tokens, max_tokens), 0.0))[1]


def test_spread_takes_the_fastest() -> None:
    assert writer(made_of(writing("d0", 9), writing("d1", 7), writing("d2", 8))) == "d1"


def test_context_counts_as_far_as_it_costs() -> None:
    latency = FittedLatency(prefill=PLAIN.prefill, pair_s=0.0, decode=PLAIN.decode, context_token_s=2.0**-20)
    costs = Costs(common=WorkerCosts(latency=latency, max_batch_tokens=512))
    assert writer(made_of(writing("d0", 5, 9000), writing("d1", 7, 1000), costs=costs)) == "d1"
    assert writer(made_of(writing("d0", 5, 2000), writing("d1", 7, 1000), costs=costs)) == "d0"


@pytest.mark.parametrize(("slo", "expected"), [("chat", "d1"), (None, "d0")])
def test_pack_takes_the_slowest_within_the_target(slo: str | None, expected: str) -> None:
    writers = (writing("d0", 3), writing("d1", 25), writing("d2", 35))
    assert writer(made_of(*writers, way="pack", slo=slo)) == expected


def test_pack_where_nobody_meets_the_target() -> None:
    assert writer(made_of(writing("d0", 50), writing("d1", 45), way="pack", slo="chat")) == "d1"


def test_room_comes_first() -> None:
    writers = (writing("d0", 3, free_blocks=5), writing("d1", 9, free_blocks=500))
    assert writer(made_of(*writers), 60, 10) == "d0"
    assert writer(made_of(*writers), 60, 100) == "d1", "10 blocks are needed"
    assert writer(made_of(writing("d0", 3, free_blocks=5), writing("d1", 9, free_blocks=8)), 60, 200) == "d1", (
        "more room"
    )


def test_blocks_that_will_be_given_back_are_room() -> None:
    """The prompt takes 30 s; by then most of what is there will have ended."""

    def predicted_tpot_s(prompt_tokens: int, context_tokens: int, free_blocks: int) -> float:
        writer_load = WorkerLoad(running_decodes=5, context_tokens=context_tokens, free_blocks=free_blocks)
        made = conductor_of(
            [info_load(name, load) for name, load in (("p0", WorkerLoad()), ("d0", writer_load))],
            settings=ConductorSettings(admission=NOT_REFUSED),
        )
        decision = made.decide(item_of(prompt_tokens, 16), 0.0)
        assert isinstance(decision, Chosen)
        assert decision.predicted is not None
        return decision.predicted.tpot_s

    def info_load(name: str, load: WorkerLoad) -> tuple[WorkerInfo, WorkerLoad]:
        return info_of(name, blocks=10_000, max_context_tokens=50_000), load

    assert predicted_tpot_s(30_000, 100_000, 1000) < 20 * MILLI
    assert predicted_tpot_s(1000, 5000, 1000) < 20 * MILLI
    assert predicted_tpot_s(1000, 2000, 10) > 50 * MILLI, "its KV waits for blocks, and its second token with it"


def test_the_handoff_is_part_of_the_mean() -> None:
    slow = Costs(transfer=LinkTransfer(latency_s=0.5, bandwidth_bytes_s=2.0**40))
    fast_s, slow_s = (
        made.decide(item_of(10, 11), 0.0) for made in (made_of(writing("d0", 0)), made_of(writing("d0", 0), costs=slow))
    )
    assert isinstance(fast_s, Chosen)
    assert isinstance(slow_s, Chosen)
    assert fast_s.predicted is not None
    assert slow_s.predicted is not None
    assert slow_s.predicted.tpot_s - fast_s.predicted.tpot_s == pytest.approx(0.05)


# --- what writers hold of the prompt ----------------------------------------------------------------------


def test_of_writers_alike_the_one_that_holds_most_of_the_prompt() -> None:
    made = made_of(writing("d0", 20), writing("d1", 20), writing("d2", 20))
    hold(made, "d1", range(4))
    hold(made, "d2", range(6))
    ask = item_of(160, 16, blocks=range(10))
    verdict = made.in_words(ask, decision := made.decide(ask, 0.0), 0.0)
    assert pair(made, decision) == ("p0", "d2")
    assert isinstance(decision, Chosen)
    assert decision.decode_blocks == 6
    assert isinstance(verdict, Placement)
    assert verdict.reason.endswith("6 blocks are at d2 already")


@pytest.mark.parametrize(("more", "expected"), [(0, "d1"), (1, "d0")])
def test_speed_comes_before_what_is_held(more: int, expected: str) -> None:
    """A step takes 15 ms with 5 answers in it, 16 with 6."""
    made = made_of(writing("d0", 4), writing("d1", 4 + more))
    hold(made, "d1", range(6))
    assert pair(made, made.decide(item_of(160, 16, blocks=range(10)), 0.0))[1] == expected


def test_room_comes_before_what_is_held() -> None:
    made = made_of(writing("d0", 4), writing("d1", 4, free_blocks=5))
    hold(made, "d1", range(6))
    assert pair(made, made.decide(item_of(160, 16, blocks=range(10)), 0.0))[1] == "d0"


def test_conversations_with_one_beginning_do_not_gather() -> None:
    made = made_of(*(writing(f"d{number}", 4) for number in range(4)))
    hold(made, "d3", range(6))
    writers = [pair(made, made.decide(item_of(160, 64, blocks=range(10)), 0.0))[1] for _ in range(40)]
    assert {writers.count(f"d{number}") for number in range(4)} == {10}


def test_pack_keeps_to_the_slowest_of_those_alike() -> None:
    made = made_of(writing("d0", 3), writing("d1", 25), writing("d2", 25), way="pack", slo="chat")
    hold(made, "d0", range(6))
    hold(made, "d2", range(2))
    assert pair(made, made.decide(item_of(160, 16, blocks=range(10)), 0.0))[1] == "d2"


def test_where_steps_are_not_known_the_least_loaded_of_those_alike() -> None:
    for context_tokens, expected in ((100, "d1"), (110, "d0")):
        made = made_of(writing("d0", 1, 100), writing("d1", 1, context_tokens), costs=Costs(common=None))
        hold(made, "d1", range(6))
        assert pair(made, made.decide(item_of(160, 16, blocks=range(10)), 0.0))[1] == expected


def test_what_the_writer_holds_is_not_handed_over() -> None:
    slow = Costs(transfer=LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**17))
    predicted_s: list[float] = []
    for blocks in (0, 9):
        made = made_of(writing("d0", 0), costs=slow)
        hold(made, "d0", range(blocks))
        decision = made.decide(item_of(160, 11, blocks=range(10)), 0.0)
        assert isinstance(decision, Chosen)
        assert decision.predicted is not None
        predicted_s.append(decision.predicted.tpot_s)
    assert predicted_s[1] < predicted_s[0]


# --- mixed workers ----------------------------------------------------------------------------------------


def test_mixed_workers_alone_share_by_both_loads() -> None:
    made = conductor_of(["m0", (info_of("m1"), WorkerLoad(running_decodes=30, free_blocks=1000))])
    assert pair(made, made.decide(item_of(100, 100), 0.0)) == ("m0", "m0")
    made = conductor_of(
        [
            (info_of("m0"), WorkerLoad(pending_prompt_tokens=400, free_blocks=1000)),
            (info_of("m1"), WorkerLoad(running_decodes=3, free_blocks=1000)),
        ]
    )
    assert pair(made, made.decide(item_of(100, 10), 0.0)) == ("m1", "m1")


def test_answers_slow_the_steps_that_read() -> None:
    """Beside 40 answers a chunk takes longer: by the linear work of 40 tokens, and their context."""
    latency = FittedLatency(prefill=PLAIN.prefill, pair_s=0.0, decode=PLAIN.decode, context_token_s=2.0**-20)
    costs = Costs(common=WorkerCosts(latency=latency, max_batch_tokens=512))
    load = WorkerLoad(running_decodes=40, context_tokens=2**14, free_blocks=1000)
    made = conductor_of([(info_of("m0"), load)], costs=costs)
    decision = made.decide(item_of(512, 16), 0.0)
    assert isinstance(decision, Chosen)
    assert decision.predicted is not None
    assert decision.predicted.prefill_s == pytest.approx((512 + 40 + 16) * MILLI, rel=0.01)
    report = WorkerLoad(running_decodes=40, context_tokens=2**14, pending_prompt_tokens=512, free_blocks=1000)
    made.report(WorkerId("m0"), report, 1.0)
    assert made.fleet.outlook().queue_s(0, 1.0)[0] == pytest.approx((512 + 40 + 16) * MILLI, rel=0.01)


def test_prompts_slow_the_answers() -> None:
    """Half of its time the worker reads prompts."""
    made = conductor_of(["m0"], settings=ConductorSettings(admission=NOT_REFUSED))
    first = made.decide(item_of(10, 100), 0.0)
    last = first
    for second in range(400):
        made.report(WorkerId("m0"), WorkerLoad(free_blocks=1000), 0.125 * second)
        last = made.decide(item_of(64, 100), 0.125 * second)
    assert isinstance(first, Chosen)
    assert isinstance(last, Chosen)
    assert first.predicted is not None
    assert last.predicted is not None
    # Steps that read are taken as full: 512 tokens beside one answer.
    own_s = 11 * MILLI
    assert last.predicted.tpot_s == pytest.approx(1 / (0.5 / (513 * MILLI) + 0.5 / own_s), rel=0.02)
    assert last.predicted.tpot_s > 1.5 * first.predicted.tpot_s


def beside(
    *, slow_link: bool = False, local_tokens: int = 0, mixed: WorkerLoad | None = None, slo: str | None = None
) -> Conductor:
    link = LinkTransfer(latency_s=0.2 if slow_link else 0.0, bandwidth_bytes_s=2.0**40)
    return conductor_of(
        ["p0", "d0", (info_of("m0"), mixed or WorkerLoad(free_blocks=1000))],
        costs=Costs(transfer=link),
        slos=[SLO],
        default_slo=slo,
        settings=ConductorSettings(local_prefill_tokens=local_tokens, admission=NOT_REFUSED),
    )


def test_a_mixed_worker_saves_the_handoff() -> None:
    busy = WorkerLoad(running_decodes=5, free_blocks=1000)
    made = beside(slow_link=True, mixed=busy)
    assert pair(made, made.decide(item_of(100, 20), 0.0)) == ("m0", "m0")
    made = beside(slow_link=False, mixed=busy)
    assert pair(made, made.decide(item_of(100, 20), 0.0)) == ("p0", "d0")


def test_a_longer_answer_is_slowed_longer() -> None:
    busy = WorkerLoad(running_decodes=5, free_blocks=1000)
    made = beside(slow_link=True, mixed=busy)
    assert pair(made, made.decide(item_of(100, 200), 0.0)) == ("p0", "d0")


@pytest.mark.parametrize(("bound", "held", "expected"), [(0, 0, "m0"), (99, 0, "p0"), (100, 0, "m0"), (40, 4, "m0")])
def test_operators_bound_what_mixed_workers_read(bound: int, held: int, expected: str) -> None:
    made = beside(slow_link=True, local_tokens=bound)
    hold(made, "m0", range(held))
    assert pair(made, made.decide(item_of(100, 20, blocks=range(held)), 0.0))[0] == expected


def test_the_bound_does_not_hold_where_nobody_else_can() -> None:
    for names, avoid in ((["m0"], ()), (["m0", "p0"], ()), (["m0", "p0", "d0"], ("p0",))):
        made = conductor_of(names, settings=ConductorSettings(local_prefill_tokens=10, admission=NOT_REFUSED))
        assert pair(made, made.decide(item_of(100, 20, avoid=avoid), 0.0)) == ("m0", "m0")


def test_who_misses_the_target_comes_last() -> None:
    slow = WorkerLoad(running_decodes=35, free_blocks=1000)
    for slo, expected in ((None, "m0"), ("chat", "p0")):
        made = beside(slow_link=True, mixed=slow, slo=slo)
        assert pair(made, made.decide(item_of(100, 2), 0.0))[0] == expected
