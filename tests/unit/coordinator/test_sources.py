"""From whom a prefix is copied: workers of any role and stores, by price, within the budget of copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.config import DispatchPolicyName
from contracts.ids import WorkerId
from contracts.messages import LatencyFit, Placement, WorkerInfo, WorkerLoad
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings
from coordinator.decision import Chosen, Refused
from coordinator.policy.pair_links import PairLinks
from coordinator.policy.sources import REPLICA_WINDOW_S, is_cheaper
from tests.support.conductors import BLOCK_TOKENS, MILLI, Costs, conductor_of, hold, info_of, item_of

if TYPE_CHECKING:
    from contracts.messages import DispatchItem

NOT_REFUSED = AdmissionRule(form="none")
OPEN = ConductorSettings(admission=NOT_REFUSED)
#: A turn of 100 blocks and its answer of 15; the next turn's prompt goes on from there.
TURN, ANSWERED, NEXT_TOKENS = range(100), range(115), 120 * BLOCK_TOKENS
NEXT = item_of(NEXT_TOKENS, blocks=range(120))


def busy(name: str, pending_tokens: int) -> tuple[WorkerInfo, WorkerLoad]:
    return info_of(name), WorkerLoad(pending_prompt_tokens=pending_tokens, free_blocks=1000)


def placed(made: Conductor, decision: Chosen | Refused) -> tuple[str, str, str | None]:
    """Reader, writer, and source."""
    assert isinstance(decision, Chosen)
    names = [info.worker_id for info in made.fleet.view().infos]
    source = None if decision.source_row < 0 else names[decision.source_row]
    return names[decision.prefill_row], names[decision.decode_row], source


def source_of(made: Conductor, ask: DispatchItem = NEXT, now_s: float = 0.0) -> str | None:
    return placed(made, made.decide(ask, now_s))[2]


# --- who may give it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("holder", ["s0", "d0"])
def test_the_next_turn_computes_its_new_words_alone(holder: str) -> None:
    """Its worker holds the last prompt; the answer's KV stands where that was written, and in the store."""
    made = conductor_of(["p0", "d0", "s0"], settings=OPEN)
    hold(made, "p0", TURN)
    hold(made, holder, ANSWERED)
    verdict = made.in_words(NEXT, decision := made.decide(NEXT, 0.0), 0.0)
    assert placed(made, decision) == ("p0", "d0", holder)
    assert isinstance(verdict, Placement)
    assert verdict.prefix is not None
    assert (verdict.prefix.local_blocks, verdict.prefix.source_blocks) == (100, 115)
    assert verdict.predicted is not None
    assert verdict.predicted.prefill_s == 5 * BLOCK_TOKENS * MILLI
    kind = {"s0": "a store", "d0": "a decode worker"}[holder]
    assert f"115 blocks from {holder}, {kind}" in verdict.reason


def test_what_another_prefill_worker_holds_must_be_more_than_the_ratio() -> None:
    made = conductor_of(["p0", busy("p1", 9000), "d0"], settings=OPEN)
    hold(made, "p0", TURN)
    hold(made, "p1", ANSWERED)
    assert source_of(made) is None
    hold(made, "d0", range(110))
    assert source_of(made) == "d0", "less, but a copy of it is none among those that read prompts"


def test_of_equal_holders_the_soonest_then_a_store_then_a_decode_worker() -> None:
    def made_of(*holders: str) -> Conductor:
        made = conductor_of(["p0", busy("p1", 9000), "p2", "d0", "d1", "s0", "s1"], settings=OPEN)
        for name in holders:
            hold(made, name, ANSWERED)
        return made

    assert source_of(made_of("p1", "d0", "d1", "s1")) == "s1"
    assert source_of(made_of("p1", "d0", "d1")) == "d0"
    made = made_of("d0", "s0", "s1")
    assert [source_of(made) for _ in range(3)] == ["s0", "s1", "d0"], "each has a fetch more than before"


def test_nothing_is_fetched_from_a_store_that_is_silent_avoided_or_of_another_model() -> None:
    made = conductor_of(["p0", "d0", "s0"], settings=OPEN)
    hold(made, "s0", ANSWERED)
    heard = ~made.fleet.view().rows_of([WorkerId("s0")])
    assert placed(made, made.decide(NEXT, 0.0, heard))[2] is None
    avoiding = item_of(NEXT_TOKENS, blocks=range(120), avoid=("s0",))
    assert source_of(made, avoiding) is None
    assert source_of(made) == "s0"
    strange = conductor_of(["p0", "d0", (info_of("s0", fingerprint="other"), WorkerLoad())], settings=OPEN)
    hold(strange, "s0", ANSWERED)
    assert source_of(strange) is None


@given(st.floats(0, 10), st.floats(0, 10))
def test_a_copy_saves_clearly_more_than_it_takes(copy_s: float, compute_s: float) -> None:
    if is_cheaper(copy_s, compute_s):
        assert copy_s < compute_s
        assert is_cheaper(copy_s / 2, compute_s)
        assert is_cheaper(copy_s, compute_s * 2)
    assert not is_cheaper(copy_s, copy_s)


# --- stores take part in nothing else ---------------------------------------------------------------------


def test_nothing_is_placed_on_a_store() -> None:
    for policy in get_args(DispatchPolicyName):
        for costs in (Costs(), Costs(common=None)):
            made = conductor_of(
                ["p0", "d0", "s0", "s1"],
                costs=costs,
                settings=ConductorSettings(policy=policy, admission=NOT_REFUSED),
            )
            hold(made, "s0", ANSWERED)
            found = {placed(made, made.decide(NEXT, 0.1 * number))[:2] for number in range(20)}
            assert found == {("p0", "d0")}


@pytest.mark.parametrize(
    ("names", "tokens", "why"),
    [
        (["s0"], 100, "no_prefill"),
        (["s0"], 10**6, "no_prefill"),
        (["s0", "p0"], 100, "no_decode"),
        (["s0", "d0"], 100, "no_prefill"),
        (["s0", "p0", "d0"], 10_000, "too_long"),
    ],
)
def test_a_store_makes_up_for_no_worker(names: list[str], tokens: int, why: str) -> None:
    made = conductor_of([(info_of("s0", blocks=10**6, max_context_tokens=10**9), WorkerLoad()), *names[1:]])
    decision = made.decide(item_of(tokens), 0.0)
    assert isinstance(decision, Refused)
    assert decision.why == why
    words = made.in_words(item_of(tokens), decision, 0.0)
    assert "s0" not in getattr(words, "message", "")
    alone = made.fleet.view().rows_of([WorkerId("s0")])
    only_store = made.decide(item_of(tokens), 0.0, alone)
    assert isinstance(only_store, Refused)
    assert only_store.why == "no_prefill"


def test_what_a_store_reports_is_no_load() -> None:
    """Whatever it says: nothing is expected of it, and its steps cost nothing."""
    made = conductor_of(["p0", "d0"], settings=OPEN)
    made.add(info_of("s0"), 0.0)
    fit = LatencyFit(9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 1000, 1000)
    load = WorkerLoad(pending_prompt_tokens=10**6, running_decodes=99, context_tokens=10**6, offered_blocks=900)
    made.report(WorkerId("s0"), load, 1.0, fit)
    alone = conductor_of(["p0", "d0"], settings=OPEN)
    ask = item_of(100)
    ours, theirs = made.decide(ask, 2.0), alone.decide(ask, 2.0)
    assert isinstance(ours, Chosen)
    assert isinstance(theirs, Chosen)
    assert ours.predicted == theirs.predicted
    assert made.fleet.view().prefill_load_tokens.tolist() == [0, 100, 0]


# --- before steps are known -------------------------------------------------------------------------------


def fresh(*workers: str | tuple[WorkerInfo, WorkerLoad], bandwidth: float = 1e9, share: float = 1.0) -> Conductor:
    link = LinkTransfer(latency_s=0.002, bandwidth_bytes_s=bandwidth)
    chosen = ConductorSettings(replica_share=share)
    return conductor_of(workers, costs=Costs(common=None, transfer=link), settings=chosen)


@pytest.mark.parametrize(("bandwidth", "expected"), [(1e9, "s0"), (7e6, "s0"), (5e6, None)])
def test_a_fresh_cluster_fetches_over_any_but_slow_links(bandwidth: float, expected: str | None) -> None:
    """A token has 1 KiB: at 7 MB/s it takes 146 us, and computing it is taken for 200."""
    made = fresh("p0", "d0", "s0", bandwidth=bandwidth)
    hold(made, "s0", ANSWERED)
    decision = made.decide(NEXT, 0.0)
    assert isinstance(decision, Chosen)
    assert placed(made, decision)[2] == expected
    assert decision.predicted is None
    assert decision.source_blocks == (115 if expected else 0)


def test_a_few_tokens_are_not_worth_the_messages() -> None:
    made = fresh("p0", "d0", "s0")
    hold(made, "s0", range(1))
    assert source_of(made, item_of(2 * BLOCK_TOKENS, blocks=range(2))) is None


def test_a_fresh_cluster_stays_where_less_has_to_be_copied() -> None:
    made = fresh("p0", "p1", "d0", "s0", bandwidth=1e8)
    hold(made, "p1", TURN)
    hold(made, "s0", ANSWERED)
    assert placed(made, made.decide(NEXT, 0.0)) == ("p1", "d0", "s0")


def test_without_a_budget_nothing_is_copied_that_another_reader_holds() -> None:
    for share, expected in ((1.0, "p1"), (0.0, None)):
        made = fresh("p0", busy("p1", 10**5), "d0", share=share)
        hold(made, "p1", ANSWERED)
        assert placed(made, made.decide(NEXT, 0.0)) == ("p0", "d0", expected)


# --- the budget of copies ---------------------------------------------------------------------------------


def budgeted(share: float, *more: str) -> Conductor:
    """Everybody but p1 is idle, and p1 holds it all."""
    chosen = ConductorSettings(admission=NOT_REFUSED, replica_share=share)
    made = conductor_of(["p0", busy("p1", 10**7), "d0", *more], settings=chosen)
    hold(made, "p1", ANSWERED)
    return made


def test_copies_stop_where_the_budget_is_used_up_and_go_on_later() -> None:
    # 115 blocks are 11.5 % of the pool.
    made = budgeted(0.2)
    decisions = [made.decide(NEXT, 0.0) for _ in range(3)]
    assert [placed(made, each)[2] for each in decisions] == ["p1", "p1", None]
    assert isinstance(decisions[2], Chosen)
    assert decisions[2].is_withheld
    assert decisions[2].predicted is not None
    verdict = made.in_words(NEXT, decisions[2], 0.0)
    assert isinstance(verdict, Placement)
    assert "its share of copies is used up" in verdict.reason
    assert source_of(made, now_s=REPLICA_WINDOW_S * 0.1) is None
    assert source_of(made, now_s=REPLICA_WINDOW_S * 0.2) == "p1"


def test_what_no_other_reader_holds_is_no_copy_more() -> None:
    made = budgeted(0.0, "s0")
    assert source_of(made) is None
    hold(made, "s0", ANSWERED)
    assert source_of(made) is None, "p1 holds it too"
    hold(made, "s0", range(119))
    made.remove(WorkerId("p1"))
    assert source_of(made) == "s0"


def test_a_hot_prefix_spreads_to_all_within_their_budgets() -> None:
    made = conductor_of([f"p{number}" for number in range(8)] + ["d0", "d1"], settings=OPEN)
    hold(made, "p3", ANSWERED)
    found = [placed(made, made.decide(NEXT, 0.0)) for _ in range(32)]
    assert {reader for reader, _, _ in found} == {f"p{number}" for number in range(8)}
    assert all((source is None) == (reader == "p3") for reader, _, source in found)


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(0.01, 2.0),
    pauses_s=st.lists(st.floats(0.0, 40.0), min_size=1, max_size=40),
    blocks=st.lists(st.integers(1, 119), min_size=40, max_size=40),
)
def test_a_worker_copies_no_more_than_its_budget(share: float, pauses_s: list[float], blocks: list[int]) -> None:
    """Within any time: its share for each minute of it, the same at once, and what was begun before that was over."""
    made = budgeted(share)
    now_s = 0.0
    copied: list[tuple[float, int]] = []
    for pause_s, num_blocks in zip(pauses_s, blocks, strict=False):
        now_s += pause_s
        made.report(WorkerId("p0"), WorkerLoad(free_blocks=1000), now_s)
        decision = made.decide(item_of(NEXT_TOKENS, blocks=range(num_blocks)), now_s)
        assert isinstance(decision, Chosen)
        reader, _, source = placed(made, decision)
        if source is not None:
            assert (reader, source) == ("p0", "p1")
            copied.append((now_s, decision.source_blocks - decision.local_blocks))
    for first, (begin_s, _) in enumerate(copied):
        for last in range(first, len(copied)):
            granted = share * 1000 * (1.0 + (copied[last][0] - begin_s) / REPLICA_WINDOW_S)
            assert sum(count for _, count in copied[first:last]) <= granted + 1e-6


# --- ways that differ -------------------------------------------------------------------------------------


def test_each_reader_fetches_from_the_store_that_is_near() -> None:
    pairs = PairLinks()
    for reader, near in (("p0", "s1"), ("p1", "s0")):
        pairs.note(WorkerId(reader), {WorkerId(near): -3})
    costs = Costs(transfer=LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**24), pairs=pairs)
    made = conductor_of(["p0", "p1", "d0", "s0", "s1"], costs=costs, settings=OPEN)
    for name in ("s0", "s1"):
        hold(made, name, ANSWERED)
    found = [made.decide(NEXT, 0.0) for _ in range(2)]
    assert [placed(made, each) for each in found] == [("p0", "d0", "s1"), ("p1", "d0", "s0")]
    for each in found:
        assert isinstance(each, Chosen)
        assert each.predicted is not None
        assert each.predicted.transfer_s == 115 * BLOCK_TOKENS * 1024 / 2**24 / 8


def test_a_way_that_is_too_slow_is_not_taken() -> None:
    pairs = PairLinks()
    pairs.note(WorkerId("p0"), {WorkerId("s0"): 7})
    link = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**23)
    for known, expected in ((None, "s0"), (pairs, None)):
        made = conductor_of(["p0", "d0", "s0"], costs=Costs(transfer=link, pairs=known), settings=OPEN)
        hold(made, "s0", ANSWERED)
        assert source_of(made) == expected


def test_pairs_are_forgotten_and_columns_follow_the_fleet() -> None:
    pairs = PairLinks()
    pairs.note(WorkerId("p1"), {WorkerId("s0"): 2, WorkerId("d0"): 0})
    made = conductor_of(["p1", "s0"])
    assert pairs.column(WorkerId("s0"), made.fleet.view()).tolist() == [2, 0]
    made.add(info_of("p0"), 0.0)
    assert pairs.column(WorkerId("s0"), made.fleet.view()).tolist() == [0, 2, 0]
    pairs.note(WorkerId("p1"), {})
    assert not pairs
    assert pairs.column(WorkerId("s0"), made.fleet.view()).tolist() == [0, 0, 0]
