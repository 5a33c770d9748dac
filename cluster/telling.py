"""How far a start is, told now and then."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from cluster.child_main import tell
from cluster.launch import Loading

if TYPE_CHECKING:
    from coldstart.handing import Coming

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


class ComingTeller:
    """Says how far weights are that somebody else loads: also a sign that a start gets on which only waits for them."""

    def __init__(self, longest_s: float) -> None:
        self._until_s = time.monotonic() + longest_s

    def __call__(self, coming: Coming) -> bool:
        """Whether they are to be waited for any longer."""
        behind = f" (after {coming.num_ahead} other{'s' if coming.num_ahead > 1 else ''})" if coming.num_ahead else ""
        tell(Loading(what=f"{coming.what}{behind}", fraction=coming.fraction))
        return time.monotonic() < self._until_s
