"""The dispatch policy `freeness`: where each answer has most memory left, virtual usage counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.messages import Placement, PriorityUse, WorkerLoad
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.membership import ALL_UP
from coordinator.policy.settings import AdmissionRule
from coordinator.policy.virtual_usage import UsageRules, unclaimed, wanted_blocks
from coordinator.usage_rows import usage_of
from tests.support.conductors import conductor_of, info_of, item_of

_BLOCKS = 1000


def _load(free_blocks: int, answers: int, *, priority: int = 0, queued: int = 0) -> WorkerLoad:
    return WorkerLoad(
        free_blocks=free_blocks,
        owned_blocks=_BLOCKS - free_blocks,
        running_decodes=answers,
        context_tokens=answers,
        priorities=(PriorityUse(priority, answers, _BLOCKS - free_blocks),) if answers else (),
        head_demand_blocks=min(1, queued),
        queued_demand_blocks=queued,
    )


def _fleet(loads: dict[str, WorkerLoad], headroom_tokens: dict[int, int] | None = None) -> Conductor:
    settings = ConductorSettings(
        policy="freeness", admission=AdmissionRule(form="none"), headroom_tokens=headroom_tokens or {}
    )
    return conductor_of(
        [(info_of(name, blocks=_BLOCKS), load) for name, load in loads.items()], settings=settings, now_s=0.0
    )


def _where(conductor: Conductor, name: str = "r", now_s: float = 1.0) -> tuple[str, str]:
    item = item_of(prompt_tokens=160, name=name)
    placed = conductor.in_words(item, conductor.decide(item, now_s), now_s)
    assert isinstance(placed, Placement)
    return placed.prefill.worker_id, placed.decode.worker_id


_IDLE = WorkerLoad(free_blocks=_BLOCKS)


@pytest.mark.parametrize(
    ("d0", "d1", "chosen"),
    [
        # 30 blocks each, 50 each: not who holds fewest tokens.
        (_load(600, 20), _load(500, 10), "d1"),
        (_load(600, 10), _load(500, 10), "d0"),
        # 550 are wanted by those that wait, 1 of these by the first in line.
        (_load(600, 10, queued=550), _load(500, 10), "d1"),
        (_load(600, 10), _load(600, 10), "d0"),
    ],
    ids=["fewer answers", "more memory", "queued", "equal"],
)
def test_an_answer_goes_where_each_has_most(d0: WorkerLoad, d1: WorkerLoad, chosen: str) -> None:
    assert _where(_fleet({"p0": _IDLE, "d0": d0, "d1": d1})) == ("p0", chosen)


def test_headroom_of_high_priorities_counts_as_used() -> None:
    loads = {"p0": _IDLE, "d0": _load(600, 10, priority=1), "d1": _load(550, 10)}
    assert _where(_fleet(loads)) == ("p0", "d0")
    assert _where(_fleet(loads, {1: 1600})) == ("p0", "d1")


def test_a_mixed_worker_is_chosen_for_the_answer_that_it_will_write() -> None:
    assert _where(_fleet({"m0": _load(300, 10), "m1": _load(800, 30), "m2": _load(200, 2)})) == ("m2", "m2")


def test_what_is_placed_counts_until_it_is_told() -> None:
    fleet = _fleet({"p0": _IDLE, "d0": _load(520, 10), "d1": _load(500, 10)})
    # 10 blocks and one answer each: 52 and 50 blocks each at first, then 46.4 and 44.5, and so on in turns.
    assert [_where(fleet, f"r{number}")[1] for number in range(4)] == ["d0", "d1", "d0", "d1"]
    fleet.report(WorkerId("d0"), _load(520, 10), 5.0)
    assert _where(fleet, "later", 5.0)[1] == "d0"


@given(
    free=st.integers(0, _BLOCKS),
    head=st.integers(0, 500),
    uses=st.lists(
        st.tuples(st.integers(-6, 6), st.integers(0, 5), st.integers(0, 50)), max_size=4, unique_by=lambda u: u[0]
    ),
    headroom=st.dictionaries(st.integers(-6, 6), st.integers(0, 20_000), max_size=3),
)
def test_one_worker_alone_is_counted_as_in_a_view(
    free: int, head: int, uses: list[tuple[int, int, int]], headroom: dict[int, int]
) -> None:
    load = WorkerLoad(
        free_blocks=free, head_demand_blocks=head, priorities=tuple(PriorityUse(*use) for use in sorted(uses))
    )
    rules = UsageRules(headroom_tokens=headroom)
    conductor = conductor_of([(info_of("d0", blocks=_BLOCKS), load)])
    view = usage_of(conductor, ALL_UP, frozenset(), {}, 0.0)
    expected = view.total_blocks - wanted_blocks(view, rules)
    assert np.array_equal(expected, [unclaimed(load, rules, _BLOCKS, 16)])
