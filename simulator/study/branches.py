"""Lets requests into a study, each alone in a branch of its own: what would have come of one that was turned away?

The study, the trunk, is forked just before such a request arrives. In the branch it is let in, with whatever was true
of the cluster by then, and its fate awaited; the trunk goes on without it. So one run tells of many requests, and none
of them meets another. Were they let in together, the work of each would stay in queues that never empty.

A fork has no thread but the one that forked, and finds locks of the others as they were. So the trunk should have no
other threads: a study has none, and those of numpy's linear algebra, which it does not use, are made for forks. A
branch never writes to a stream or a bar that the trunk has: it says what it found by one write to a pipe, and leaves at
once. It ends with the trunk, however that ends.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, NoReturn

import msgspec

from contracts.errors import Internal
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from simulator.heap.results import StudyResult
    from simulator.heap.spec import StudySpec
    from workload.request import WorkloadRequest
    from workload.slo import SloClass

#: Of what a branch says about its own failure. All that it says is one write that a pipe takes whole.
_MAX_TEXT_CHARS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    #: Of the request, in the workload.
    index: int
    #: For so long after it others go on arriving; then the branch serves those that came.
    patience_s: float


class Fate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What came of a request that was let in. NaN where nothing came."""

    index: int
    ttft_s: float
    tpot_s: float
    #: Both targets.
    met: bool


class _Failure(msgspec.Struct, frozen=True, tag=True):
    text: str


_saying: msgspec.msgpack.Decoder[Fate | _Failure] = msgspec.msgpack.Decoder(Fate | _Failure)


def simulate_with_branches(
    spec: StudySpec,
    requests: Iterable[WorkloadRequest],
    trials: Sequence[Trial],
    slos: Sequence[SloClass],
    *,
    passed_over: frozenset[int] = frozenset(),
    to_the_end: bool = True,
    max_branches: int = 1,
    progress: Callable[[float, int], None] | None = None,
) -> tuple[StudyResult, list[Fate]]:
    """What `simulate` says of the trunk, and a fate for each trial, in order of arrival; equal arguments give equal
    ones.

    The trunk has all requests but those at the indices `passed_over`; `spec.forced` counts rows without these. Where
    not `to_the_end`, no request of the trunk comes after the last trial. `slos` are of all classes, for the fates.

    At most `max_branches` processes run beside this one; none is left when this returns or raises. Raises Internal
    where a branch fails, and what `simulate` raises. Linux and macOS only.
    """
    trunk = _Study(spec, requests, trials, slos, passed_over, to_the_end, max_branches, progress)
    try:
        return trunk.run()
    finally:
        # By its id: an interrupt may come before a branch has noted what it is.
        if os.getpid() != trunk.pid:
            os._exit(1)
        trunk.end_branches()


class _Forced(frozenset[int]):
    """Rows that are let in, and in a branch its own: a study asks as each arrives."""

    own_row = -1

    def __contains__(self, row: object) -> bool:
        return row == self.own_row or super().__contains__(row)


@dataclass(frozen=True, slots=True)
class _Branch:
    index: int
    pid: int
    reader: int


class _Study:
    """The trunk; and in a fork, a branch."""

    def __init__(
        self,
        spec: StudySpec,
        requests: Iterable[WorkloadRequest],
        trials: Sequence[Trial],
        slos: Sequence[SloClass],
        passed_over: frozenset[int],
        to_the_end: bool,
        max_branches: int,
        progress: Callable[[float, int], None] | None,
    ) -> None:
        self.pid = os.getpid()
        self._forced = _Forced(spec.forced)
        self._spec = replace(spec, forced=self._forced)
        self._workload = requests
        self._patience_s = {trial.index: trial.patience_s for trial in trials}
        self._slos = slos
        self._passed_over = passed_over
        self._to_the_end = to_the_end
        self._max_branches = max_branches
        self._progress = progress
        #: By descriptor.
        self._open: dict[int, _Branch] = {}
        self._fates: dict[int, Fate] = {}
        #: Set in a branch alone: where it says what it found, and which request it is about.
        self._writer = -1
        self._index = -1

    def run(self) -> tuple[StudyResult, list[Fate]]:
        """Comes back in the trunk alone."""
        try:
            result = simulate(self._spec, self._requests(), progress=self._on_sample)
            if self._writer >= 0:
                self._say(self._fate(result))
        except BaseException:
            if self._writer >= 0:
                self._say(_Failure(traceback.format_exc()[-_MAX_TEXT_CHARS:]))
            raise
        while self._open:
            self._hear()
        return result, [self._fates[index] for index in sorted(self._fates)]

    def end_branches(self) -> None:
        """Those that have not said anything are not waited for."""
        for branch in self._open.values():
            # An interrupt may have come when it had just been waited for.
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(branch.pid, signal.SIGKILL)
                os.waitpid(branch.pid, 0)
            os.close(branch.reader)
        self._open.clear()

    # --- the trunk --------------------------------------------------------------------------------

    def _requests(self) -> Iterator[WorkloadRequest]:
        num_trials = len(self._patience_s)
        end_s = math.inf
        row = 0
        for index, request in enumerate(self._workload):
            if request.arrival_s > end_s:
                return
            if self._writer < 0 and index in self._patience_s:
                self._fork(index)
                num_trials -= 1
                if self._writer >= 0:
                    self._forced.own_row = row
                    end_s = request.arrival_s + self._patience_s[index]
                elif not num_trials and not self._to_the_end:
                    return
            if index not in self._passed_over or index == self._index:
                yield request
                row += 1

    def _fork(self, index: int) -> None:
        """Comes back in the branch too."""
        while len(self._open) >= self._max_branches:
            self._hear()
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            # Of threads: see above. Test runners have some that hold nothing which a branch needs.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child:
            os.close(writer)
            self._open[reader] = _Branch(index, child, reader)
            return
        self._writer, self._index = writer, index
        # The trunk hears the interrupt and ends its branches.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What was there before stays shared: collections need not look at it.
        gc.freeze()
        os.close(reader)
        for other in self._open:
            os.close(other)
        self._open.clear()

    def _hear(self) -> None:
        """Waits until one of the branches has ended."""
        reader = wait(list(self._open))[0]
        assert isinstance(reader, int), "descriptors were asked for"
        branch = self._open[reader]
        with os.fdopen(os.dup(reader), "rb") as pipe:
            said = pipe.read()
        # Only now: an interrupt until here finds it among those to be ended.
        _, status = os.waitpid(branch.pid, 0)
        del self._open[reader]
        os.close(reader)
        if not said:
            raise Internal(f"the branch that let in request {branch.index} died: wait status {status}")
        found = _saying.decode(said)
        if isinstance(found, _Failure):
            raise Internal(f"the branch that let in request {branch.index} failed: {found.text}")
        self._fates[found.index] = found

    # --- a branch ---------------------------------------------------------------------------------

    def _on_sample(self, virtual_s: float, num_ended: int) -> None:
        if self._writer >= 0:
            # The portable way to see that the trunk is gone.
            if os.getppid() != self.pid:
                os._exit(1)
        elif self._progress is not None:
            self._progress(virtual_s, num_ended)

    def _fate(self, result: StudyResult) -> Fate:
        latencies = request_latencies(result, self._slos)
        row = self._forced.own_row
        return Fate(
            index=self._index,
            ttft_s=float(latencies.ttft_s[row]),
            tpot_s=float(latencies.tpot_s[row]),
            met=bool(latencies.met[row]),
        )

    def _say(self, found: Fate | _Failure) -> NoReturn:
        os.write(self._writer, msgspec.msgpack.encode(found))
        os._exit(0)
