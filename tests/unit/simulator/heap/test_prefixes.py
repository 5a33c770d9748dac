"""Prefix caches and fetches in studies small enough to be followed by hand: placements are scripted, as a coordinator
with right or stale hints might make them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest

from contracts.transfer_models import LinkTransfer
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.decision import Chosen
from coordinator.policy.settings import AdmissionRule
from engine.compose import StepBudget
from kvstore.fetch_ends import limit_s
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import audit, colocated, disaggregated, study
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.config import DispatchPolicyName
    from contracts.messages import DispatchItem
    from simulator.heap.results import StudyResult
    from simulator.heap.spec import StudySpec, WorkerGroup

#: A millisecond for each prompt token, and nothing else: cached tokens are seen in the time to the first token.
TOKENS = AffineLatency(token_s=0.001, base_s=1e-9, sequence_s=1e-9)
BLOCK = 100
#: Rows are in order of worker id: d-0, p-0, p-1.
AT_P0, AT_P1 = Chosen(1, 0), Chosen(2, 0)


def cached_groups(groups: tuple[WorkerGroup, ...], blocks: int) -> tuple[WorkerGroup, ...]:
    return tuple(replace(group, prefix_cache_tokens=blocks * BLOCK) for group in groups)


def spec_of(*, cache_blocks: int = 50, link_s_per_block: float = 0.0) -> StudySpec:
    """Two prefill workers and a decode worker; a hash block of 100 tokens takes so long on the wire."""
    link = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=BLOCK * 1000 / max(link_s_per_block, 1e-9))
    groups = disaggregated(TOKENS, num_prefill=2, budget=StepBudget(max_tokens=10_000, max_sequences=1))
    return replace(study(cached_groups(groups, cache_blocks), transfer=link), block_tokens=10)


def request(arrival_s: float, hash_ids: Sequence[int], prompt_tokens: int, output_tokens: int = 1) -> WorkloadRequest:
    return WorkloadRequest(arrival_s, prompt_tokens, output_tokens, tuple(hash_ids), BLOCK)


def serve(spec: StudySpec, placements: Sequence[Chosen], requests: Sequence[WorkloadRequest]) -> StudyResult:
    """The request in row n is placed as the n-th says."""

    def decide(_: Conductor, item: DispatchItem, now_s: float, usable: object = None) -> Chosen:
        del now_s, usable
        return placements[int(item.request_id)]

    with mock.patch.object(Conductor, "decide", decide):
        result = simulate(spec, requests)
    audit(result)
    return result


def ttft_s(result: StudyResult) -> list[float]:
    return [round(float(each), 6) for each in result.requests.first_token_s - result.requests.arrival_s]


def test_a_prompt_begins_behind_what_its_worker_has_read() -> None:
    """The second prompt shares 300 tokens with the first; the third is the second again, 350 tokens of which 300 are
    whole blocks; the fourth goes elsewhere."""
    requests = [
        request(0.0, range(5), 500),
        request(10.0, (0, 1, 2, 30), 400),
        request(20.0, (0, 1, 2, 30), 350),
        request(30.0, range(5), 500),
    ]
    result = serve(spec_of(), [AT_P0, AT_P0, AT_P0, AT_P1], requests)
    assert result.requests.cached_tokens.tolist() == [0, 300, 300, 0]
    assert ttft_s(result) == pytest.approx([0.5, 0.1, 0.05, 0.5], abs=1e-5)
    assert [worker.cached_tokens for worker in result.workers] == [600, 0, 0]
    assert [worker.prefill_tokens for worker in result.workers] == [650, 500, 0]


def test_the_last_token_is_always_computed() -> None:
    """And with it its block of the KV pool, which has 10 tokens here."""
    result = serve(spec_of(), [AT_P0, AT_P0], [request(0.0, range(3), 300), request(1.0, range(3), 300)])
    assert result.requests.cached_tokens.tolist() == [0, 290]


def test_attention_to_cached_tokens_is_paid_for() -> None:
    """200 new tokens behind 300: 200 * 300 + 200 * 201 / 2 pairs."""
    latency = AffineLatency(base_s=1e-9, pair_s=1e-6)
    spec = spec_of()
    spec = replace(spec, groups=tuple(replace(group, latency=latency) for group in spec.groups))
    result = serve(spec, [AT_P0, AT_P0], [request(0.0, range(3), 300), request(1.0, range(5), 500)])
    assert ttft_s(result) == pytest.approx([0.045150, 0.080100], abs=1e-6)


def test_the_decode_worker_gets_cached_tokens_too() -> None:
    spec = spec_of()
    result = serve(spec, [AT_P0, AT_P0], [request(0.0, range(5), 500, 3), request(10.0, range(5), 550, 3)])
    assert result.requests.outcome.tolist() == [Outcome.FINISHED] * 2
    assert result.transfer_bytes == (500 + 550) * 1000
    assert result.fetched_bytes == 0


def test_what_is_least_recently_used_makes_room() -> None:
    requests = [
        request(0.0, range(3), 300),
        request(1.0, range(10, 13), 300),
        request(2.0, range(3), 310),
        request(3.0, range(10, 13), 310),
    ]
    result = serve(spec_of(cache_blocks=4), [AT_P0] * 4, requests)
    # Of the first prompt one block had stayed; of the second then one again.
    assert result.requests.cached_tokens.tolist() == [0, 0, 100, 100]


def test_a_prefix_is_fetched_while_others_are_read() -> None:
    """p-1 reads 2 s for another prompt meanwhile; then 400 of 500 tokens are there."""
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    requests = [request(0.0, range(4), 400), request(10.0, range(50, 70), 2000), request(10.5, range(5), 500)]
    result = serve(spec_of(link_s_per_block=0.25), [AT_P0, AT_P1, fetch], requests)
    columns = result.requests
    assert columns.fetched_tokens.tolist() == columns.cached_tokens.tolist() == [0, 0, 400]
    assert columns.fetch_s[2] == pytest.approx(1.0)
    assert result.fetched_bytes == 400 * 1000
    assert ttft_s(result) == pytest.approx([0.4, 2.0, 1.6], abs=1e-5)


def test_others_do_not_wait_for_a_prefix_and_it_is_there_for_the_next() -> None:
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    requests = [
        request(0.0, range(4), 400),
        request(10.0, range(5), 500),
        request(10.1, (), 100)._replace(hash_ids=(77,)),
        request(20.0, range(4), 420),
    ]
    result = serve(spec_of(link_s_per_block=0.25), [AT_P0, fetch, AT_P1, AT_P1], requests)
    assert ttft_s(result) == pytest.approx([0.4, 1.0 + 0.1, 0.1, 0.02], abs=1e-5)
    assert result.requests.fetched_tokens.tolist() == [0, 400, 0, 0]
    assert result.requests.cached_tokens.tolist() == [0, 400, 0, 400]


@pytest.mark.parametrize("cache_blocks", [50, 4])
def test_a_source_gives_what_it_still_has(cache_blocks: int) -> None:
    """A small cache let go two blocks of the prefix for another prompt; the coordinator had not heard of it."""
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    requests = [request(0.0, range(4), 400), request(1.0, (90, 91), 200), request(2.0, range(4), 450)]
    result = serve(spec_of(cache_blocks=cache_blocks), [AT_P0, AT_P0, fetch], requests)
    still = 400 if cache_blocks == 50 else 200
    assert result.requests.fetched_tokens[2] == result.requests.cached_tokens[2] == still
    assert ttft_s(result)[2] == pytest.approx((450 - still) * 0.001, abs=1e-5)


def test_a_source_without_anything_costs_a_question() -> None:
    spec = replace(spec_of(), message_s=0.01)
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    result = serve(spec, [fetch], [request(0.0, range(4), 450)])
    # To the coordinator, back, to the worker; there and back to the source; the token's own message.
    assert ttft_s(result) == pytest.approx([0.03 + 0.02 + 0.45 + 0.01], abs=1e-5)
    assert result.requests.fetched_tokens.tolist() == [0]


def test_a_fetch_that_takes_too_long_is_left_alone() -> None:
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    requests = [request(0.0, range(4), 400), request(10.0, range(4), 450), request(30.0, range(4), 450)]
    result = serve(spec_of(link_s_per_block=2.0), [AT_P0, fetch, AT_P1], requests)
    assert ttft_s(result)[1] == pytest.approx(limit_s(400 * 1000) + 0.45, abs=1e-5)
    assert result.requests.fetched_tokens.tolist() == [0, 0, 0]
    # Its own reading filled the cache.
    assert result.requests.cached_tokens.tolist() == [0, 0, 400]


def test_a_request_that_is_given_up_while_it_fetches_leaves_nothing() -> None:
    spec = replace(spec_of(link_s_per_block=0.5), request_timeout_s=1.5)
    fetch = Chosen(2, 0, local_blocks=0, source_row=1, source_blocks=4)
    requests = [request(0.0, range(4), 400), request(10.0, range(4), 450), request(20.0, range(4), 450)]
    result = serve(spec, [AT_P0, fetch, AT_P1], requests)
    assert result.requests.outcome.tolist() == [Outcome.FINISHED, Outcome.TIMED_OUT, Outcome.FINISHED]
    assert result.requests.cached_tokens[2] == 0


def test_mixed_workers_have_caches_too() -> None:
    groups = cached_groups(colocated(TOKENS), 50)
    spec = replace(study(groups), block_tokens=10)
    here = Chosen(0, 0)
    result = serve(spec, [here, here], [request(0.0, range(4), 400, 5), request(10.0, range(4), 450, 5)])
    assert result.requests.cached_tokens.tolist() == [0, 400]


def test_hash_ids_of_two_sizes_do_not_mix() -> None:
    requests = [request(0.0, range(4), 400), request(1.0, range(4), 400)._replace(hash_block_tokens=50)]
    with pytest.raises(ValueError, match="blocks of 50 and of 100 tokens do not mix"):
        serve(spec_of(), [AT_P0, AT_P0], requests)


# --- with the production policies ---------------------------------------------------------------------------


def hot_prefix(policy: DispatchPolicyName) -> StudyResult:
    """A prompt that p-0 has read, then long ones that begin alike, faster than one worker can read their rest."""
    tail = itertools.count(1000)
    requests = [request(0.0, range(40), 4000)]
    requests += [request(10.0 + 0.5 * number, (*range(40), *itertools.islice(tail, 10)), 5000) for number in range(8)]
    spec = replace(spec_of(cache_blocks=500, link_s_per_block=0.001), conductor=ConductorSettings(policy=policy))
    result = simulate(spec, requests)
    audit(result)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    return result


def test_a_hot_prefix_is_copied_to_where_load_sends_its_requests() -> None:
    """Without copying the other worker computes the prefix itself, or stays idle."""
    copied, alone = hot_prefix("ttft_min"), hot_prefix("prefix_only")
    assert copied.requests.fetched_tokens.sum() == 4000
    assert (copied.requests.cached_tokens[1:] == 4000).all()
    assert alone.requests.fetched_tokens.sum() == alone.fetched_bytes == 0
    assert np.mean(ttft_s(copied)) < 0.8 * np.mean(ttft_s(alone))
    assert {int(each) for each in copied.requests.prefill_worker} == {0, 1}


def test_predictions_are_exact_where_nothing_unknown_happens() -> None:
    columns = hot_prefix("ttft_min").requests
    predicted_s = columns.predicted_ttft_s
    assert predicted_s == pytest.approx(columns.first_token_s - columns.arrival_s, rel=0.02)


def test_the_coordinator_hears_of_blocks_a_little_later() -> None:
    """Until then it expects that a prompt like the last one has to be computed whole."""
    requests = [request(0.0, range(5), 500), request(0.55, range(5), 500), request(2.0, range(5), 500)]
    spec = replace(spec_of(), block_events_s=0.1, conductor=ConductorSettings(policy="prefix_only"))
    late = simulate(replace(spec, block_events_s=10.0), requests).requests
    soon = simulate(spec, requests).requests
    assert soon.cached_tokens.tolist() == late.cached_tokens.tolist() == [0, 490, 490]
    assert soon.predicted_ttft_s == pytest.approx([0.5, 0.5, 0.1], abs=1e-3)
    assert late.predicted_ttft_s == pytest.approx([0.5, 0.5, 0.5], abs=1e-3)


# --- the store --------------------------------------------------------------------------------------------

#: Rows: d-0, p-0, p-1, store-0.
FROM_STORE = Chosen(2, 0, local_blocks=0, source_row=3, source_blocks=4)


def test_what_was_read_can_be_fetched_from_the_store() -> None:
    """p-0 let it go meanwhile, for its cache is small."""
    spec = replace(spec_of(cache_blocks=4, link_s_per_block=0.01), store_tokens=50 * BLOCK)
    requests = [request(0.0, range(4), 400), request(5.0, range(90, 94), 400), request(20.0, range(4), 450)]
    result = serve(spec, [AT_P0, AT_P0, FROM_STORE], requests)
    assert result.requests.cached_tokens.tolist() == [0, 0, 400]
    assert result.requests.fetched_tokens.tolist() == [0, 0, 400]
    assert ttft_s(result)[2] == pytest.approx(0.04 + 0.05, abs=1e-5)
    # The last prompt was there already.
    assert (result.stored_bytes, result.fetched_bytes, result.transfer_bytes) == (800_000, 400_000, 0)


def test_the_store_copies_what_it_lacks_and_lets_the_least_used_go() -> None:
    spec = replace(spec_of(), store_tokens=5 * BLOCK)
    requests = [request(0.0, range(4), 400), request(5.0, range(6), 600), request(10.0, range(80, 84), 400)]
    last = request(20.0, range(4), 450)
    result = serve(spec, [AT_P0, AT_P0, AT_P0, FROM_STORE], [*requests, last])
    # 4, 2 more of which one has room, 4 others: of the first prompts the beginning is left, and the rest of it comes.
    assert result.requests.fetched_tokens[3] == 100
    assert result.stored_bytes == (4 + 2 + 4 + 3) * BLOCK * 1000


def test_a_store_needs_room_for_a_block_and_prompts_that_begin_alike() -> None:
    for spec in (replace(spec_of(), store_tokens=BLOCK - 1), spec_of()):
        assert serve(spec, [AT_P0], [request(0.0, range(4), 400)]).stored_bytes == 0
    plain = replace(spec_of(), store_tokens=50 * BLOCK)
    assert serve(plain, [AT_P0], [WorkloadRequest(0.0, 400, 1)]).stored_bytes == 0
    groups = tuple(replace(group, name="store") for group in spec_of().groups[:1])
    with pytest.raises(ValueError, match="as the store is"):
        simulate(replace(plain, groups=groups), [])


def test_a_store_spares_reading_where_caches_are_small() -> None:
    """Conversations whose turns come after the worker's cache has let them go."""
    turns = [
        request(30.0 * turn + 0.8 * chat, range(1000 * chat, 1000 * chat + 3 * turn + 3), 300 * turn + 320)
        for turn in range(4)
        for chat in range(20)
    ]
    settings = ConductorSettings(admission=AdmissionRule(form="none"))
    cached: list[int] = []
    for store_tokens in (0, 1000 * BLOCK):
        spec = replace(spec_of(cache_blocks=15, link_s_per_block=0.001), store_tokens=store_tokens, conductor=settings)
        result = simulate(spec, turns)
        audit(result)
        cached.append(int(result.requests.cached_tokens.sum()))
    # All but each turn's new words.
    assert cached == [pytest.approx(0, abs=8000), 20 * (300 + 600 + 900)]
