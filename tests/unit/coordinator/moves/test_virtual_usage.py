"""Virtual usage and freeness as in the Llumnix paper, in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.messages import PriorityUse
from coordinator.policy.virtual_usage import UsageRules, WorkerUse, freeness, usage_view, virtual_blocks

_RULES = UsageRules(headroom_tokens={1: 160, 3: 320}, max_headroom_share=0.5)


def _use(**changes: object) -> WorkerUse:
    return WorkerUse(WorkerId("decode-0"), total_blocks=100, available_blocks=100)._replace(**changes)  # type: ignore[arg-type]


def _usage(use: WorkerUse, rules: UsageRules = _RULES) -> float:
    return float(virtual_blocks(usage_view([use]), rules)[0])


def _freeness(use: WorkerUse, rules: UsageRules = _RULES) -> float:
    return float(freeness(usage_view([use]), rules)[0])


def test_of_an_idle_worker_everything_is_one_answers() -> None:
    assert _usage(_use()) == 0
    assert _freeness(_use()) == 100


def test_what_is_neither_free_nor_cached_is_used_and_shared_by_the_answers() -> None:
    use = _use(available_blocks=40, priorities=(PriorityUse(0, 3, 50),))
    # Ten more are leases and prompts.
    assert _usage(use) == 60
    assert _freeness(use) == pytest.approx(40 / 3)


@pytest.mark.parametrize(
    ("priority", "headroom"),
    [(-1, 0), (0, 0), (1, 10), (2, 10), (3, 20), (6, 20), (99, 20)],
    ids=["low", "common", "high", "between", "higher", "above", "beyond what is counted"],
)
def test_headroom_is_that_of_the_next_priority_below(priority: int, headroom: int) -> None:
    assert _usage(_use(available_blocks=95, priorities=(PriorityUse(priority, 1, 5),))) == 5 + headroom


def test_headroom_counts_once_for_all_answers_of_a_priority() -> None:
    use = _use(available_blocks=70, priorities=(PriorityUse(1, 4, 20), PriorityUse(3, 1, 10)))
    assert _usage(use) == 30 + 10 + 20
    assert _freeness(use) == (100 - 60) / 5


def test_headroom_is_no_more_than_its_share_of_a_small_pool() -> None:
    rules = UsageRules(headroom_tokens={1: 10_000}, max_headroom_share=0.25)
    assert _usage(_use(available_blocks=95, priorities=(PriorityUse(1, 1, 5),)), rules) == 5 + 25


def test_the_first_in_line_counts_whole_and_those_behind_it_nothing() -> None:
    use = _use(available_blocks=30, priorities=(PriorityUse(0, 2, 70),), head_blocks=50, queued_blocks=90)
    assert _usage(use) == 120
    assert _freeness(use) == -10
    assert _usage(use, UsageRules(queued="all")) == 160


def test_what_is_on_its_way_counts_before_a_report_tells_of_it() -> None:
    assert _usage(_use(available_blocks=90, arriving_blocks=15)) == 25


def test_who_drains_is_fuller_than_anybody() -> None:
    use = _use(is_draining=True)
    assert _usage(use) == np.inf
    assert _freeness(use) == -np.inf


def test_rows_do_not_mix() -> None:
    view = usage_view(
        [
            _use(available_blocks=50, priorities=(PriorityUse(0, 5, 50),)),
            _use(total_blocks=1000, available_blocks=1000),
            _use(is_draining=True),
        ]
    )
    assert freeness(view, _RULES).tolist() == [10, 1000, -np.inf]


def test_nobody_is_no_error() -> None:
    assert freeness(usage_view([]), _RULES).shape == (0,)


@given(
    total=st.integers(1, 10_000),
    used=st.floats(0, 1),
    answers=st.integers(0, 50),
    priority=st.integers(-6, 6),
    more=st.integers(1, 500),
)
def test_more_used_or_wanted_is_never_freer(total: int, used: float, answers: int, priority: int, more: int) -> None:
    available = total - int(total * used)
    priorities = (PriorityUse(priority, answers, total - available),) if answers else ()
    use = _use(total_blocks=total, available_blocks=available, priorities=priorities)
    assert _freeness(use) <= total
    assert _freeness(use._replace(head_blocks=more)) < _freeness(use)
    assert _freeness(use._replace(arriving_blocks=more)) < _freeness(use)
    assert _freeness(use._replace(available_blocks=max(0, available - more))) <= _freeness(use)
