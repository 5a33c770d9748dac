"""Asks for a better split of the workers in a process of its own: it computes for minutes, at the lowest priority.

The function that is asked is named by the entry point group `tandem.evaluators`: `(SplitQuestion) -> SplitAnswer`. It
raises `NoSplit` that says why there is none. Question and answer are msgpack on stdin and stdout.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import msgspec

from cluster.lifeline import die_with_parent
from coordinator.split_question import NoSplit, SplitAnswer, SplitQuestion

if TYPE_CHECKING:
    from collections.abc import Sequence

GROUP = "tandem.evaluators"
DEADLINE_S = 600.0

_LOWEST_PRIORITY = 19
#: Of what a failed planner wrote last.
_MAX_SHOWN = 300


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two is there."""

    answer: SplitAnswer | None = None
    problem: str = ""


class ChildPlanner:
    """A `coordinator.replanner.Planner`."""

    def __init__(self, *, group: str = GROUP, deadline_s: float = DEADLINE_S) -> None:
        self._group = group
        self._deadline_s = deadline_s

    async def __call__(self, question: SplitQuestion) -> SplitAnswer:
        """Nothing of the process remains on return, cancelled or not."""
        try:
            process = _start(self._group)
        except OSError as error:
            raise NoSplit(f"the planner cannot be started: {error.strerror}") from error
        data = msgspec.msgpack.encode(question)
        talking = asyncio.create_task(asyncio.to_thread(process.communicate, data, self._deadline_s))
        try:
            output, errors = await asyncio.shield(talking)
        except subprocess.TimeoutExpired:
            raise NoSplit(f"the planner took longer than {self._deadline_s:g} s") from None
        finally:
            process.kill()
            await asyncio.wait([talking])
            await asyncio.to_thread(process.wait)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with suppress(BrokenPipeError):
                        pipe.close()
        return _answer(output, errors, process.returncode)


def _start(group: str) -> subprocess.Popen[bytes]:
    """A vfork and an exec, as of other children, from the thread whose death ends it. Raises OSError."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.planner_child", str(os.getpid()), group],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,
    )


def _answer(output: bytes, errors: bytes, code: int) -> SplitAnswer:
    try:
        reply = msgspec.msgpack.decode(output, type=Reply)
    except msgspec.DecodeError:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][-_MAX_SHOWN:]
        raise NoSplit(f"the planner ended with code {code}: {last or 'it said nothing'}") from None
    if reply.answer is None:
        raise NoSplit(reply.problem)
    return reply.answer


def _asked(question: SplitQuestion, group: str) -> Reply:
    entries = sorted(entry_points(group=group), key=lambda entry: entry.name)
    if not entries:
        return Reply(problem=f"no planner is installed (entry points {group})")
    try:
        return Reply(answer=msgspec.convert(entries[0].load()(question), SplitAnswer))
    except NoSplit as error:
        return Reply(problem=str(error))


def main(arguments: Sequence[str]) -> int:
    """`arguments`: pid of the parent, entry point group."""
    parent_pid, group = arguments
    die_with_parent(int(parent_pid))
    os.nice(_LOWEST_PRIORITY)
    question = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=SplitQuestion)
    # What evaluators print is not an answer.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        out.write(msgspec.msgpack.encode(_asked(question, group)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
