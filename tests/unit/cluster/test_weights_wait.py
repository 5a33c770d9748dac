"""What a worker tells of the weights that it waits for."""

from __future__ import annotations

import pytest

from cluster.launch import Loading, decode_status
from cluster.telling import ComingTeller
from coldstart.handing import Coming


@pytest.mark.parametrize(
    ("num_ahead", "what"), [(0, "weights"), (1, "weights (after 1 other)"), (3, "weights (after 3 others)")]
)
def test_how_far_it_is_and_what_comes_first(
    num_ahead: int, what: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert ComingTeller(100.0)(Coming(num_ahead=num_ahead, what="weights", fraction=0.5))
    (line,) = capfdbinary.readouterr().out.splitlines()
    assert decode_status(line) == Loading(what=what, fraction=0.5)


def test_what_is_never_there_is_not_waited_for_for_ever() -> None:
    assert not ComingTeller(0.0)(Coming(num_ahead=0, what="weights", fraction=0.5))
