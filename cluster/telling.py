"""How far a start is, told now and then."""

from __future__ import annotations

import threading
import time

from cluster.child_main import tell
from cluster.launch import Loading

#: Between two words on how far it is: also the sign that it gets on.
TELL_INTERVAL_S = 0.2


class Teller:
    """Says how far a load is, not more often than somebody would want to know. For any thread."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._next_s = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        with self._guard:
            if now_s < self._next_s:
                return
            self._next_s = now_s + TELL_INTERVAL_S
            tell(Loading(what=what, fraction=done_bytes / max(1, total_bytes)))
