"""Carries out a better split of the workers: one after the other takes another role, until the roles are as planned."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from typing import TYPE_CHECKING, Self

from contracts.control_messages import FlipOperation
from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.control_messages import OperationStatus
    from contracts.ids import WorkerId
    from contracts.messages import Role, WorkerInfo
    from coordinator.replan_terms import Split
    from coordinator.scaling_settings import Operator

#: How often it looks whether the last flip has ended.
_LOOK_S = 1.0
#: After a split was carried out, so long no other is: what it does must be seen first.
MIN_STAY_S = 60.0
#: A split that is not carried out by then is given up: the workload is another by now.
GIVE_UP_AFTER_S = 900.0


def next_flip(
    roles: Mapping[WorkerId, Role], wanted: Mapping[Role, int], requests: Mapping[WorkerId, int]
) -> tuple[WorkerId, Role] | None:
    """Who is to take which role next: the one with the fewest `requests` of a role that has too many, the role that
    misses most. None: the roles are as wanted, as far as there are workers."""
    there = Counter(roles.values())
    missing: list[tuple[int, Role]] = sorted(
        (there[role] - number, role) for role, number in wanted.items() if there[role] < number
    )
    spare = [worker_id for worker_id, role in roles.items() if there[role] > wanted.get(role, 0)]
    if not missing or not spare:
        return None
    return min(spare, key=lambda worker_id: (requests.get(worker_id, 0), worker_id)), missing[0][1]


class SplitApplier:
    """Use as `async with applier:` for as long as splits should be carried out."""

    def __init__(
        self,
        clock: Clock,
        *,
        infos: Callable[[], Sequence[WorkerInfo]],
        requests: Callable[[], Mapping[WorkerId, int]],
        operator: Operator,
        log: Callable[[str], None],
    ) -> None:
        """`infos`: the members, of which stores take no part; `requests`: open at a worker."""
        self._clock = clock
        self._infos = infos
        self._requests = requests
        self._operator = operator
        self._log = log
        self._split: Split | None = None
        self._since_s = self._ended_s = -math.inf
        #: The flip that was begun last.
        self._operation_id: int | None = None
        self._group: asyncio.TaskGroup | None = None
        self._task: asyncio.Task[None] | None = None

    def apply(self, split: Split) -> None:
        """From now on, instead of an earlier one that is not carried out yet."""
        if not split.workers:
            self._log(f"the split {split.text} is not carried out: the planner did not say which roles it needs")
            return
        now_s = self._clock.now_s()
        if now_s - self._ended_s < MIN_STAY_S:
            self._log(f"the split {split.text} is not carried out: the last one is {now_s - self._ended_s:.0f} s old")
            return
        self._split, self._since_s, self._operation_id = split, now_s, None

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._task = self._group.create_task(self._run(), name="split-applier")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        assert self._task is not None, "made when entered"
        self._task.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The body's own error leaves as it is, not as part of a group.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Begins the next flip where the last one has ended."""
        split, now_s = self._split, self._clock.now_s()
        if split is None:
            return
        status = self._last()
        if status is not None and status.state == "running":
            return
        if status is not None and status.state != "done":
            self._end(f"the split {split.text} is given up: {status.text}", now_s)
            return
        if now_s - self._since_s > GIVE_UP_AFTER_S:
            self._end(f"the split {split.text} is given up after {GIVE_UP_AFTER_S:g} s", now_s)
            return
        roles: dict[WorkerId, Role] = {info.worker_id: info.role for info in self._infos() if info.role != "store"}
        flip = next_flip(roles, dict(split.workers), self._requests())
        if flip is None:
            self._end(f"the split {split.text} is carried out", now_s)
            return
        try:
            self._operation_id = self._operator.begin(FlipOperation(worker_id=flip[0], role=flip[1]), by="replanner")
        except TandemError as error:
            self._end(f"the split {split.text} is given up: {error.message}", now_s)

    def _last(self) -> OperationStatus | None:
        statuses = self._operator.statuses()
        return next((one for one in statuses if one.operation_id == self._operation_id), None)

    def _end(self, text: str, now_s: float) -> None:
        self._split, self._operation_id, self._ended_s = None, None, now_s
        self._log(text)
