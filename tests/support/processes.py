"""Waiting for the end of processes that this one did not start."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOOK_INTERVAL_S = 0.01


def is_gone(pid: int) -> bool:
    """No such process, or a dead one. An orphan stays listed until init reaps it, and that may take seconds."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pids: Iterable[int], within_s: float) -> None:
    """Returns once all are gone. Raises AssertionError that names those left."""
    until_s = time.monotonic() + within_s
    left = list(pids)
    while left := [pid for pid in left if not is_gone(pid)]:
        assert time.monotonic() < until_s, f"still running after {within_s:g} s: {left}"
        time.sleep(_LOOK_INTERVAL_S)
