"""Phases of a request sum exactly to what was measured, whatever the workers claim."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.timeline import Marks, split, waking_us

DURATIONS = st.floats(0, 1e4)
OPTIONAL = st.none() | DURATIONS


@given(
    steps=st.lists(DURATIONS, min_size=4, max_size=4),
    reached=st.integers(0, 3),
    queue_s=OPTIONAL,
    prefill_s=OPTIONAL,
    handoff_s=OPTIONAL,
    first_decode_s=OPTIONAL,
)
def test_phases_are_never_negative_and_sum_to_the_total(
    steps: list[float],
    reached: int,
    queue_s: float | None,
    prefill_s: float | None,
    handoff_s: float | None,
    first_decode_s: float | None,
) -> None:
    at_s = [100.0 + sum(steps[: index + 1]) for index in range(4)]
    marks = Marks(
        received_s=100.0,
        sent_s=at_s[0] if reached >= 1 else None,
        first_token_s=at_s[1] if reached >= 2 else None,
        decoding_s=at_s[2] if reached >= 3 else None,
        queue_s=queue_s,
        prefill_s=prefill_s,
        handoff_s=handoff_s,
        first_decode_s=first_decode_s,
    )
    phases = split(marks, at_s[3])
    values = [getattr(phases, name) for name in phases.__slots__]
    assert min(values) >= 0
    assert sum(values) == round((at_s[3] - 100.0) * 1e6)


def test_a_whole_request() -> None:
    """10 ms here, 5 waiting, 100 prefill, 20 of the handoff after the first token, 200 decoding."""
    marks = Marks(
        received_s=0.0,
        sent_s=0.010,
        first_token_s=0.115,
        decoding_s=0.145,
        queue_s=0.004,
        prefill_s=0.100,
        handoff_s=0.080,
        first_decode_s=0.010,
    )
    phases = split(marks, 0.335)
    assert (phases.gateway_us, phases.queue_us, phases.prefill_us) == (10_000, 5_000, 100_000)
    assert (phases.handoff_us, phases.decode_us) == (20_000, 200_000)


@pytest.mark.parametrize(("sent_s", "expected"), [(None, (30_000, 0)), (0.01, (10_000, 20_000))])
def test_a_request_that_ended_early(sent_s: float | None, expected: tuple[int, int]) -> None:
    phases = split(Marks(received_s=0.0, sent_s=sent_s), 0.030)
    assert (phases.gateway_us, phases.queue_us) == expected
    assert phases.prefill_us == phases.handoff_us == phases.decode_us == 0


@pytest.mark.parametrize(
    ("waking_s", "woken_s", "sent_s", "expected_us"),
    [
        (None, None, 0.01, 0),
        (0.002, 3.0, 3.01, 2_998_000),
        # It was never placed: until the request ended.
        (0.002, None, None, 4_998_000),
        # Refused again later, after it had been sent once: not counted twice.
        (0.5, 0.7, 0.2, 0),
    ],
)
def test_waiting_for_a_worker_is_a_part_of_the_gateways_phase(
    waking_s: float | None, woken_s: float | None, sent_s: float | None, expected_us: int
) -> None:
    marks = Marks(received_s=0.0, waking_s=waking_s, woken_s=woken_s, sent_s=sent_s)
    assert waking_us(marks, split(marks, 5.0).gateway_us) == expected_us
