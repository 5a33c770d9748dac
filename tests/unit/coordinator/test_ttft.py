"""Dispatch by predicted time to the first token: prefixes, fetches, queues, and beside the same worker by worker."""

from __future__ import annotations

from typing import get_args
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config import DispatchPolicyName
from contracts.ids import WorkerId
from contracts.latency_models import CostCurve, FittedLatency
from contracts.messages import Placement, WorkerInfo, WorkerLoad
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings, DispatchLimits
from coordinator.costs import WorkerCosts
from coordinator.decision import Chosen, Refused
from coordinator.policy import reading
from coordinator.policy.outlook import READING_WINDOW_S
from coordinator.policy.pair_links import PairLinks
from coordinator.policy.sources import REPLICA_WINDOW_S
from tests.support.conductors import (
    BLOCK_TOKENS,
    MILLI,
    PLAIN,
    Costs,
    conductor_of,
    hold,
    info_of,
    item_of,
)
from tests.support.dispatch_reference import Fetch, Prices, Row, Ttft, ttfts

NOT_REFUSED = AdmissionRule(form="none")


def chosen(made: Conductor, decision: Chosen | Refused) -> tuple[str, str]:
    assert isinstance(decision, Chosen)
    infos = made.fleet.view().infos
    return infos[decision.prefill_row].worker_id, infos[decision.decode_row].worker_id


def info_and_idle(name: str, fingerprint: str) -> tuple[WorkerInfo, WorkerLoad]:
    info = info_of(name, fingerprint=fingerprint)
    return info, WorkerLoad(free_blocks=info.total_blocks)


def source(made: Conductor, decision: Chosen | Refused) -> str | None:
    assert isinstance(decision, Chosen)
    return None if decision.source_row < 0 else made.fleet.view().infos[decision.source_row].worker_id


# --- prefixes ---------------------------------------------------------------------------------------------


def test_the_parts_of_a_prediction() -> None:
    made = conductor_of([(info_of("p0"), WorkerLoad(pending_prompt_tokens=200, free_blocks=1000)), "d0"])
    hold(made, "p0", range(2))
    decision = made.decide(item_of(100, waited_s=0.25, blocks=range(4)), 0.0)
    assert isinstance(decision, Chosen)
    predicted = decision.predicted
    assert predicted is not None
    assert (predicted.waited_s, predicted.queue_s, predicted.transfer_s) == (0.25, 200 * MILLI, 0.0)
    assert predicted.prefill_s == (100 - 2 * BLOCK_TOKENS) * MILLI
    assert predicted.ttft_s == 0.25 + 200 * MILLI + 68 * MILLI
    assert decision.local_blocks == 2
    assert predicted.tpot_s == pytest.approx(11 * MILLI, rel=0.02), "one answer in the step, and its handoff"


def test_a_prefix_attracts_until_its_worker_is_too_busy() -> None:
    for pending, expected in ((60, "p1"), (70, "p0")):
        made = conductor_of(
            ["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=pending)), "d0"],
            settings=ConductorSettings(policy="prefix_only"),
        )
        hold(made, "p1", range(4))
        decision = made.decide(item_of(100, blocks=range(4)), 0.0)
        assert chosen(made, decision)[0] == expected, "64 tokens are held"
        assert source(made, decision) is None, "this policy fetches nothing"


def test_a_prefix_is_fetched_where_that_is_faster() -> None:
    made = conductor_of(["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=300)), "d0"])
    hold(made, "p1", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert chosen(made, decision)[0] == "p0"
    assert source(made, decision) == "p1"
    assert isinstance(decision, Chosen)
    assert (decision.local_blocks, decision.source_blocks) == (0, 4)
    predicted = decision.predicted
    assert predicted is not None
    assert predicted.prefill_s == (100 - 64) * MILLI
    assert predicted.transfer_s == 64 * 1024 / 2**40


@pytest.mark.parametrize(
    ("held", "bandwidth", "fetches"),
    [
        # 4 blocks there and 3 here: not 1.5 times as much.
        (3, 2.0**40, False),
        (2, 2.0**40, True),
        # 2 blocks take 32 KiB and save 32 ms.
        (2, 2.0**21, True),
        (2, 2.0**19, False),
    ],
)
def test_the_ratio_rule_and_the_price_of_copying(held: int, bandwidth: float, fetches: bool) -> None:
    costs = Costs(transfer=LinkTransfer(latency_s=0.0, bandwidth_bytes_s=bandwidth))
    made = conductor_of(["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=300)), "d0"], costs=costs)
    hold(made, "p0", range(held))
    hold(made, "p1", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert chosen(made, decision)[0] == "p0"
    assert (source(made, decision) == "p1") == fetches


def test_a_fetch_runs_during_the_queue() -> None:
    costs = Costs(transfer=LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**22))
    made = conductor_of(
        [
            (info_of("p0"), WorkerLoad(pending_prompt_tokens=10)),
            (info_of("p1"), WorkerLoad(pending_prompt_tokens=300)),
            "d0",
        ],
        costs=costs,
    )
    hold(made, "p1", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert isinstance(decision, Chosen)
    predicted = decision.predicted
    assert predicted is not None
    fetch_s = 64 * 1024 / 2**22
    assert predicted.queue_s == 10 * MILLI
    assert predicted.transfer_s == fetch_s - 10 * MILLI, "what it takes longer than the queue"
    assert predicted.ttft_s == fetch_s + 36 * MILLI


def test_of_equal_holders_the_one_with_fewer_fetches_gives() -> None:
    busy_load = WorkerLoad(pending_prompt_tokens=3000)
    made = conductor_of(["p0", "p1", (info_of("p2"), busy_load), (info_of("p3"), busy_load), "d0"])
    for name in ("p2", "p3"):
        hold(made, name, range(4))
    first = made.decide(item_of(100, blocks=range(4)), 0.0)
    second = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert [chosen(made, first)[0], source(made, first)] == ["p0", "p2"]
    assert [chosen(made, second)[0], source(made, second)] == ["p1", "p3"]


def test_nothing_is_fetched_from_those_to_be_avoided_or_not_usable() -> None:
    for avoid in (True, False):
        made = conductor_of(["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=300)), "d0"])
        hold(made, "p1", range(4))
        usable = made.fleet.view().rows_of([WorkerId("p0"), WorkerId("d0")])
        ask = item_of(100, blocks=range(4), avoid=("p1",) if avoid else ())
        decision = made.decide(ask, 0.0, None if avoid else usable)
        assert chosen(made, decision) == ("p0", "d0")
        assert source(made, decision) is None


def test_kv_that_means_something_else_is_not_fetched() -> None:
    made = conductor_of(
        [
            (info_of("p0", fingerprint="a"), WorkerLoad()),
            (info_of("p1", fingerprint="b"), WorkerLoad(pending_prompt_tokens=300)),
            (info_of("d0", fingerprint="a"), WorkerLoad(free_blocks=1000)),
            (info_of("d1", fingerprint="b"), WorkerLoad(free_blocks=1000)),
        ]
    )
    hold(made, "p1", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert chosen(made, decision) == ("p0", "d0")
    assert source(made, decision) is None


def test_the_last_token_is_always_computed() -> None:
    made = conductor_of(["p0", "d0"])
    hold(made, "p0", range(4))
    decision = made.decide(item_of(64, blocks=range(4)), 0.0)
    assert isinstance(decision, Chosen)
    assert decision.local_blocks == 3
    assert decision.predicted is not None
    assert decision.predicted.prefill_s == 16 * MILLI


def test_placements_tell_the_plan_and_why() -> None:
    made = conductor_of(["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=300)), "d0"])
    hold(made, "p0", range(1))
    hold(made, "p1", range(4))
    ask = item_of(100, blocks=range(4))
    verdict = made.in_words(ask, made.decide(ask, 0.0), 0.0)
    assert isinstance(verdict, Placement)
    assert verdict.prefix is not None
    assert verdict.prefix.source is not None
    assert (verdict.prefix.local_blocks, verdict.prefix.source_blocks) == (1, 4)
    assert verdict.prefix.source.address == "p1:1"
    assert verdict.predicted is not None
    assert verdict.reason.startswith("ttft_min: TTFT 0.0352 s = waited 0 + queue 0 + fetching ")
    assert verdict.reason.endswith("1 blocks are there; 4 blocks from p1, a prefill worker")


def test_prompts_that_come_later_share_its_last_step() -> None:
    """Half of a step's room, as far as they come while it waits."""
    made = conductor_of(["p0", "d0"], settings=ConductorSettings(admission=NOT_REFUSED))

    def predicted_s(now_s: float) -> float:
        decision = made.decide(item_of(100), now_s)
        assert isinstance(decision, Chosen)
        assert decision.predicted is not None
        return decision.predicted.prefill_s

    assert predicted_s(0.0) == 100 * MILLI, "it begins at once"
    later_s = [predicted_s(0.0) for _ in range(40)]
    assert later_s[-1] == pytest.approx((100 + 256) * MILLI)
    assert predicted_s(100.0) == 100 * MILLI
    share = float(made.fleet.outlook().reading_s[1]) / READING_WINDOW_S
    assert 100 * MILLI < predicted_s(100.0) <= (100 + share * 100) * MILLI


def test_what_was_read_long_ago_says_nothing_of_what_comes() -> None:
    def predicted_s(*, was_busy: bool) -> float:
        made = conductor_of(["p0", "p1", "d0"], settings=ConductorSettings(admission=NOT_REFUSED))
        for number in range(100 if was_busy else 0):
            made.decide(item_of(400, name=str(number)), 0.0)
        for now_s, pending_tokens in ((10.0, 0), (3600.0, 100)):
            load = WorkerLoad(free_blocks=1000, pending_prompt_tokens=pending_tokens)
            made.report(WorkerId("p0"), load, now_s)
            made.report(WorkerId("p1"), load, now_s)
        decision = made.decide(item_of(100), 3600.0)
        assert isinstance(decision, Chosen)
        assert decision.predicted is not None
        return decision.predicted.ttft_s

    assert predicted_s(was_busy=True) == pytest.approx(predicted_s(was_busy=False), rel=1e-6)


def test_who_was_busy_long_ago_is_not_avoided() -> None:
    made = conductor_of(["p0", "d0"], settings=ConductorSettings(admission=NOT_REFUSED))
    for number in range(100):
        made.decide(item_of(400, name=str(number)), 0.0)
    made.report(WorkerId("p0"), WorkerLoad(free_blocks=1000), 100.0)
    made.add(info_of("p1"), 3600.0)
    for name, pending_tokens in (("p0", 100), ("p1", 150)):
        made.report(WorkerId(name), WorkerLoad(free_blocks=1000, pending_prompt_tokens=pending_tokens), 3600.0)
    assert chosen(made, made.decide(item_of(100), 3600.0)) == ("p0", "d0")


def test_an_answer_of_one_token_goes_to_whoever_reads_it_first() -> None:
    """Nothing is written after it, whatever others would take for that; and a reader without a writer stays last."""
    workers: list[str | tuple[WorkerInfo, WorkerLoad]] = [
        "m0",
        (info_of("p0"), WorkerLoad(free_blocks=1000, pending_prompt_tokens=500)),
        "d0",
    ]
    stranger = (info_of("p1", fingerprint="other"), WorkerLoad(free_blocks=1000))
    with np.errstate(all="raise"):
        for number in range(3):
            made = conductor_of([*workers, stranger], settings=ConductorSettings(admission=NOT_REFUSED))
            assert chosen(made, made.decide(item_of(100, max_tokens=1 + number), 0.0)) == ("m0", "m0")


def test_workers_that_do_not_write_may_have_no_costs_of_it() -> None:
    reads_only = FittedLatency(prefill=PLAIN.prefill, pair_s=0.0, decode=CostCurve.line(0.0, 0.0), context_token_s=0.0)
    costs = Costs(named={"p0": WorkerCosts(latency=reads_only, max_batch_tokens=512)})
    with np.errstate(all="raise", under="ignore"):
        made = conductor_of(["m0", "p0", "d0"], costs=costs, settings=ConductorSettings(admission=NOT_REFUSED))
        for number in range(20):
            assert isinstance(made.decide(item_of(100, name=str(number)), 0.1 * number), Chosen)


def test_each_model_s_kv_is_moved_at_its_own_price() -> None:
    """Two models in one fleet, and the source's figure is that of the other: its fetch would be too dear."""
    small = WorkerCosts(latency=PLAIN, max_batch_tokens=512, kv_token_bytes=1)
    costs = Costs(
        common=WorkerCosts(latency=PLAIN, max_batch_tokens=512, kv_token_bytes=2**20),
        named={"p0": small, "p1": small},
        transfer=LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**20),
        kv_token_bytes=2**20,
    )
    made = conductor_of(
        [
            "p0",
            (info_of("p1"), WorkerLoad(pending_prompt_tokens=3000, free_blocks=1000)),
            "d0",
            (info_of("p8", fingerprint="large"), WorkerLoad(pending_prompt_tokens=9000, free_blocks=1000)),
            info_and_idle("d8", "large"),
        ],
        costs=costs,
        settings=ConductorSettings(admission=NOT_REFUSED),
    )
    hold(made, "p1", range(60))
    decision = made.decide(item_of(1000, blocks=range(60)), 0.0)
    assert (chosen(made, decision), source(made, decision)) == (("p0", "d0"), "p1")
    assert isinstance(decision, Chosen)
    assert decision.predicted is not None
    assert decision.predicted.transfer_s == 960 / 2**20


# --- hot spots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows_costs", [True, False])
def test_a_hot_prefix_does_not_make_a_hot_worker(knows_costs: bool) -> None:
    """All requests of a burst begin alike, and one worker holds that."""
    costs = Costs() if knows_costs else Costs(common=None)
    made = conductor_of([f"p{n}" for n in range(8)] + ["d0", "d1"], costs=costs)
    hold(made, "p3", range(30))
    ask = item_of(1000, blocks=range(30))
    readers = [chosen(made, made.decide(ask, 0.0))[0] for _ in range(80)]
    counts = [readers.count(f"p{n}") for n in range(8)]
    assert max(counts) <= (11 if knows_costs else 17), counts
    assert min(counts) >= 8, counts


def test_decode_workers_share_a_burst() -> None:
    made = conductor_of(["p0", "p1", "d0", "d1", "d2", "d3"])
    writers = [chosen(made, made.decide(item_of(50, 200), 0.0))[1] for _ in range(40)]
    assert {writers.count(f"d{n}") for n in range(4)} == {10}


def test_load_on_the_chosen_worker_never_attracts() -> None:
    made = conductor_of([f"p{n}" for n in range(4)] + ["d0"])
    ask = item_of(100)
    last = made.decide(ask, 0.0)
    for _ in range(12):
        before = last
        last = made.decide(ask, 0.0)
        assert isinstance(last, Chosen)
        assert isinstance(before, Chosen)
        assert last.prefill_row != before.prefill_row


# --- what is not known ------------------------------------------------------------------------------------


def test_without_costs_tokens_are_counted_and_nothing_is_refused() -> None:
    slow = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**20)
    made = conductor_of(
        ["p0", (info_of("p1"), WorkerLoad(pending_prompt_tokens=50)), "d0"], costs=Costs(common=None, transfer=slow)
    )
    hold(made, "p1", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert chosen(made, decision)[0] == "p1"
    assert isinstance(decision, Chosen)
    assert (decision.local_blocks, decision.source_row, decision.predicted) == (4, -1, None)


def test_a_worker_of_unknown_costs_counts_as_what_most_are() -> None:
    fast = WorkerCosts(latency=PLAIN, max_batch_tokens=512)
    made = conductor_of(["p0", "p1", "d0"], costs=Costs(common=fast, named={"p0": None}))
    decision = made.decide(item_of(100), 0.0)
    assert chosen(made, decision)[0] == "p0"
    assert isinstance(decision, Chosen)
    assert decision.predicted is not None
    assert decision.predicted.prefill_s == 100 * MILLI


def test_reading_known_and_writing_not() -> None:
    made = conductor_of(
        [(info_of("p0"), WorkerLoad(pending_prompt_tokens=50)), "p1", "d0", "d1"],
        costs=Costs(named={"d0": None, "d1": None}),
    )
    decisions = [made.decide(item_of(100), 0.0) for _ in range(2)]
    assert [chosen(made, decision) for decision in decisions] == [("p1", "d0"), ("p0", "d1")]
    assert all(isinstance(decision, Chosen) and decision.predicted is None for decision in decisions)


def test_slow_workers_get_less() -> None:
    slow = FittedLatency(prefill=CostCurve.line(0.0, 4 * MILLI), pair_s=0.0, decode=PLAIN.decode, context_token_s=0.0)
    costs = Costs(named={"p0": WorkerCosts(latency=slow, max_batch_tokens=512)})
    made = conductor_of(["p0", "p1", "d0"], costs=costs)
    readers = [chosen(made, made.decide(item_of(100), 0.0))[0] for _ in range(20)]
    assert readers.count("p0") == 4


# --- comparison policies ----------------------------------------------------------------------------------


def test_round_robin_takes_turns() -> None:
    made = conductor_of(["d0", "d1", "p0", "p1", "p2"], settings=ConductorSettings(policy="round_robin"))
    pairs = [chosen(made, made.decide(item_of(), 0.0)) for _ in range(6)]
    assert [reader for reader, _ in pairs] == ["p0", "p1", "p2"] * 2
    assert [writer for _, writer in pairs] == ["d0", "d1"] * 3


def test_random_is_even_and_seeded() -> None:
    def readers(seed: int) -> list[str]:
        made = conductor_of(["d0", "p0", "p1"], settings=ConductorSettings(policy="random"), seed=seed)
        return [chosen(made, made.decide(item_of(), 0.0))[0] for _ in range(400)]

    first = readers(1)
    assert first == readers(1) != readers(2)
    assert 150 < first.count("p0") < 250


@pytest.mark.parametrize("policy", get_args(DispatchPolicyName))
def test_all_policies_predict_and_count_what_is_there(policy: DispatchPolicyName) -> None:
    made = conductor_of(["p0", "d0"], settings=ConductorSettings(policy=policy))
    hold(made, "p0", range(4))
    decision = made.decide(item_of(100, blocks=range(4)), 0.0)
    assert isinstance(decision, Chosen)
    assert decision.predicted is not None
    assert (decision.local_blocks, decision.predicted.prefill_s) == (4, 36 * MILLI)


# --- beside the policy worker by worker -------------------------------------------------------------------

QUADRATIC = FittedLatency(
    prefill=CostCurve(floor_s=5 * MILLI, knots=(0, 64), knot_s=(0.0, 64 * MILLI)),
    pair_s=2.0**-16,
    decode=PLAIN.decode,
    context_token_s=0.0,
)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    fetch_ratio=st.sampled_from([None, 1.25, 1.5, 3.0]),
    max_waiting=st.integers(1, 3),
    few_holders=st.sampled_from([0, 8]),
    replica_share=st.sampled_from([0.0, 0.001, 1.0, 1.0]),
)
def test_decides_as_the_algorithm_worker_by_worker(
    data: st.DataObject, fetch_ratio: float | None, max_waiting: int, few_holders: int, replica_share: float
) -> None:
    """Whether those that hold a part of the prompt are looked at one by one or in columns."""
    names = data.draw(st.lists(st.sampled_from(["p0", "p1", "p2", "p3", "p4", "d0", "d1", "s0", "s1"]), unique=True))
    workers = [
        (
            info_of(
                name,
                fingerprint=data.draw(st.sampled_from(["m", "m", "m", "other"])),
                blocks=data.draw(st.sampled_from([12, 1000])),
            ),
            WorkerLoad(
                pending_prompt_tokens=data.draw(st.sampled_from([0, 0, 16, 100, 700])),
                waiting_requests=data.draw(st.integers(0, 2)),
                free_blocks=1000,
            ),
        )
        for name in names
    ]
    link = LinkTransfer(latency_s=MILLI, bandwidth_bytes_s=data.draw(st.sampled_from([2.0**18, 2.0**21, 2.0**40])))
    costs = Costs(common=WorkerCosts(latency=QUADRATIC, max_batch_tokens=64), transfer=link)
    powers: dict[tuple[str, str], int] = {}
    if data.draw(st.booleans()):
        powers = {(source, reader): data.draw(st.integers(-2, 2)) for source in names for reader in names}
    if any(powers.values()):
        costs.pairs = PairLinks()
        for reader in names:
            costs.pairs.note(WorkerId(reader), {WorkerId(s): power for (s, r), power in powers.items() if r == reader})
    policy = ConductorSettings(
        policy="ttft_min" if fetch_ratio else "prefix_only",
        fetch_ratio=fetch_ratio or 1.5,
        replica_share=replica_share,
        limits=DispatchLimits(max_waiting_requests=max_waiting),
        admission=NOT_REFUSED,
    )
    made = conductor_of(workers, costs=costs, settings=policy)
    held = {name: data.draw(st.integers(0, 12)) for name in names}
    for name, blocks in held.items():
        hold(made, name, range(blocks))
    prices = Prices(
        latency=QUADRATIC,
        max_batch_tokens=64,
        transfer=link,
        kv_token_bytes=costs.kv_token_bytes,
        block_tokens=BLOCK_TOKENS,
        powers=powers,
    )
    for _ in range(4):
        tokens = data.draw(st.sampled_from([1, 16, 40, 160, 300]))
        ask = item_of(tokens, blocks=range(12), waited_s=data.draw(st.sampled_from([0.0, 0.5])))
        outlook, view = made.fleet.outlook(), made.fleet.view()
        rows = [
            Row(
                info=info,
                waiting_requests=int(view.waiting_requests[row]),
                held_blocks=min(held[info.worker_id], (tokens - 1) // BLOCK_TOKENS),
                queue_s=max(0.0, float(outlook.prefill_free_s[0, row])),
                source_wait_s=max(0.0, float(outlook.source_free_s[row])),
                busy_share=float(outlook.reading_s[row]) / READING_WINDOW_S,
                may_copy=replica_share > 0 and float(outlook.replica_free_s[row]) < REPLICA_WINDOW_S,
            )
            for row, info in enumerate(view.infos)
        ]
        expected = ttfts(ask, rows, prices, policy.limits, fetch_ratio)
        with patch.object(reading, "_FEW_HOLDERS", few_holders):
            decision = made.decide(ask, 0.0, match=data.draw(st.sampled_from([None, *made.matches([ask])])))
        if isinstance(decision, Refused):
            assert not expected
            continue
        assert decision.predicted is not None
        reader, _ = chosen(made, decision)
        best_s = min(each.seconds for each in expected.values())
        assert expected[reader].seconds == pytest.approx(best_s, abs=1e-9)
        assert decision.predicted.ttft_s == pytest.approx(best_s, abs=1e-9)
        clearly_better = [name for name, each in expected.items() if each.seconds < best_s + 1e-12 and name < reader]
        assert not clearly_better, "ties go to the smaller id"
        fetch = None if decision.source_row < 0 else Fetch(source(made, decision) or "", decision.source_blocks)
        assert Ttft(best_s, fetch).fetch == expected[reader].fetch


@given(order=st.permutations(range(5)))
def test_names_do_not_matter(order: list[int]) -> None:
    """Workers that report and hold the same get the same, whatever they are called."""
    pending, blocks = [0, 40, 300, 80, 500], [1, 4, 0, 2, 6]
    made = conductor_of(
        [
            *((info_of(f"p{order[n]}"), WorkerLoad(pending_prompt_tokens=pending[n])) for n in range(5)),
            "d0",
        ]
    )
    for n in range(5):
        hold(made, f"p{order[n]}", range(blocks[n]))
    decision = made.decide(item_of(150, blocks=range(6)), 0.0)
    reader, _ = chosen(made, decision)
    assert order.index(int(reader[1:])) == 0
    assert source(made, decision) == f"p{order[4]}"
