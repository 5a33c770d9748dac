"""A study made of a log: its requests, what is assumed of them, and its workers."""

from __future__ import annotations

import msgspec
import pytest

from contracts.errors import ConfigError
from contracts.latency_models import CostCurve, FittedLatency
from coordinator.conductor import ConductorSettings
from coordinator.decision_records import CostKind, Surroundings, WorkerUp
from coordinator.policy.settings import AdmissionRule
from prefill import PrefillLimits
from simulator.rejects.reader import Stretch
from simulator.rejects.rebuild import best_stretch, rebuild
from tests.support.conductors import PLAIN
from tests.support.decision_logs import HEADER, decision


def stretch(*decisions: object, **fields: object) -> Stretch:
    header = msgspec.structs.replace(HEADER, **fields)
    made = Stretch(
        header=header,
        workers={worker.worker_id: worker for worker in header.workers},
        link=header.link,
        costs={kind.number: kind for kind in header.costs},
        answers=header.answers,
    )
    made.decisions.extend(each for each in decisions if isinstance(each, type(decision(""))))
    return made


def test_requests_come_as_their_clients_asked_and_count_once() -> None:
    rebuilt = rebuild(
        stretch(
            decision("b", at_s=11.0, waited_s=0.5, slo_class="x", tenant="t", priority=3),
            decision("a", at_s=11.0, waited_s=1.0, outcome="ttft", slo_class="x"),
            decision("b", at_s=12.0, waited_s=1.5, was_accepted=True, slo_class="x"),
            decision("c", at_s=13.0, waited_s=0.5, outcome="ttft"),
            decision("c", at_s=14.0, waited_s=1.5),
            decision("gone", at_s=13.0, outcome="no_decode"),
            decision("long", at_s=13.0, outcome="too_long"),
            decision("back", at_s=13.5, waited_s=100.0, was_accepted=True),
        )
    )
    assert [(each.last.request, each.arrival_s, each.is_accepted) for each in rebuilt.requests] == [
        ("a", 0.0, False),
        ("b", 0.5, True),
        ("c", 2.5, True),
        ("back", 3.5, True),
    ]
    assert rebuilt.num_left_out == 2
    b = rebuilt.requests[1].workload
    assert (b.slo_class, b.tenant, b.priority, b.prompt_tokens) == ("x", "t", 3, 100)
    assert {each.name for each in rebuilt.slos} == {"x", "(no targets)"}
    assert rebuilt.requests[2].workload.slo_class == "(no targets)"


def test_answers_have_the_mean_length_and_no_more_than_was_allowed() -> None:
    made = stretch(
        decision("means", prompt_tokens=100, max_tokens=200, answer_tokens=150.0),
        decision("short", prompt_tokens=100, max_tokens=16, answer_tokens=16.0),
        decision("other", prompt_tokens=1000, max_tokens=200, answer_tokens=150.4),
        decision("nothing", prompt_tokens=1000, max_tokens=200),
        answers={7: 42.3},
    )
    rebuilt = rebuild(made)
    lengths = {each.last.request: each.workload.output_tokens for each in rebuilt.requests}
    assert lengths == {"means": 42, "short": 16, "other": 150, "nothing": 1}
    assert rebuilt.spec.max_output_tokens == 200


def test_prefixes_are_told_at_the_coarsest_grain_of_all() -> None:
    fine = "0000000100000002000000030000000400000005"
    made = stretch(
        decision("fine", prompt_tokens=80, hints=fine),
        decision("coarse", prompt_tokens=160, hints="000000020000000400000006", hint_blocks=2),
        decision("none"),
    )
    rebuilt = rebuild(made)
    found = {each.last.request: each.workload for each in rebuilt.requests}
    assert {each.hash_block_tokens for each in found.values()} == {32}
    assert found["fine"].hash_ids == (2, 4)
    assert found["coarse"].hash_ids == (2, 4, 6)
    assert found["none"].hash_ids == ()
    assert [group.prefix_cache_tokens for group in rebuilt.spec.groups] == [16_000, 16_000]
    assert rebuild(stretch(decision("none"))).spec.groups[0].prefix_cache_tokens == 0


def test_workers_that_are_alike_are_a_group_and_rules_are_kept() -> None:
    prefill, decode = HEADER.workers
    settings = ConductorSettings(queue_order="shortest", admission=AdmissionRule(tpot_share=0.5))
    rebuilt = rebuild(
        stretch(
            decision("a", waited_s=0.2),
            workers=(
                prefill,
                decode,
                msgspec.structs.replace(decode, worker_id="decode-1", device="other", incarnation=2),
                msgspec.structs.replace(decode, worker_id="decode-2", total_blocks=5),
            ),
            settings=settings,
            surroundings=Surroundings(
                heartbeat_interval_s=0.1, max_sequences={"decode": 9}, queue_ageing_s=3.0, queue_fair=False
            ),
        )
    )
    spec = rebuilt.spec
    assert [(each.role, each.count, each.num_blocks, each.budget.max_sequences) for each in spec.groups] == [
        ("prefill", 1, 1000, 64),
        ("decode", 2, 1000, 9),
        ("decode", 1, 5, 9),
    ]
    rules = spec.groups[0].prefill.queue
    assert (rules.order, rules.ageing_s, rules.fair) == ("shortest", 3.0, False)
    assert spec.conductor == settings
    assert (spec.heartbeat_interval_s, spec.kv_token_bytes, spec.block_tokens) == (0.1, 100, 16)
    assert spec.gateway_s == pytest.approx(0.2 - spec.message_s)


@pytest.mark.parametrize("handoff_blocks", [1, 7, 333, 500])
def test_what_workers_say_of_themselves_comes_before_what_is_said_of_their_roles(handoff_blocks: int) -> None:
    prefill, decode = HEADER.workers
    told = msgspec.structs.replace(prefill, max_batch_tokens=96, max_sequences=5, handoff_blocks=handoff_blocks)
    surroundings = Surroundings(max_sequences={"prefill": 8, "decode": 9}, tpot_chunks=False)
    reader, writer = rebuild(stretch(decision("a"), workers=(told, decode), surroundings=surroundings)).spec.groups
    assert (reader.budget.max_tokens, reader.budget.max_sequences, writer.budget.max_sequences) == (96, 5, 9)
    assert reader.prefill.handoff_blocks(reader.num_blocks) == handoff_blocks
    assert writer.prefill.handoff_blocks(writer.num_blocks) == PrefillLimits().handoff_blocks(1000)
    assert not reader.tpot_chunks


def test_a_store_is_the_study_s_and_no_worker() -> None:
    known = HEADER.workers[0]
    store = WorkerUp(
        at_s=0.0, worker_id="store-0", incarnation=1, role="store", total_blocks=500,
        block_tokens=known.block_tokens, max_context_tokens=0,
    )  # fmt: skip
    rebuilt = rebuild(stretch(decision("a"), workers=(*HEADER.workers, store)))
    alone = rebuild(stretch(decision("a")))
    assert rebuilt.spec.store_tokens == 500 * known.block_tokens
    assert alone.spec.store_tokens == 0
    assert rebuilt.spec.groups == alone.spec.groups
    with pytest.raises(ConfigError, match="no workers"):
        rebuild(stretch(decision("a"), workers=(store,)))


def test_what_a_worker_never_measures_comes_from_others() -> None:
    nothing = CostCurve.line(0.0, 0.0)
    reads = FittedLatency(prefill=PLAIN.prefill, pair_s=1e-9, decode=nothing, context_token_s=0.0)
    writes = FittedLatency(prefill=nothing, pair_s=0.0, decode=PLAIN.decode, context_token_s=1e-8)
    kinds = tuple(
        CostKind(number=number, latency=latency, max_batch_tokens=1, between_steps_s=0.0)
        for number, latency in enumerate((reads, writes))
    )
    prefill, decode = HEADER.workers
    groups = rebuild(
        stretch(decision("a"), costs=kinds, workers=(prefill, msgspec.structs.replace(decode, costs=1)))
    ).spec.groups
    whole = FittedLatency(prefill=PLAIN.prefill, pair_s=1e-9, decode=PLAIN.decode, context_token_s=1e-8)
    assert [group.latency for group in groups] == [whole, whole]


def test_a_worker_of_unknown_costs_takes_after_its_like() -> None:
    prefill, decode = HEADER.workers
    fresh = msgspec.structs.replace(decode, worker_id="decode-1", costs=None)
    (_, group) = rebuild(stretch(decision("a"), workers=(prefill, decode, fresh))).spec.groups
    assert group.count == 2


def test_without_costs_nothing_can_be_replayed() -> None:
    unknown = tuple(msgspec.structs.replace(worker, costs=None) for worker in HEADER.workers)
    with pytest.raises(ConfigError, match="the log does not say what steps cost: no profile"):
        rebuild(stretch(decision("a"), workers=unknown))
    nothing = CostCurve.line(0.0, 0.0)
    reads = FittedLatency(prefill=PLAIN.prefill, pair_s=0.0, decode=nothing, context_token_s=0.0)
    with pytest.raises(ConfigError, match="the log does not say what writing an answer takes"):
        rebuild(stretch(decision("a"), costs=(msgspec.structs.replace(HEADER.costs[0], latency=reads),)))
    formless = (msgspec.structs.replace(HEADER.costs[0], latency=None),)
    with pytest.raises(ConfigError, match="a form without coefficients"):
        rebuild(stretch(decision("a"), costs=formless))
    with pytest.raises(ConfigError, match="has no workers"):
        rebuild(stretch(decision("a"), workers=()))


def test_the_stretch_with_most_refusals_says_most() -> None:
    busy = stretch(*(decision(str(number)) for number in range(9)))
    refusing = stretch(decision("a", outcome="ttft"), decision("b", outcome="no_prefill"))
    assert best_stretch([busy, refusing]) is refusing
    assert best_stretch([stretch(decision("a", outcome="no_prefill")), busy]) is busy
