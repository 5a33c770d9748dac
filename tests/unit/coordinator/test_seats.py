"""Answers that are short of seats or of blocks: who is full, what waits for whom, and how long."""

from __future__ import annotations

import math

import msgspec
import pytest

from contracts.ids import WorkerId
from contracts.messages import AnswerTally, WorkerInfo, WorkerLoad
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings
from coordinator.decision import Chosen
from coordinator.forecast import DecodeForecast
from coordinator.pace import PaceKeeper
from coordinator.policy.outlook import NUM_SLOTS, Pace
from tests.support.conductors import BLOCK_TOKENS, MILLI, conductor_of, info_of, item_of
from workload.slo import SloClass

#: For forecasts that reach beyond all waits here.
SLO = SloClass("patient", 60_000.0, 60_000.0)
SETTINGS = ConductorSettings(admission=AdmissionRule(form="none"), queue_order="fcfs")


def told(name: str, *, seats: int = 0, handoff_blocks: int = 0, blocks: int = 1000) -> WorkerInfo:
    return msgspec.structs.replace(info_of(name, blocks=blocks), max_sequences=seats, handoff_blocks=handoff_blocks)


def made_of(*workers: tuple[WorkerInfo, WorkerLoad]) -> Conductor:
    return conductor_of(workers, settings=SETTINGS, slos=[SLO], default_slo="patient")


def chosen(made: Conductor, prompt_tokens: int = 100, max_tokens: int = 101, now_s: float = 0.0) -> Chosen:
    decision = made.decide(item_of(prompt_tokens, max_tokens), now_s)
    assert isinstance(decision, Chosen)
    assert decision.predicted is not None
    return decision


def ttft_s(made: Conductor, prompt_tokens: int = 100) -> float:
    predicted = chosen(made, prompt_tokens).predicted
    assert predicted is not None
    return predicted.ttft_s


def tpot_s(made: Conductor) -> float:
    predicted = chosen(made).predicted
    assert predicted is not None
    return predicted.tpot_s


# --- seats ------------------------------------------------------------------------------------------------


def writing(num_decodes: int, *, running: int = 0, waiting_offers: int = 0) -> WorkerLoad:
    return WorkerLoad(
        running_decodes=num_decodes,
        running_requests=running,
        waiting_offers=waiting_offers,
        context_tokens=100 * num_decodes,
        free_blocks=500,
    )


def test_who_has_a_free_seat_comes_first() -> None:
    """Although the other's steps are shorter."""
    idle = WorkerLoad(free_blocks=1000)
    made = made_of((told("p0"), idle), (told("d0", seats=4), writing(4)), (told("d1", seats=8), writing(6)))
    assert chosen(made).decode_row == 1
    made = made_of((told("p0"), idle), (told("d0", seats=0), writing(4)), (told("d1", seats=8), writing(6)))
    assert chosen(made).decode_row == 0, "it has told of no limit"


def test_a_wait_for_a_seat_is_part_of_the_time_between_tokens() -> None:
    """Steps hold no more than there are seats."""
    free, taken = (
        tpot_s(made_of((told("p0"), WorkerLoad(free_blocks=1000)), (told("d0", seats=seats), writing(40))))
        for seats in (64, 4)
    )
    assert free < (10 + 42) * MILLI
    # Nearly forty answers before it, four at a time, each of the 256 tokens that are the guess: some 2,500 steps.
    assert 2000 * 14 * MILLI / 100 < taken < 3000 * 14 * MILLI / 100


def test_blocks_bound_how_many_are_written_at_a_time() -> None:
    """Where offers wait, those that run are all that it holds; later it recovers step by step."""
    made = made_of(
        (told("p0"), WorkerLoad(free_blocks=1000)),
        (told("d0", seats=64), writing(9, running=3, waiting_offers=6)),
    )
    seats = made.fleet.outlook().seats
    assert 3 <= seats[0] <= 6
    for time in range(1, 9):
        made.report(WorkerId("d0"), writing(9, running=3, waiting_offers=6), float(time))
    assert seats[0] == pytest.approx(3, abs=0.1)
    made.report(WorkerId("d0"), writing(2, running=2), 9.0)
    assert 3 < seats[0] < 6
    for time in range(10, 40):
        made.report(WorkerId("d0"), writing(2, running=2), float(time))
    assert seats[0] == 64


# --- prompts that are held up -----------------------------------------------------------------------------

#: A budget of ten blocks; 20 prompts of a block each were read and wait.
STUCK = WorkerLoad(offered_blocks=20)
FULL = WorkerLoad(running_decodes=24, running_requests=4, context_tokens=4000, waiting_offers=20)


def test_prompts_wait_until_their_worker_s_kv_is_taken() -> None:
    def waits_s(reader: WorkerInfo, load: WorkerLoad, writer: WorkerLoad) -> float:
        return ttft_s(made_of((reader, load), (told("d0", seats=4), writer)))

    reader, alone_s = told("p0", handoff_blocks=10), 100 * MILLI
    assert waits_s(reader, STUCK, WorkerLoad(free_blocks=1000)) == alone_s, "there is room for all that waits"
    assert waits_s(reader, WorkerLoad(offered_blocks=9), FULL) == alone_s, "the budget has room"
    assert waits_s(told("p0"), STUCK, FULL) == alone_s, "it has told of no budget"
    # 160 tokens above the budget, prompts of 100; four answers of 256 tokens at a time, 14 ms a step.
    answer_s = 256 * 14 * MILLI
    assert 1.6 / 4 * answer_s < waits_s(reader, STUCK, FULL) < 3 * 1.6 / 4 * answer_s, "and so much for chance"


def test_what_all_readers_wait_for_is_shared() -> None:
    one = made_of((told("p0", handoff_blocks=10), STUCK), (told("d0", seats=4), FULL))
    two = made_of(
        (told("p0", handoff_blocks=10), STUCK), (told("p1", handoff_blocks=10), STUCK), (told("d0", seats=4), FULL)
    )
    assert ttft_s(two) > 1.5 * ttft_s(one)


def test_who_is_not_held_up_gets_the_prompt() -> None:
    made = made_of(
        (told("p0", handoff_blocks=10), STUCK),
        (told("p1", handoff_blocks=10), WorkerLoad(pending_prompt_tokens=BLOCK_TOKENS)),
        (told("d0", seats=4), FULL),
    )
    assert made.fleet.view().infos[chosen(made).prefill_row].worker_id == "p1"


def test_a_mixed_worker_waits_for_its_own_answers() -> None:
    free, taken = (
        ttft_s(made_of((told("m0", seats=seats), WorkerLoad(running_decodes=8, context_tokens=800, free_blocks=900))))
        for seats in (16, 4)
    )
    assert free < 0.25
    assert taken > 256 * 14 * MILLI, "five have to end, four of them are written at a time"


def test_beyond_what_is_looked_ahead_to_writers_take_turns() -> None:
    """Whose wait is that long tells nothing about where others will be then."""
    loads = [(told(name, seats=1), FULL) for name in ("d0", "d1")]
    made = made_of((told("p0", handoff_blocks=1), WorkerLoad(offered_blocks=900)), *loads)
    placed = [chosen(made).decode_row for _ in range(20)]
    assert placed.count(0) == placed.count(1)


# --- the forecast -----------------------------------------------------------------------------------------


def test_no_more_answers_end_than_have_seats() -> None:
    made = DecodeForecast(0.25 * NUM_SLOTS / 1.5, Pace(answer_tokens=100.0, token_s=0.04))
    made.insert(0, 0.0)
    made.advance(0.0)

    def at(time_s: float) -> tuple[float, float]:
        count, tokens = made.table[0, made.slots.index_at(time_s)]
        return float(count), float(tokens)

    made.report(0, 10, 1000, 0.0, seats=2.0)
    # An answer takes 4 s.
    assert at(4.0) == pytest.approx((8.0, 800.0))
    assert at(8.0)[0] == pytest.approx(6.0)
    made.add(0, 4.0, 100)
    assert at(8.0) == pytest.approx((7.0, 700.0)), "whoever comes waits"
    made.report(0, 10, 1000, 0.0, seats=10.0)
    assert at(4.0)[0] == pytest.approx((10 + 1) / math.e + 1 - 1 / math.e, rel=0.01), "all get on"


# --- how long answers take ---------------------------------------------------------------------------------


def test_answers_take_what_they_are_allowed_before_any_has_ended() -> None:
    keeper = PaceKeeper(256.0)
    assert keeper.pace.answer_tokens == 256.0
    keeper.note_placed(30, 10)
    assert (keeper.pace.prompt_tokens, keeper.pace.answer_tokens) == (30.0, 10.0)
    keeper.note_placed(30, 1000)
    assert keeper.pace.answer_tokens == 256.0
    keeper.note_lengths(20.0)
    assert keeper.pace.answer_tokens == 20.0


def test_taken_seats_show_what_tokens_take() -> None:
    keeper = PaceKeeper(256.0)
    for _ in range(100):
        keeper.note_step(0.01)
    assert keeper.pace.token_s == pytest.approx(0.01)
    for _ in range(100):
        # Two seats for a second, and 100 tokens out of them: 20 ms each.
        keeper.note_step(0.01, 2.0, 100)
    assert keeper.pace.token_s == pytest.approx(0.02, rel=0.05)
    for _ in range(200):
        keeper.note_step(0.01, 2.0, 10_000)
    assert keeper.pace.token_s == pytest.approx(0.01), "never faster than steps are"
    for _ in range(100):
        keeper.note_step(0.01, 100.0, 0)
    assert keeper.pace.token_s == pytest.approx(0.1), "bounded, whatever is told"


def test_only_workers_without_a_free_seat_are_measured() -> None:
    def token_s(num_decodes: int) -> float:
        made = made_of((told("p0"), WorkerLoad(free_blocks=1000)), (told("d0", seats=4), writing(num_decodes)))
        for time in range(1, 30):
            answers = (AnswerTally(time, 40 * time),)
            load = WorkerLoad(running_decodes=num_decodes, context_tokens=400, free_blocks=500, answers=answers)
            made.report(WorkerId("d0"), load, float(time))
        return made.fleet.outlook().pace.token_s

    assert token_s(4) == pytest.approx(14 * MILLI)
    assert token_s(5) == pytest.approx(4 / 40, rel=0.05), "four seats, forty tokens a second"
