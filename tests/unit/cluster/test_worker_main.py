"""What a worker writes to its agent's pipe from its event loop."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cluster.child_main import tell_if_room
from cluster.launch import Alive, decode_status

if TYPE_CHECKING:
    import pytest


def test_a_sign_of_life_that_nobody_takes_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is stopped for an hour must not stop its workers' loops by a full pipe."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "w") as writer:
        monkeypatch.setattr(sys, "stdout", writer)
        tell_if_room(Alive())
        assert decode_status(reader.readline()) == Alive()
        for _ in range(20_000):
            tell_if_room(Alive())
        os.set_blocking(read_end, False)
        taken = reader.read()
        assert 10_000 < len(taken) < 20_000 * len(b'{"event":"alive"}\n')
        assert {decode_status(line) for line in taken.splitlines()} == {Alive()}
        tell_if_room(Alive())
        assert decode_status(reader.readline()) == Alive(), "there is room again"
