"""Time for code that blocks in a thread."""

from __future__ import annotations

from typing import Protocol


class BlockingClock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds since an arbitrary origin."""
        ...

    def wall_s(self) -> float:
        """Unix time: the only one that processes share, and that outlives them."""
        ...

    def sleep(self, delay_s: float) -> None: ...
