"""Replanning: a shift of the workload is told once and soon, and chance is not told at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from coordinator.replan_terms import (
    Answered,
    Apply,
    Arrived,
    Ask,
    Expected,
    Looked,
    PartlyExpected,
    Planned,
    Propose,
    ReplanRules,
    Split,
)
from coordinator.replanning import Replanning
from workload.arrivals import Gamma, Poisson
from workload.lengths import Histogram, LogNormal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coordinator.replan_terms import Event, Instruction
    from workload.arrivals import Arrivals
    from workload.lengths import Lengths

PROMPTS = LogNormal.from_mean(500, 0.8, 8192)
OUTPUTS = LogNormal.from_mean(200, 0.8, 8192)
RULES = ReplanRules(window_s=100.0)
BETTER = Split("3 prefill + 1 decode", 0.4, "2 prefill + 2 decode")


def expected_of(rate_rps: float, prompts: LogNormal = PROMPTS, outputs: LogNormal = OUTPUTS) -> Expected:
    rng = random.Random(99)
    drawn = sorted(prompts.sample(rng) for _ in range(20_000))
    answers = [outputs.sample(rng) for _ in range(20_000)]
    return Expected(
        rate_rps=rate_rps,
        mean_prompt_tokens=sum(drawn) / len(drawn),
        p95_prompt_tokens=float(drawn[int(0.95 * len(drawn))]),
        mean_output_tokens=sum(answers) / len(answers),
    )


PLANNED_FOR = expected_of(5.0)


def events(
    rng: random.Random,
    arrivals: Arrivals,
    *,
    from_s: float,
    until_s: float,
    prompts: Lengths = PROMPTS,
    outputs: Lengths = OUTPUTS,
    look_every_s: float = 5.0,
) -> Iterator[Event]:
    """Arrivals, each answered at once, with looks between them."""
    look_s = from_s + look_every_s
    for offset_s in arrivals.times(rng):
        at_s = from_s + offset_s
        while look_s <= min(at_s, until_s):
            yield Looked(look_s)
            look_s += look_every_s
        if at_s >= until_s:
            return
        yield Arrived(at_s, prompts.sample(rng))
        yield Answered(at_s, 1, outputs.sample(rng))


def told(
    machine: Replanning, happening: Iterator[Event], split: Split | None = BETTER
) -> list[tuple[float, Instruction]]:
    """What the machine says, its questions answered at once."""
    found: list[tuple[float, Instruction]] = []
    for event in happening:
        for instruction in machine.handle(event):
            found.append((event.at_s, instruction))
            if isinstance(instruction, Ask):
                found += [(event.at_s, each) for each in machine.handle(Planned(event.at_s, split))]
    return found


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("mean prompt", {"prompts": LogNormal.from_mean(1000, 0.8, 8192)}),
        ("mean answer", {"outputs": LogNormal.from_mean(500, 0.8, 8192)}),
        ("rate", {"arrivals": Poisson(9.0)}),
        ("rate", {"arrivals": Poisson(2.5)}),
        # The mean stays.
        ("of the prompts above", {"prompts": Histogram(((200, 0.85), (2200, 0.15)))}),
        ("only", {"prompts": LogNormal.from_mean(500, 0.2, 8192)}),
    ],
)
def test_a_shift_halfway_is_proposed_exactly_once_and_soon(what: str, changed: dict[str, object]) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
        before = events(rng, Poisson(5.0), from_s=0.0, until_s=1000.0)
        assert told(machine, before) == []
        after = events(rng, **{"arrivals": Poisson(5.0), "from_s": 1000.0, "until_s": 2500.0, **changed})  # type: ignore[arg-type]
        (asked_s, asked), (proposed_s, proposed) = told(machine, after)
        assert isinstance(asked, Ask)
        assert isinstance(proposed, Propose)
        assert proposed.split == BETTER
        assert what in proposed.reason == asked.reason
        assert asked_s == proposed_s <= 1000.0 + 2 * RULES.window_s + 10.0
        assert len(asked.prompt_tokens) > 200
        assert machine.expected == asked.observed


def test_without_a_shift_nothing_is_asked_in_a_thousand_runs() -> None:
    rules = ReplanRules(window_s=40.0, min_requests=20)
    planned_for = expected_of(1.0)
    for seed in range(1000):
        rng = random.Random(seed)
        machine = Replanning(rules, planned_for, started_s=0.0)
        assert told(machine, events(rng, Poisson(1.0), from_s=0.0, until_s=130.0, look_every_s=2.0)) == [], seed


def test_bursts_are_no_shift() -> None:
    for seed in range(12):
        machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
        happening = events(random.Random(seed), Gamma(5.0, 4.0), from_s=0.0, until_s=1500.0)
        assert told(machine, happening) == [], seed


def test_what_lasts_shorter_than_a_window_is_no_shift() -> None:
    rng = random.Random(1)
    machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
    assert told(machine, events(rng, Poisson(5.0), from_s=0.0, until_s=500.0)) == []
    assert told(machine, events(rng, Poisson(15.0), from_s=500.0, until_s=560.0)) == []
    assert told(machine, events(rng, Poisson(5.0), from_s=560.0, until_s=1500.0)) == []


def test_a_second_shift_is_a_second_question() -> None:
    rng = random.Random(2)
    machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
    assert len(told(machine, events(rng, Poisson(10.0), from_s=0.0, until_s=1000.0))) == 2
    back = told(machine, events(rng, Poisson(5.0), from_s=1000.0, until_s=2000.0))
    assert [type(each) for _, each in back] == [Ask, Propose]
    reason = back[0][1].reason
    assert reason.startswith("rate ")
    assert "instead of 10" in reason or "instead of 9" in reason, "compared with what was seen last"


def test_silence_is_a_shift_of_the_rate_alone() -> None:
    machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
    looks = (Looked(5.0 * number) for number in range(1, 200))
    (_, asked), _ = told(machine, looks)
    assert isinstance(asked, Ask)
    assert asked.observed.rate_rps == pytest.approx(1.0 / RULES.window_s)
    assert asked.observed.mean_prompt_tokens == PLANNED_FOR.mean_prompt_tokens
    assert asked.prompt_tokens == ()


@pytest.mark.parametrize("split", [None, Split("the same", 0.0, "it"), Split("hardly better", 0.04, "it")])
def test_what_gains_nothing_is_asked_and_not_told(split: Split | None) -> None:
    machine = Replanning(RULES, PLANNED_FOR, started_s=0.0)
    happening = events(random.Random(3), Poisson(10.0), from_s=0.0, until_s=1500.0)
    assert [type(each) for _, each in told(machine, happening, split)] == [Ask]


def test_an_answer_that_never_comes_is_waited_for_so_long_and_no_longer() -> None:
    rules = ReplanRules(window_s=100.0, answer_within_s=300.0)
    machine = Replanning(rules, PLANNED_FOR, started_s=0.0)
    rng = random.Random(4)

    def first_ask_s(happening: Iterator[Event]) -> float:
        return next(event.at_s for event in happening for each in machine.handle(event) if isinstance(each, Ask))

    first_s = first_ask_s(events(rng, Poisson(10.0), from_s=0.0, until_s=400.0))
    second_s = first_ask_s(events(rng, Poisson(20.0), from_s=first_s, until_s=1500.0))
    assert second_s >= first_s + rules.answer_within_s
    assert machine.handle(Planned(second_s + 1.0, BETTER)) != []
    assert machine.handle(Planned(second_s + 2.0, BETTER)) == [], "an answer is taken once"


def test_off_sees_nothing_and_apply_applies() -> None:
    def run(mode: str) -> list[type]:
        rules = ReplanRules(window_s=100.0, mode=mode)  # type: ignore[arg-type]
        machine = Replanning(rules, PLANNED_FOR, started_s=0.0)
        happening = events(random.Random(5), Poisson(10.0), from_s=0.0, until_s=600.0)
        return [type(each) for _, each in told(machine, happening)]

    assert run("off") == []
    assert run("propose") == [Ask, Propose]
    assert run("apply") == [Ask, Apply]


def test_what_no_plan_says_is_that_of_the_first_windows_that_are_alike() -> None:
    machine = Replanning(RULES, PartlyExpected(mean_output_tokens=200.0), started_s=0.0)
    rng = random.Random(7)
    assert machine.expected is None
    assert told(machine, events(rng, Poisson(0.5), from_s=0.0, until_s=300.0)) == []
    assert machine.expected is None, "too few requests to know"
    assert told(machine, events(rng, Poisson(5.0), from_s=300.0, until_s=600.0)) == []
    learnt = machine.expected
    assert learnt is not None
    assert learnt.mean_output_tokens == 200.0
    assert learnt.rate_rps == pytest.approx(5.0, rel=0.15), "not that of the time in which it rose"
    assert learnt.mean_prompt_tokens == pytest.approx(500, rel=0.25)
    assert learnt.p95_prompt_tokens > learnt.mean_prompt_tokens
    assert told(machine, events(rng, Poisson(5.0), from_s=600.0, until_s=1500.0)) == []


def test_once_the_workload_is_learnt_a_shift_is_told() -> None:
    machine = Replanning(RULES, PartlyExpected(), started_s=0.0)
    rng = random.Random(8)
    assert told(machine, events(rng, Poisson(5.0), from_s=0.0, until_s=1000.0)) == []
    long_prompts = LogNormal.from_mean(1500, 0.8, 8192)
    after = told(machine, events(rng, Poisson(5.0), from_s=1000.0, until_s=2000.0, prompts=long_prompts))
    assert [type(each) for _, each in after] == [Ask, Propose]
    assert "mean prompt" in after[0][1].reason


def test_what_a_plan_says_is_compared_however_the_rest_is_learnt() -> None:
    said = PartlyExpected(mean_prompt_tokens=200.0, p95_prompt_tokens=600.0, mean_output_tokens=200.0)
    machine = Replanning(RULES, said, started_s=0.0)
    happened = told(machine, events(random.Random(10), Poisson(5.0), from_s=0.0, until_s=1500.0))
    assert [type(each) for _, each in happened] == [Ask, Propose]
    assert happened[0][1].reason.startswith("mean prompt")


def test_without_answers_their_length_is_not_learnt() -> None:
    machine = Replanning(RULES, PartlyExpected(), started_s=0.0)
    happening = events(random.Random(9), Poisson(5.0), from_s=0.0, until_s=500.0)
    assert told(machine, (event for event in happening if not isinstance(event, Answered))) == []
    assert machine.expected is None


def test_a_plan_that_says_all_is_taken_at_its_word() -> None:
    said = PartlyExpected(rate_rps=5.0, mean_prompt_tokens=500.0, p95_prompt_tokens=1500.0, mean_output_tokens=200.0)
    assert Replanning(RULES, said, started_s=0.0).expected == said.whole()
    assert PartlyExpected(rate_rps=5.0).whole() is None


@pytest.mark.parametrize("name", ["rate_rps", "mean_prompt_tokens", "p95_prompt_tokens", "mean_output_tokens"])
def test_a_plan_is_for_some_workload(name: str) -> None:
    figures = {"rate_rps": 1.0, "mean_prompt_tokens": 1.0, "p95_prompt_tokens": 1.0, "mean_output_tokens": 1.0}
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
        Expected(**{**figures, name: 0.0})


@pytest.mark.parametrize("rules", [{"window_s": 0.0}, {"drift": 0.0}, {"min_requests": 0}, {"min_gain": -1.0}])
def test_rules_that_cannot_be_kept_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs"):
        ReplanRules(**rules)  # type: ignore[arg-type]
