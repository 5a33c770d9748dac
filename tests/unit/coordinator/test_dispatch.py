"""Dispatch by load: every case is a table of workers and a verdict."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.messages import DispatchItem, MemberRole, Placement, Rejection, Role, WorkerInfo, WorkerLoad
from coordinator.conductor import Conductor, ConductorSettings, DispatchLimits
from coordinator.decision import Chosen, Refused
from coordinator.directory.directory import Directory
from tests.support.conductors import LAYOUT, ROLES, Costs, conductor_of, hold, identity, info_of, item_of
from tests.support.dispatch_reference import Pair, Row, least_loaded

Worker = tuple[WorkerInfo, WorkerLoad]


def worker(
    name: str,
    role: MemberRole,
    *,
    pending: int = 0,
    context: int = 0,
    waiting: int = 0,
    fingerprint: str = "m",
    blocks: int = 1000,
) -> Worker:
    load = WorkerLoad(pending_prompt_tokens=pending, context_tokens=context, waiting_requests=waiting)
    return info_of(name, role=role, fingerprint=fingerprint, blocks=blocks), load


def fleet(*workers: Worker, limits: DispatchLimits | None = None) -> Conductor:
    """Nothing is known of what anything costs."""
    chosen = ConductorSettings(policy="least_loaded", limits=limits or DispatchLimits())
    return conductor_of(workers, costs=Costs(common=None), settings=chosen)


def verdict_of(conductor: Conductor, ask: DispatchItem) -> Placement | Rejection:
    return conductor.in_words(ask, conductor.decide(ask, 0.0), 0.0)


def place(ask: DispatchItem, *workers: Worker) -> Placement | Rejection:
    return verdict_of(fleet(*workers), ask)


def test_least_loaded_of_each_role() -> None:
    verdict = place(
        item_of(),
        worker("p0", "prefill", pending=500),
        worker("p1", "prefill", pending=20),
        worker("d0", "decode", context=10),
        worker("d1", "decode", context=9),
    )
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p1", "d1")
    assert verdict.reason == ("least_loaded: 20 prompt tokens pending, 125 context tokens with this request"), (
        "the load before this placement, and after it"
    )
    assert verdict.predicted is None, "nothing is known of what steps cost"


def test_ties_go_to_the_smaller_worker_id() -> None:
    verdict = place(
        item_of(), worker("p1", "prefill"), worker("p0", "prefill"), worker("d1", "decode"), worker("d0", "decode")
    )
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p0", "d0")


def test_mixed_worker_keeps_its_prompt() -> None:
    verdict = place(item_of(), worker("m0", "mixed"), worker("d0", "decode"))
    assert isinstance(verdict, Placement)
    assert verdict.prefill == verdict.decode
    assert verdict.prefill.worker_id == "m0"


def test_no_prefill_worker() -> None:
    verdict = place(item_of(), worker("d0", "decode"))
    assert isinstance(verdict, Rejection)
    assert (verdict.code, verdict.reason) == ("not_ready", "no_prefill")
    assert verdict.message == "no prefill worker can take the request (workers up: d0 (decode))"


def test_nobody_at_all() -> None:
    verdict = place(item_of(blocks=range(3)))
    assert isinstance(verdict, Rejection)
    assert verdict.message == "no prefill worker can take the request (workers up: none)"


def test_no_compatible_decode_worker() -> None:
    verdict = place(item_of(), worker("p0", "prefill"), worker("d0", "decode", fingerprint="other"))
    assert isinstance(verdict, Rejection)
    assert "no decode worker" in verdict.message


def test_an_incompatible_pair_is_passed_over() -> None:
    verdict = place(
        item_of(),
        worker("p0", "prefill", fingerprint="old"),
        worker("p1", "prefill", pending=1000),
        worker("d0", "decode"),
    )
    assert isinstance(verdict, Placement)
    assert verdict.prefill.worker_id == "p1"


def test_full_queues_say_how_full() -> None:
    verdict = place(item_of(), worker("p0", "prefill", pending=7, waiting=512), worker("d0", "decode"))
    assert isinstance(verdict, Rejection)
    assert (verdict.code, verdict.reason) == ("no_capacity", "full")
    assert "p0, has 512 requests and 7 prompt tokens waiting" in verdict.message


@pytest.mark.parametrize(
    ("workers", "avoid", "chosen"),
    [
        ("p0 d0 d1", ("d0",), ("p0", "d1")),
        ("p0 p1 d0", ("p0",), ("p1", "d0")),
        ("p0 p1 d0 d1", ("p0", "d0"), ("p1", "d1")),
        ("m0 m1", ("m0",), ("m1", "m1")),
        ("m0 p0 d0", ("m0",), ("p0", "d0")),
        ("m0 p0 d0", ("d0",), ("m0", "m0")),
        ("m0 p0 d0", ("p0", "m0"), ("p0", "d0")),
        # Nobody else: the failure may be over, or a new life may have the name.
        ("p0 d0", ("d0",), ("p0", "d0")),
        ("p0 d0", ("p0", "d0"), ("p0", "d0")),
        ("m0", ("m0",), ("m0", "m0")),
        ("p0 d0 d1", ("d0", "d1"), ("p0", "d0")),
        # Names of workers that are gone mean nothing.
        ("p0 d0", ("p7",), ("p0", "d0")),
    ],
)
def test_workers_to_avoid_come_last(workers: str, avoid: tuple[str, ...], chosen: tuple[str, str]) -> None:
    """The avoided ones are the idle ones here."""
    verdict = place(
        item_of(avoid=avoid),
        *(
            worker(name, ROLES[name[0]], pending=0 if name in avoid else 99, context=0 if name in avoid else 99)
            for name in workers.split()
        ),
    )
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == chosen
    assert ("to be avoided" in verdict.reason) == bool(set(chosen) & set(avoid))


def test_a_full_worker_is_no_alternative_to_an_avoided_one() -> None:
    verdict = place(
        item_of(avoid=("p0",)), worker("p0", "prefill"), worker("p1", "prefill", waiting=512), worker("d0", "decode")
    )
    assert isinstance(verdict, Placement)
    assert verdict.prefill.worker_id == "p0"


def test_a_reader_whose_writer_is_avoided_comes_after_one_whose_is_not() -> None:
    workers = (
        worker("p0", "prefill", fingerprint="a"),
        worker("p1", "prefill", fingerprint="b", pending=9),
        worker("d0", "decode", fingerprint="a"),
        worker("d1", "decode", fingerprint="b"),
    )
    verdict = place(item_of(avoid=("d0",)), *workers)
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p1", "d1")


def test_of_pairs_with_equally_many_avoided_the_first_reader_has_it() -> None:
    workers = (
        worker("p0", "prefill", fingerprint="a"),
        worker("p1", "prefill", fingerprint="b"),
        worker("d0", "decode", fingerprint="a"),
        worker("d1", "decode", fingerprint="b"),
    )
    verdict = place(item_of(avoid=("d0", "d1")), *workers)
    assert isinstance(verdict, Placement)
    assert (verdict.prefill.worker_id, verdict.decode.worker_id) == ("p0", "d0")


def test_of_equally_full_queues_one_not_avoided_is_named() -> None:
    verdict = place(item_of(avoid=("p0",)), worker("p0", "prefill", waiting=512), worker("p1", "prefill", waiting=600))
    assert isinstance(verdict, Rejection)
    assert "the least loaded, p1, has 600 requests" in verdict.message


def test_a_prompt_goes_where_it_fits() -> None:
    workers = (worker("p0", "prefill"), worker("d0", "decode", blocks=4), worker("d1", "decode", context=999))
    verdict = place(item_of(100), *workers)
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d1", "d0 is idle and too small"


def test_a_worker_for_the_whole_answer_comes_first() -> None:
    workers = (worker("p0", "prefill"), worker("d0", "decode", blocks=7), worker("d1", "decode", context=999))
    verdict = place(item_of(100), *workers)
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d1", "d0 holds 112 tokens, prompt and answer are 116"


def test_one_that_cannot_hold_the_prompt_is_none_for_a_part_of_the_answer() -> None:
    workers = (worker("p0", "prefill"), worker("d0", "decode", blocks=6), worker("d1", "decode", blocks=7, context=999))
    verdict = place(item_of(100), *workers)
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d1", "neither holds the whole answer"
    verdict = place(item_of(100), *workers[:2])
    assert isinstance(verdict, Rejection)
    assert "no decode worker" in verdict.message


def test_not_avoided_comes_before_room_for_the_whole_answer() -> None:
    verdict = place(
        item_of(100, avoid=("d1",)),
        worker("p0", "prefill"),
        worker("d0", "decode", blocks=7),
        worker("d1", "decode"),
    )
    assert isinstance(verdict, Placement)
    assert verdict.decode.worker_id == "d0"


def test_what_fits_nowhere_is_not_worth_repeating() -> None:
    verdict = place(item_of(200), worker("p0", "prefill", blocks=4), worker("d0", "decode", blocks=8))
    assert isinstance(verdict, Rejection)
    assert (verdict.code, verdict.reason) == ("context_length_exceeded", "too_long")
    assert verdict.message.endswith("fit into no worker; the largest holds 128 tokens")


def test_a_burst_is_spread() -> None:
    made = fleet(worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode"), worker("d1", "decode"))
    verdicts = [verdict_of(made, item_of(name=f"r{n}")) for n in range(10)]
    chosen = [verdict.prefill.worker_id for verdict in verdicts if isinstance(verdict, Placement)]
    assert chosen.count(WorkerId("p0")) == chosen.count(WorkerId("p1")) == 5


@given(
    pendings=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    contexts=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
    tokens=st.lists(st.integers(1, 3000), min_size=1, max_size=20),
)
def test_each_choice_is_a_least_loaded_one(pendings: list[int], contexts: list[int], tokens: list[int]) -> None:
    workers = [worker(f"p{n}", "prefill", pending=load) for n, load in enumerate(pendings)]
    workers += [worker(f"d{n}", "decode", context=load) for n, load in enumerate(contexts)]
    prefill = {f"p{n}": load for n, load in enumerate(pendings)}
    decode = {f"d{n}": load for n, load in enumerate(contexts)}
    made = fleet(*workers)
    for n, count in enumerate(tokens):
        ask = item_of(count, name=f"r{n}")
        verdict = verdict_of(made, ask)
        assert isinstance(verdict, Placement)
        assert prefill[verdict.prefill.worker_id] == min(prefill.values())
        assert decode[verdict.decode.worker_id] == min(decode.values())
        prefill[verdict.prefill.worker_id] += ask.prompt_tokens
        decode[verdict.decode.worker_id] += ask.prompt_tokens + ask.max_tokens


# --- who may be used ----------------------------------------------------------------------------------------


def usable(made: Conductor, *names: str) -> tuple[DispatchItem, Placement | Rejection]:
    ask = item_of()
    flags = made.fleet.view().rows_of([WorkerId(name) for name in names])
    return ask, made.in_words(ask, made.decide(ask, 0.0, flags), 0.0)


def test_the_others_get_nothing() -> None:
    made = fleet(worker("p0", "prefill"), worker("p1", "prefill", pending=9), worker("d0", "decode"))
    _, verdict = usable(made, "p1", "d0")
    assert isinstance(verdict, Placement)
    assert verdict.prefill.worker_id == "p1"


@pytest.mark.parametrize(
    ("names", "why", "says"),
    [
        (("d0",), "no_prefill", "workers up: d0 (decode)"),
        (("p0",), "no_decode", "workers up: p0 (prefill)"),
        ((), "no_prefill", "workers up: none"),
        (("p1",), "full", "all 1 prefill workers have full queues; the least loaded, p1"),
        (("p2",), "too_long", "the largest holds 32 tokens"),
    ],
)
def test_words_are_about_those_that_may_be_used(names: tuple[str, ...], why: str, says: str) -> None:
    made = fleet(
        worker("p0", "prefill"),
        worker("p1", "prefill", waiting=512),
        worker("p2", "prefill", blocks=2),
        worker("d0", "decode"),
    )
    _, verdict = usable(made, *names)
    assert isinstance(verdict, Rejection)
    assert verdict.reason == why
    assert says in verdict.message


# --- beside the policy worker by worker ---------------------------------------------------------------------

OTHER_BLOCKS = msgspec.structs.replace(identity(), layout=msgspec.structs.replace(LAYOUT, block_tokens=8))


CONVERSATION = range(6)
FIRST_TURN = item_of(100, blocks=CONVERSATION)
SECOND_TURN = item_of(140, blocks=range(8))


@pytest.mark.parametrize("reports", [[], [(0.125, 100)], [(0.125, 60), (0.25, 0)]], ids=["none", "early", "both"])
def test_the_next_turn_of_a_conversation_is_not_kept_away_by_the_last_one(reports: list[tuple[float, int]]) -> None:
    """No report that is sure to contain the last one has come."""
    made = conductor_of(["d0", "p0", "p1"], costs=Costs(common=None))
    assert where_at(made, FIRST_TURN, 0.125) == "p0"
    for at_s, pending_tokens in reports:
        made.report(WorkerId("p0"), WorkerLoad(pending_prompt_tokens=pending_tokens, free_blocks=900), at_s)
    hold(made, "p0", CONVERSATION)
    assert where_at(made, SECOND_TURN, 0.375) == "p0"
    assert made.fleet.view().prefill_load_tokens.tolist() == [0, 140, 0], "and it counts itself"


def test_a_prompt_that_is_still_read_counts() -> None:
    made = conductor_of(["d0", "p0", "p1"], costs=Costs(common=None))
    assert where_at(made, FIRST_TURN, 0.0) == "p0"
    hold(made, "p0", range(5))
    assert where_at(made, SECOND_TURN, 0.125) == "p1", "80 tokens less, and 100 before it"


def test_others_prompts_count_although_they_begin_alike() -> None:
    made = conductor_of(["d0", "p0", "p1"], costs=Costs(common=None))
    assert where_at(made, item_of(400, blocks=[*CONVERSATION, *range(50, 69)]), 0.0) == "p0"
    hold(made, "p0", CONVERSATION)
    assert where_at(made, SECOND_TURN, 0.125) == "p1"


def where_at(made: Conductor, ask: DispatchItem, now_s: float) -> str:
    """Who reads it."""
    decision = made.decide(ask, now_s)
    assert isinstance(decision, Chosen)
    return made.fleet.info_at(decision.prefill_row).worker_id


@st.composite
def some_workers(draw: st.DrawFn) -> list[Worker]:
    """By name, with few values of everything: ties, full queues and prompts that fit nowhere are common."""
    small = st.integers(0, 3)
    return [
        (
            WorkerInfo(
                worker_id=WorkerId(name),
                incarnation=Incarnation(1),
                role=draw(st.sampled_from((*get_args(Role), "store"))),
                address=f"{name}:1",
                model="m",
                identity=draw(st.sampled_from([identity(), identity("other"), OTHER_BLOCKS])),
                total_blocks=draw(st.sampled_from([2, 4, 8])),
                max_context_tokens=draw(st.sampled_from([15, 64, 128])),
            ),
            WorkerLoad(
                pending_prompt_tokens=10 * draw(small), context_tokens=10 * draw(small), waiting_requests=draw(small)
            ),
        )
        for name in sorted(draw(st.sets(st.sampled_from("abcdefgh"), min_size=draw(st.sampled_from([0, 5])))))
    ]


some_items = st.lists(
    st.builds(
        DispatchItem,
        request_id=st.just(RequestId("r")),
        prompt_tokens=st.sampled_from([1, 10, 14, 15, 31, 63, 127]),
        max_tokens=st.sampled_from([1, 10, 40]),
        avoid=st.lists(st.sampled_from("abcdefghz").map(WorkerId), max_size=4).map(tuple),
    ),
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(workers=some_workers(), items=some_items, max_waiting=st.integers(1, 6), knows_costs=st.booleans())
def test_decides_as_the_policy_worker_by_worker(
    workers: list[Worker], items: list[DispatchItem], max_waiting: int, knows_costs: bool
) -> None:
    limits = DispatchLimits(max_waiting_requests=max_waiting)
    made = conductor_of(
        workers,
        costs=Costs() if knows_costs else Costs(common=None),
        settings=ConductorSettings(policy="least_loaded", limits=limits),
    )
    rows = {
        str(info.worker_id): Row(
            info=info,
            prefill_load_tokens=load.pending_prompt_tokens,
            decode_load_tokens=load.context_tokens,
            waiting_requests=load.waiting_requests,
        )
        for info, load in workers
    }
    for ask in items:
        expected = least_loaded(ask, list(rows.values()), limits)
        decision = made.decide(ask, 0.0)
        if isinstance(decision, Refused):
            assert decision.why == expected
            continue
        infos = made.fleet.view().infos
        assert Pair(infos[decision.prefill_row].worker_id, infos[decision.decode_row].worker_id) == expected
        assert isinstance(expected, Pair)
        rows[expected.reader].book(ask)
        rows[expected.writer].decode_load_tokens += ask.prompt_tokens + ask.max_tokens


def test_a_directory_s_hash_functions_are_not_to_be_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def directory(max_blocks: int, *, seed: int) -> Directory:
        seeds.append(seed)
        return Directory(max_blocks, seed=seed)

    monkeypatch.setattr("coordinator.conductor.Directory", directory)
    for seed in (1, 1, 2):
        conductor_of([], seed=seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert min(seeds) > 2**32
