"""Costs follow the profile as long as the workers agree with it, and what they measure where they do not."""

from __future__ import annotations

import math
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import Incarnation, WorkerId
from contracts.latency import StepWork
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import LatencyFit, LinkReport, Role, TransferReport, WorkerInfo
from contracts.transfer_models import LinkTransfer
from coordinator.live_costs import LiveCostLimits, LiveCosts
from coordinator.live_links import UNMEASURED_LINK
from tests.support.profiles import PROFILE

LIMITS = LiveCostLimits()
LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32")
NO_STEPS = LatencyFit(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
#: As a worker of the profile would fit its steps: of chunks of 64 tokens and more, and of decodes.
CHUNK = StepWork(prefill_tokens=512, prefill_pairs=512 * 513 / 2, num_chunks=1)
DECODES = StepWork(num_decodes=8, context_tokens=8 * 512)


def info_of(
    name: str = "w0", role: Role = "mixed", fingerprint: str = "f00d", incarnation: int = 1, budget: int = 512
) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(incarnation),
        role=role,
        address=f"{name}:1",
        model="m",
        identity=KvIdentity(model_fingerprint=fingerprint, layout=LAYOUT, rope_base=1e4, protocol_version=1),
        total_blocks=100,
        max_context_tokens=2048,
        max_batch_tokens=budget,
    )


def fit(
    *, prefill: float = 1.0, decode: float = 1.0, prefill_steps: int = 1000, decode_steps: int = 1000
) -> LatencyFit:
    """Lines close to the profile's curves, times a factor."""
    return LatencyFit(
        0.0001 * prefill, 0.2 / 512 * prefill, 1e-8 * prefill,
        0.01 * decode, 0.001 * decode, 1e-6 * decode,
        prefill_steps, decode_steps,
    )  # fmt: skip


def step_s(costs: LiveCosts, info: WorkerInfo, work: StepWork) -> float:
    found = costs.of(info)
    assert found is not None
    return found.latency.step_s(work)


def test_a_profile_stands_while_the_workers_agree_with_it() -> None:
    costs = LiveCosts(PROFILE)
    info = info_of()
    first = costs.of(info)
    assert first is not None
    assert (first.latency, first.max_batch_tokens) == (PROFILE.latency, 512)
    assert first.between_steps_s == PROFILE.step_overhead_s
    for factor in (0.85, 1.0, 1.15):
        assert not costs.observe(info, fit(prefill=factor, decode=factor))
    assert costs.of(info) is first


def test_few_steps_do_not_disprove_a_profile() -> None:
    costs = LiveCosts(PROFILE)
    assert not costs.observe(info_of(), fit(prefill=3.0, decode=3.0, prefill_steps=199, decode_steps=199))
    assert costs.observe(info_of(), fit(prefill=3.0, decode=3.0, prefill_steps=200, decode_steps=199))
    assert step_s(costs, info_of(), DECODES) == PROFILE.latency.step_s(DECODES)


@pytest.mark.parametrize("factor", [0.4, 0.7, 1.3, 2.0, 5.0])
def test_many_steps_scale_it_each_kind_apart(factor: float) -> None:
    costs = LiveCosts(PROFILE)
    info = info_of()
    assert costs.observe(info, fit(decode=factor))
    assert step_s(costs, info, CHUNK) == PROFILE.latency.step_s(CHUNK)
    assert step_s(costs, info, DECODES) == pytest.approx(PROFILE.latency.step_s(DECODES) * factor, rel=0.06)
    other = LiveCosts(PROFILE)
    assert other.observe(info, fit(prefill=factor))
    assert step_s(other, info, DECODES) == PROFILE.latency.step_s(DECODES)
    assert step_s(other, info, CHUNK) == pytest.approx(PROFILE.latency.step_s(CHUNK) * factor, rel=0.12)


def test_a_scale_does_not_flicker() -> None:
    """Noise of a few percent, wherever it lies, changes a worker's kind at most once."""
    for middle in (1.0, 1.19, 1.21, 1.26, 1.3, 1.38, 2.0):
        costs = LiveCosts(PROFILE)
        rng = random.Random(7)
        info = info_of()
        changes = sum(costs.observe(info, fit(decode=middle * rng.uniform(0.97, 1.03))) for _ in range(500))
        assert changes <= 1, middle


def test_what_is_over_is_forgotten_again() -> None:
    costs = LiveCosts(PROFILE)
    info = info_of()
    first = costs.of(info)
    assert costs.observe(info, fit(decode=2.0))
    assert costs.observe(info, fit(decode=1.0))
    assert costs.of(info) is first


def test_equal_workers_are_of_one_kind() -> None:
    """However many there are, and whatever noise: kinds are few."""
    costs = LiveCosts(PROFILE)
    rng = random.Random(3)
    infos = [info_of(f"w{number}") for number in range(200)]
    for info in infos:
        slow = 1.5 if info.worker_id.endswith("7") else 1.0
        costs.observe(info, fit(decode=slow * rng.uniform(0.97, 1.03), prefill=slow * rng.uniform(0.97, 1.03)))
    kinds = {id(costs.of(info)) for info in infos}
    assert 2 <= len(kinds) <= 5


def test_a_profile_of_another_model_says_nothing() -> None:
    costs = LiveCosts(PROFILE)
    assert costs.of(info_of(fingerprint="beef")) is None
    assert costs.of(info_of("w1")) is not None


# --- without a profile ----------------------------------------------------------------------------------


def test_without_profile_a_fit_counts_once_it_rests_on_enough_steps() -> None:
    costs = LiveCosts()
    info = info_of()
    assert costs.of(info) is None
    assert not costs.observe(info, fit(prefill_steps=31, decode_steps=31))
    assert costs.of(info) is None
    assert not costs.observe(info, fit(prefill_steps=32, decode_steps=31)), "a mixed worker decodes too"
    assert costs.observe(info, fit(prefill_steps=32, decode_steps=32))
    found = costs.of(info)
    assert found is not None
    told = fit()
    assert found.latency.step_s(DECODES) == pytest.approx(
        told.decode_base_s + 8 * told.sequence_s + DECODES.context_tokens * told.context_token_s
    )
    assert found.latency.step_s(CHUNK) == pytest.approx(
        told.prefill_base_s + 512 * told.prefill_token_s + CHUNK.prefill_pairs * told.pair_s
    )


@pytest.mark.parametrize(("role", "steps"), [("prefill", (32, 0)), ("decode", (0, 32))])
def test_a_role_needs_its_own_kind_of_step_only(role: Role, steps: tuple[int, int]) -> None:
    costs = LiveCosts()
    assert costs.observe(info_of(role=role), fit(prefill_steps=steps[0], decode_steps=steps[1]))
    assert costs.of(info_of(role=role)) is not None


def test_workers_learn_from_each_other_whatever_their_roles() -> None:
    costs = LiveCosts()
    mixed = info_of("m")
    assert costs.of(mixed) is None
    costs.observe(info_of("p", "prefill"), fit(decode_steps=0))
    costs.observe(info_of("d", "decode"), fit(prefill_steps=0))
    assert costs.of(mixed) is None, "answers change only when that worker is observed"
    assert costs.observe(mixed, NO_STEPS)
    assert costs.of(mixed) is not None
    assert costs.of(info_of("n")) is costs.of(mixed), "one who comes later knows it from the start"
    assert costs.of(info_of("o", budget=64)) is None, "steps of another size"


def test_base_costs_are_the_mean_and_follow_what_changes() -> None:
    costs = LiveCosts()
    infos = [info_of(f"d{number}", "decode") for number in range(4)]

    def hear(factor: float) -> list[bool]:
        return [
            costs.observe(info, fit(decode=factor * spread))
            for info, spread in zip(infos, (0.94, 0.98, 1.02, 1.06), strict=True)
        ]

    hear(1.0)
    hear(1.0)
    expected_s = fit().decode_base_s + 8 * fit().sequence_s + DECODES.context_tokens * fit().context_token_s
    assert step_s(costs, infos[0], DECODES) == pytest.approx(expected_s, rel=0.07)
    before = costs.of(infos[0])
    for _ in range(5):
        assert not any(hear(1.02)), "small changes are none"
    assert costs.of(infos[0]) is before
    for _ in range(4):
        hear(1.5)
    assert {id(costs.of(info)) for info in infos} == {id(costs.of(infos[0]))}
    assert step_s(costs, infos[0], DECODES) == pytest.approx(1.5 * expected_s, rel=0.07)


def test_who_left_does_not_count_any_more() -> None:
    costs = LiveCosts()
    stays, leaves = info_of("a", "decode"), info_of("b", "decode")
    for _ in range(3):
        costs.observe(stays, fit(decode=1.0))
        costs.observe(leaves, fit(decode=1.15))
    for _ in range(5):
        costs.observe(stays, fit(decode=1.0))
    expected_s = fit().decode_base_s + 8 * fit().sequence_s + DECODES.context_tokens * fit().context_token_s
    assert step_s(costs, stays, DECODES) == pytest.approx(expected_s)


def test_a_new_life_begins_with_what_the_others_cost() -> None:
    costs = LiveCosts(PROFILE)
    costs.observe(info_of(), fit(decode=4.0))
    assert step_s(costs, info_of(incarnation=2), DECODES) == PROFILE.latency.step_s(DECODES)
    assert not costs.observe(info_of(incarnation=2), NO_STEPS), "what its last life told is gone"


# --- robustness -----------------------------------------------------------------------------------------

_any_float = st.one_of(st.floats(), st.floats(0, 10), st.floats(0, 1e-6))
_fits = st.builds(
    LatencyFit,
    _any_float, _any_float, _any_float, _any_float, _any_float, _any_float,
    st.integers(-5, 10**6), st.integers(-5, 10**6),
)  # fmt: skip


@given(
    heard=st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), _fits), max_size=12),
    role=st.sampled_from(["prefill", "decode", "mixed"]),
    is_profiled=st.booleans(),
)
def test_whatever_is_told_costs_are_costs(heard: list[tuple[str, LatencyFit]], role: Role, is_profiled: bool) -> None:
    costs = LiveCosts(PROFILE if is_profiled else None)
    last = {name: costs.of(info_of(name, role)) for name in ("a", "b", "c")}
    for name, told in heard:
        changed = costs.observe(info_of(name, role), told)
        for other in last:
            now = costs.of(info_of(other, role))
            assert (now is not last[other]) == (changed and other == name)
            last[other] = now
            if now is not None:
                for work in (CHUNK, DECODES):
                    assert 0 <= now.latency.step_s(work) < math.inf


def test_memory_is_bounded() -> None:
    limits = LiveCostLimits(max_workers=8, max_link_workers=4)
    costs = LiveCosts(PROFILE, limits)
    link = LinkReport(peer=WorkerId("x"), transport="shm", bandwidth_bytes_per_s=1e9, chosen=True)
    for number in range(50):
        costs.observe(info_of(f"w{number}"), fit(decode=3.0))
        costs.observe_transfers(WorkerId(f"w{number}"), TransferReport(links=(link,)))
    assert costs.num_remembered <= 8 + 4


# --- links ----------------------------------------------------------------------------------------------


def report(*bandwidths: float | None, chosen: bool = True, latency_s: float = 1e-3) -> TransferReport:
    return TransferReport(
        links=tuple(
            LinkReport(
                peer=WorkerId(f"x{number}"), transport="shm", bandwidth_bytes_per_s=each, latency_s=latency_s,
                chosen=chosen,
            )
            for number, each in enumerate(bandwidths)
        )
    )  # fmt: skip


def test_links_are_guessed_slow_until_they_are_measured() -> None:
    costs = LiveCosts()
    assert costs.transfer == UNMEASURED_LINK
    costs.observe_transfers(WorkerId("a"), report(None, 9e9, chosen=False))
    assert costs.transfer == UNMEASURED_LINK, "nothing goes that way"
    costs.observe_transfers(WorkerId("a"), report(4e9, 6e9, 20e9))
    assert costs.transfer == LinkTransfer(latency_s=1e-3, bandwidth_bytes_s=6e9)
    costs.observe_transfers(WorkerId("b"), report(6.2e9))
    assert costs.transfer.bandwidth_bytes_s == 6e9, "nearly the same"
    costs.observe_transfers(WorkerId("c"), report(8e9))
    costs.observe_transfers(WorkerId("d"), report(8e9))
    assert costs.transfer.bandwidth_bytes_s == pytest.approx(7.1e9)


def test_a_profile_s_link_stands_while_the_measured_ones_agree() -> None:
    costs = LiveCosts(PROFILE)
    costs.observe_transfers(WorkerId("a"), report(1.1e9))
    assert costs.transfer is PROFILE.transfer
    costs.observe_transfers(WorkerId("a"), report(0.5e9))
    assert costs.transfer.bandwidth_bytes_s == 0.5e9


def test_workers_that_are_gone_do_not_count() -> None:
    costs = LiveCosts()
    for number in range(10):
        costs.observe_transfers(WorkerId(f"old{number}"), report(1e8))
    for number in range(9):
        costs.observe_transfers(WorkerId(f"new{number}"), report(1e10))
    assert costs.transfer.bandwidth_bytes_s == 1e8
    for number in range(10):
        costs.forget_links(WorkerId(f"old{number}"))
    costs.forget_links(WorkerId("never heard of"))
    assert costs.transfer.bandwidth_bytes_s == 1e10
    for number in range(9):
        costs.forget_links(WorkerId(f"new{number}"))
    assert costs.transfer.bandwidth_bytes_s == 1e10, "the last that is known"


@pytest.mark.parametrize("profiled", [True, False])
def test_latency_alone_counts(profiled: bool) -> None:
    costs = LiveCosts(PROFILE if profiled else None)
    link = PROFILE.transfer
    assert link is not None
    bandwidth = link.bandwidth_bytes_s
    costs.observe_transfers(WorkerId("a"), report(bandwidth, latency_s=link.latency_s))
    before = costs.transfer
    costs.observe_transfers(WorkerId("a"), report(bandwidth, latency_s=link.latency_s + 1e-6))
    assert costs.transfer is before
    costs.observe_transfers(WorkerId("a"), report(bandwidth, latency_s=0.1))
    assert costs.transfer.latency_s == 0.1


def test_absurd_links_are_not_believed() -> None:
    costs = LiveCosts()
    costs.observe_transfers(WorkerId("c"), report(5e-324, 1e300))
    costs.observe_transfers(WorkerId("d"), report(1e9, latency_s=1e300))
    costs.observe_transfers(WorkerId("a"), report(0.0, -1.0, math.inf, math.nan))
    costs.observe_transfers(WorkerId("b"), report(1e9, latency_s=math.nan))
    assert costs.transfer == UNMEASURED_LINK


def test_pairs_that_differ_from_the_common_way_are_told() -> None:
    """Most ways are over a network; p0's to s0 is through memory, and p1's to it is worse than all."""
    costs = LiveCosts()
    for number in range(6):
        costs.observe_transfers(WorkerId(f"a{number}"), report(1e9))
    assert costs.pairs is None, "noise apart, all are alike"
    costs.observe_transfers(WorkerId("p0"), report(8e9, 1.1e9))
    costs.observe_transfers(WorkerId("p1"), report(0.25e9))
    assert costs.pairs is not None
    powers = {name: costs.pairs.power(WorkerId("x0"), WorkerId(name)) for name in ("a0", "p0", "p1", "unknown")}
    assert powers == {"a0": 0, "p0": -3, "p1": 2, "unknown": 0}
    assert costs.pairs.power(WorkerId("x1"), WorkerId("p0")) == 0
    for name in ("p0", "p1"):
        costs.forget_links(WorkerId(name))
    assert costs.pairs is None


def test_pairs_are_seen_anew_when_the_common_way_changes() -> None:
    costs = LiveCosts()
    costs.observe_transfers(WorkerId("a"), report(1e9))
    for number in range(4):
        costs.observe_transfers(WorkerId(f"b{number}"), report(8e9))
    assert costs.transfer.bandwidth_bytes_s == 8e9
    assert costs.pairs is not None
    assert costs.pairs.power(WorkerId("x0"), WorkerId("a")) == 3
    assert costs.pairs.power(WorkerId("x0"), WorkerId("b0")) == 0


def test_kv_bytes_are_the_model_s() -> None:
    assert LiveCosts().kv_token_bytes == 0
    assert LiveCosts(PROFILE).kv_token_bytes == PROFILE.kv_token_bytes
    costs = LiveCosts(msgspec.structs.replace(PROFILE, kv_token_bytes=1))
    costs.of(info_of())
    assert costs.kv_token_bytes == LAYOUT.token_bytes


def test_of_two_models_each_has_its_own_kv_bytes() -> None:
    costs = LiveCosts()
    other = msgspec.structs.replace(LAYOUT, num_layers=4)
    infos = [info_of("a"), info_of("b")]
    infos[1] = msgspec.structs.replace(infos[1], identity=msgspec.structs.replace(infos[1].identity, layout=other))
    for _ in range(2):
        for info in infos:
            costs.observe(info, fit(decode=3.0))
            known = costs.of(info)
            assert known is not None
            assert known.kv_token_bytes == info.identity.layout.token_bytes
        assert costs.kv_token_bytes == other.token_bytes, "of the life that began last, whoever beat last"


def test_the_bandwidth_of_a_pair_is_as_its_reader_measured_it() -> None:
    costs = LiveCosts()
    a, b, x0 = WorkerId("a"), WorkerId("b"), WorkerId("x0")
    assert costs.bandwidth_bytes_s(x0, a) is None, "nothing is known"
    costs.observe_transfers(a, report(6e9))
    assert costs.bandwidth_bytes_s(x0, a) == 6e9
    assert costs.bandwidth_bytes_s(x0, b) == 6e9, "as for all"
    costs.observe_transfers(b, report(2e9))
    assert costs.bandwidth_bytes_s(x0, b) == 2e9
    costs.observe_transfers(b, report(2e9, chosen=False))
    assert costs.bandwidth_bytes_s(x0, b) == costs.transfer.bandwidth_bytes_s, "it goes another way"
    assert LiveCosts(PROFILE).bandwidth_bytes_s(x0, a) == LiveCosts(PROFILE).transfer.bandwidth_bytes_s
