"""Processes that stand by: they have imported all that a worker needs, and become one of any model when they are told.

Most of a small worker's start is Python's imports (torch alone takes a second or two). A node agent that keeps a few
such processes starts a worker in the time that its weights take. One that was taken is replaced a little later, so that
its successor's imports do not take cores from it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.child import Child
from cluster.launch import StandbyLaunch, Warm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cluster.guard import Guard
    from cluster.process_log import ProcessLog
    from contracts.clock import Clock

#: Read when OpenMP is loaded, but said again by every worker for its own threads: they need not agree.
OWN_LATER = frozenset({"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"})
#: The word that a worker's program is told on its command line.
STANDBY_FLAG = "--standby"

_LOOK_INTERVAL_S = 0.2
#: Between two attempts to start one, when they die before they are warm.
_RETRY_S = 5.0


@dataclass(slots=True)
class _Standby:
    child: Child
    is_warm: bool = False


class StandbyPool:
    """`size` processes, as long as `run` does."""

    def __init__(
        self,
        size: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        launch: StandbyLaunch,
        log: ProcessLog,
        clock: Clock,
        *,
        refill_after_s: float = 2.0,
    ) -> None:
        """`command` is that of a worker, without `STANDBY_FLAG`."""
        self._size = size
        self._command = tuple(command)
        self._environ = dict(environ)
        self._launch = launch
        self._log = log
        self._clock = clock
        self._refill_after_s = refill_after_s
        self._standing: deque[_Standby] = deque()
        #: Not before that is another one started.
        self._start_at_s = 0.0

    @property
    def num_warm(self) -> int:
        return sum(each.is_warm for each in self._standing)

    def take(self, command: Sequence[str], environ: Mapping[str, str]) -> Child | None:
        """One that is warm, and would be started in this way; None where there is none. It is the caller's now."""
        if tuple(command) != self._command or lasting(environ) != lasting(self._environ):
            return None
        self._look()
        for each in self._standing:
            if each.is_warm:
                self._standing.remove(each)
                self._start_at_s = self._clock.now_s() + self._refill_after_s
                return each.child
        return None

    async def run(self, guard: Guard) -> None:
        """Until it is cancelled; those that stand by then are ended."""
        try:
            while True:
                self._look()
                now_s = self._clock.now_s()
                if len(self._standing) < self._size and now_s >= self._start_at_s:
                    self._start(guard)
                await self._clock.sleep(_LOOK_INTERVAL_S)
        finally:
            for each in self._standing:
                each.child.kill()
            while self._standing:
                await self._standing.popleft().child.ended(_nothing, self._log)

    def _start(self, guard: Guard) -> None:
        # One after the other: two that import at the same time take the cores from a worker that serves.
        if any(not each.is_warm for each in self._standing):
            return
        try:
            child = Child((*self._command, STANDBY_FLAG), self._environ, self._launch, guard)
        except OSError as error:
            self._log.write(f"no process can stand by: {error.strerror}".encode())
            self._start_at_s = self._clock.now_s() + _RETRY_S
            return
        self._standing.append(_Standby(child))

    def _look(self) -> None:
        """Who is warm by now; and who is gone."""
        for each in list(self._standing):
            if not each.child.is_alive:
                self._standing.remove(each)
                each.child.bury()
                self._log.write(b"a process that stood by has ended")
                self._start_at_s = self._clock.now_s() + _RETRY_S
            elif not each.is_warm and any(isinstance(status, Warm) for status in each.child.told_so_far()):
                each.is_warm = True
                self._log.write(f"process {each.child.pid} stands by".encode())


def lasting(environ: Mapping[str, str]) -> dict[str, str]:
    """What a process has read of its environment by the time that it is warm."""
    return {name: value for name, value in environ.items() if name not in OWN_LATER}


async def _nothing(status: object) -> None:
    """What a process that is being ended says is not heard."""
