"""Which requests are refused for their targets, what they are told, and when they may come again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contracts.ids import WorkerId
from contracts.messages import Placement, Predicted, Rejection, WorkerLoad
from coordinator.conductor import AdmissionRule, Conductor, ConductorSettings
from coordinator.decision import Chosen, Refused
from coordinator.policy.admission import Limits, admit, limits_of
from tests.support.conductors import MILLI, Costs, conductor_of, info_of, item_of
from workload.slo import SloClass

if TYPE_CHECKING:
    from contracts.config import AdmissionForm

#: Prompts of up to 512 tokens in an empty queue, and 40 answers in a step.
SLO = SloClass("chat", 512 * MILLI * 1e3, 50 * MILLI * 1e3)
LIMITS = Limits(1.0, 0.1, 1.0, 0.1)


def best(ttft_s: float, tpot_s: float) -> Chosen:
    predicted = Predicted(waited_s=0.0, queue_s=0.0, transfer_s=0.0, prefill_s=ttft_s, ttft_s=ttft_s, tpot_s=tpot_s)
    return Chosen(0, 1, predicted=predicted)


def judged(chosen: Chosen, *, form: AdmissionForm = "predicted", tpot_now_s: float = 0.0, **item: object) -> str | None:
    ask = item_of(**item)  # type: ignore[arg-type]
    rule = AdmissionRule(form=form)
    refused = admit(ask, chosen, LIMITS, rule, tpot_now_s=tpot_now_s, answer_s=4.0, chance=0.0)
    return None if refused is None else refused.why


def test_the_two_targets() -> None:
    assert judged(best(1.0, 0.1)) is None
    assert judged(best(1.001, 0.1)) == "ttft"
    assert judged(best(1.0, 0.101)) == "tpot"
    assert judged(best(2.0, 1.0)) == "ttft"


def test_who_is_never_refused() -> None:
    late = best(2.0, 1.0)
    assert judged(late, was_accepted=True) is None
    assert judged(late, form="none") is None
    assert judged(late._replace(predicted=None)) is None
    assert judged(best(0.5, 1.0), max_tokens=1) is None, "there is no second token"


def test_the_present_load_or_the_expected_one() -> None:
    assert judged(best(0.5, 0.5), form="current", tpot_now_s=0.05) is None
    assert judged(best(0.5, 0.05), form="current", tpot_now_s=0.5) == "tpot"
    assert judged(best(0.5, 0.05), form="predicted", tpot_now_s=0.5) is None
    assert judged(best(2.0, 0.05), form="current", tpot_now_s=0.05) == "ttft"


def test_shares_and_hysteresis() -> None:
    rule = AdmissionRule(ttft_share=0.5, tpot_share=2.0, hysteresis=0.25)
    slo = SloClass("c", 1000.0, 100.0)
    assert limits_of(slo, rule, 1.0, was_refused=False) == pytest.approx((0.5, 0.2, 1.0, 0.1))
    assert limits_of(slo, rule, 1.0, was_refused=True) == pytest.approx((0.375, 0.15, 1.0, 0.1))
    assert limits_of(slo, rule, 0.5, was_refused=False) == pytest.approx((0.25, 0.2, 1.0, 0.1))


@pytest.mark.parametrize(
    ("chosen", "chance", "retry_after_s"),
    [
        (best(3.0, 0.1), 0.0, 2.0),
        (best(3.0, 0.1), 0.5, 3.0),
        (best(1.0001, 0.1), 0.9, 0.1),
        (best(500.0, 0.1), 0.0, 30.0),
        # The answers end with a time constant of 4 s: half of them after 4 s times log 2.
        (best(1.0, 0.2), 0.0, 4.0 * 0.6931),
    ],
)
def test_when_to_come_again(chosen: Chosen, chance: float, retry_after_s: float) -> None:
    refused = admit(item_of(), chosen, LIMITS, AdmissionRule(), tpot_now_s=0.0, answer_s=4.0, chance=chance)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(retry_after_s, rel=1e-3)
    assert (refused.code, refused.best) == ("slo_unattainable", chosen)


# --- in a conductor ---------------------------------------------------------------------------------------


def conductor(
    form: AdmissionForm = "predicted", pending: int = 0, decodes: int = 0, hysteresis: float = 0.25
) -> Conductor:
    return conductor_of(
        [
            (info_of("p0"), WorkerLoad(pending_prompt_tokens=pending)),
            (info_of("d0"), WorkerLoad(running_decodes=decodes, free_blocks=1000)),
        ],
        slos=[SLO],
        default_slo="chat",
        settings=ConductorSettings(admission=AdmissionRule(form=form, hysteresis=hysteresis)),
    )


def test_a_refusal_has_its_numbers() -> None:
    made = conductor(pending=500)
    ask = item_of(100, waited_s=0.125)
    decision = made.decide(ask, 0.0)
    assert isinstance(decision, Refused)
    verdict = made.in_words(ask, decision, 0.0)
    assert isinstance(verdict, Rejection)
    assert (verdict.code, verdict.reason) == ("slo_unattainable", "ttft")
    assert verdict.message == (
        "predicted time to first token 711 ms (waited 125, queue 488, fetching 0, prefill 98) is above the 500 ms that "
        "its class allows"
    )
    assert verdict.predicted is not None
    assert verdict.predicted.ttft_s == 0.125 + 600 * MILLI
    excess_s = 0.125 + 88 * MILLI
    assert excess_s <= verdict.retry_after_s <= 2 * excess_s


def test_too_many_answers() -> None:
    made = conductor(decodes=60)
    ask = item_of(100, 400)
    verdict = made.in_words(ask, made.decide(ask, 0.0), 0.0)
    assert isinstance(verdict, Rejection)
    assert verdict.reason == "tpot"
    assert "is above the 48.8 ms that its class allows" in verdict.message


def test_a_refusal_books_nothing() -> None:
    made = conductor(pending=500)
    before = made.fleet.view().prefill_load_tokens.tolist()
    for _ in range(3):
        assert isinstance(made.decide(item_of(100), 0.0), Refused)
    assert made.fleet.view().prefill_load_tokens.tolist() == before
    assert made.fleet.outlook().queue_s(0, 0.0).max() == 500 * MILLI


def test_after_a_refusal_it_takes_a_little_more() -> None:
    made = conductor(pending=412, hysteresis=0.25)
    assert isinstance(made.decide(item_of(100), 0.0), Chosen), "exactly the target"
    made = conductor(pending=413, hysteresis=0.25)
    assert isinstance(made.decide(item_of(100), 0.0), Refused)
    assert isinstance(made.decide(item_of(99), 0.0), Refused), (
        "it would have met the target, but not three quarters of it"
    )
    assert isinstance(made.decide(item_of(100), 100 * MILLI), Refused)
    assert isinstance(made.decide(item_of(200, was_accepted=True), 0.25), Chosen)
    assert isinstance(made.decide(item_of(100), 0.25), Refused), "that one was not judged"
    assert isinstance(made.decide(item_of(10), 0.3), Chosen)
    assert isinstance(made.decide(item_of(100), 0.3), Chosen), "one was accepted, so all of it counts again"


def test_classes_do_not_mind_each_other() -> None:
    other = SloClass("other", 512 * MILLI * 1e3, 50.0)
    made = conductor_of(
        [(info_of("p0"), WorkerLoad(pending_prompt_tokens=450)), "d0"],
        slos=[SLO, other],
        settings=ConductorSettings(admission=AdmissionRule(hysteresis=0.25)),
    )
    assert isinstance(made.decide(item_of(100, slo_class="chat"), 0.0), Refused)
    assert isinstance(made.decide(item_of(50, slo_class="chat"), 0.0), Refused)
    assert isinstance(made.decide(item_of(50, slo_class="other"), 0.0), Chosen)


@pytest.mark.parametrize(("name", "default"), [("", None), ("unheard-of", None), ("chat", None), ("", "chat")])
def test_only_classes_with_targets(name: str, default: str | None) -> None:
    made = conductor_of(
        [(info_of("p0"), WorkerLoad(pending_prompt_tokens=5000)), "d0"], slos=[SLO], default_slo=default
    )
    ask = item_of(100, slo_class=name)
    verdict = made.in_words(ask, made.decide(ask, 0.0), 0.0)
    has_targets = "chat" in (name, default)
    assert isinstance(verdict, Rejection if has_targets else Placement)


def test_nothing_is_refused_while_nothing_is_known() -> None:
    made = conductor_of(
        [(info_of("p0"), WorkerLoad(pending_prompt_tokens=10**6)), "d0"],
        slos=[SLO],
        default_slo="chat",
        costs=Costs(common=None),
    )
    assert isinstance(made.decide(item_of(100), 0.0), Chosen)


# --- the forecast -----------------------------------------------------------------------------------------

#: Reading a prompt of 1,000 tokens takes a second; 30 answers fit into the target.
FORECAST_SLO = SloClass("chat", 60_000.0, 40 * MILLI * 1e3)


def accepted_of_a_burst(form: AdmissionForm) -> int:
    """80 prompts at once, on idle workers: all will be written at the same time, more or less."""
    made = conductor_of(
        [
            *(f"p{n}" for n in range(8)),
            (info_of("d0", blocks=100_000, max_context_tokens=8192), WorkerLoad(free_blocks=100_000)),
        ],
        slos=[FORECAST_SLO],
        default_slo="chat",
        settings=ConductorSettings(admission=AdmissionRule(form=form)),
    )
    return sum(isinstance(made.decide(item_of(1000, 4000), 0.0), Chosen) for _ in range(80))


def test_answers_of_prompts_that_are_still_read_count() -> None:
    assert accepted_of_a_burst("none") == 80
    assert accepted_of_a_burst("current") == 80, "nobody writes anything yet"
    assert 30 <= accepted_of_a_burst("predicted") <= 60


def test_answers_that_will_have_ended_do_not_count() -> None:
    """The decode worker is full now; the prompt takes so long that many of its answers will be over."""
    for form, accepted in (("current", False), ("predicted", True)):
        made = conductor_of(
            [
                (info_of("p0"), WorkerLoad(pending_prompt_tokens=20_000)),
                (info_of("d0"), WorkerLoad(running_decodes=40, free_blocks=1000)),
            ],
            slos=[FORECAST_SLO],
            default_slo="chat",
            settings=ConductorSettings(admission=AdmissionRule(form=form)),  # type: ignore[arg-type]
        )
        assert isinstance(made.decide(item_of(100, 200), 0.0), Chosen) == accepted


def test_inputs_for_the_log() -> None:
    made = conductor(pending=500, decodes=20)
    refusal = made.decide(item_of(100, 400, blocks=range(6)), 0.0)
    inputs = made.inputs()
    assert isinstance(refusal, Refused)
    assert (inputs.pending_tokens, inputs.waiting_requests) == (500, 0)
    assert (inputs.slo_class, inputs.was_refused, inputs.best_held_blocks) == ("chat", False, 0)
    assert inputs.limits == pytest.approx((512 * MILLI, 50 * MILLI, 512 * MILLI, 50 * MILLI))
    assert (inputs.num_decodes, inputs.answer_tokens) == (20.0, 256.0)
    assert 0 < inputs.num_decodes_then < 20, "some will have ended"
    made.decide(item_of(100, 400), 0.0)
    assert made.inputs().was_refused
    made.report(WorkerId("p0"), WorkerLoad(), 1.0)
    made.decide(item_of(10, 400, slo_class="x"), 1.0)
    assert made.inputs().slo_class == "chat"


def test_a_placement_s_own_load_is_no_input_of_it() -> None:
    made = conductor_of(["p0", "d0"])
    for others in range(3):
        assert isinstance(made.decide(item_of(600, 100, name=str(others)), 0.0), Chosen)
        inputs = made.inputs()
        assert (inputs.pending_tokens, inputs.waiting_requests) == (600 * others, others)
        assert (inputs.num_decodes, inputs.context_tokens) == (0.0, 0.0)
        assert (inputs.num_decodes_then > 0, inputs.context_tokens_then > 0) == (others > 0, others > 0)
    made.decide(item_of(100_000), 0.0)
    assert made.inputs()[-6:] == (0, 0, 0.0, 0.0, 0.0, 0.0), "it fits into no worker"


def test_words_need_a_decision() -> None:
    with pytest.raises(ValueError, match="nothing has been decided"):
        conductor().inputs()
