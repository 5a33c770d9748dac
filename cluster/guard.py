"""Ends what a killed node agent leaves behind.

Workers die with their parent by themselves (`cluster.lifeline`), but what a worker has started (a compiler, say)
knows no parent but the worker. So the agent has one small process beside it that knows the workers' process groups
by a pipe, and kills them all when that pipe ends without having been told otherwise.

Lines on the pipe: `+PID` a worker with its own group was started, `-PID` it is gone, and its group with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: A guard whose pipe has ended is gone after this long.
END_TIMEOUT_S = 5.0


class Guard:
    """The agent's end. A guard that died itself is missed only when the agent is killed: nothing else fails."""

    def __init__(self) -> None:
        """Raises OSError when no process can be started."""
        # In a session of its own: the Ctrl-C that ends an agent is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None, "it was asked for"
        self._pipe: IO[bytes] = self._process.stdin

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, group: int) -> None:
        self._write(f"+{group}\n")

    def forget(self, group: int) -> None:
        """To be called before the group's leader is reaped: until then nobody else can have its number."""
        self._write(f"-{group}\n")

    def close(self) -> None:
        """Returns when the guard has ended; kills the groups that it still watches."""
        self._pipe.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._pipe.write(line.encode())


def left_over(lines: Iterable[bytes]) -> set[int]:
    """The groups that are watched at the end."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line.startswith(b"+"):
            groups.add(group)
        else:
            groups.discard(group)
    return groups


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for group in sorted(left_over(sys.stdin.buffer)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
