"""What must hold of pools that follow the load, beside what holds of every trial.

At every look: who leaves because the pool shrinks has no request, the pool is no larger than it may be, and does not
shrink within its cooldown after it grew. In the end: each pool has the least that it may have, nothing starts or ends,
no operation runs. Faults may kill workers and keep orders from being heard, so that the first two are asked of trials
without them only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from coldstart.keep_alive import IdleTimes
from contracts.control_messages import FlipOperation, RemoveOperation, StartOperation
from simulator.elastic import pool_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.control_messages import OperationStatus
    from coordinator.pool_views import ScaledPool
    from simulator.cluster import SimulatedCluster
    from simulator.elastic import ElasticSpec

#: Clocks gain or lose some, and what began is looked at later.
_SLACK_S = 0.05
#: What an operation and the looks around it take where nobody is there to wait for.
_STEP_S = 4.0


class PoolAuditor:
    """Collects what is wrong by `say`."""

    def __init__(
        self, spec: ElasticSpec, cluster: SimulatedCluster, say: Callable[[str], None], *, is_calm: bool
    ) -> None:
        self._pools = spec.settings.pools
        self._lends = spec.settings.lend_mode == "apply"
        self._may_exceed = self._lends and spec.settings.lend_rules.lend_as == "other"
        self._start_s = spec.start_s[1]
        self._cluster = cluster
        self._say = say
        self._is_calm = is_calm
        self._num_stopped = 0
        self._seen: set[tuple[str, int]] = set()
        #: By life of the coordinator and pool: when scaling last made it larger.
        self._grown_s: dict[tuple[str, str], float] = {}

    @property
    def patience_s(self) -> float:
        """From the last fault or request to the least that pools may have, beyond what a cluster takes to recover."""
        slowest_s = max(
            rules.window_s
            + (rules.to_zero_after_s or 0.0)
            + (IdleTimes(rules.keep_bin_s).range_s if rules.keep is not None else 0.0)
            + rules.max_workers * (max(rules.cooldown_down_s, rules.cooldown_up_s) + _STEP_S)
            for rules in (pool.rules for pool in self._pools)
        )
        # An agent that was away begins with the workers that its pools begin with.
        return slowest_s + 3.0 * self._start_s

    def look(self) -> None:
        for worker_id, num_requests in self._cluster.stopped[self._num_stopped :]:
            if num_requests and self._is_calm:
                self._say(f"{worker_id} is stopped with {num_requests} requests")
        self._num_stopped = len(self._cluster.stopped)
        for status in self._cluster.operation_statuses():
            self._note(status)
        if self._is_calm and not self._may_exceed:
            for pool in self._pools:
                if (count := self._num_present(pool)) > pool.rules.max_workers:
                    self._say(f"pool {pool.name} has {count} workers, {pool.rules.max_workers} at most")

    def remains(self) -> list[str]:
        """What keeps the pools from being at rest."""
        agent = self._cluster.elastic_agent
        if agent is None:
            return ["the node agent is down"]
        found = [
            f"{worker_id} is {state}"
            for worker_id, state in agent.states.items()
            if state in ("starting", "ending", "restarting")
        ]
        found.extend(
            f"operation {status.operation_id} runs: {status.text}"
            for status in self._cluster.operation_statuses()
            if status.state == "running"
        )
        counts = Counter(self._working_for(worker_id) for worker_id in self._cluster.elastic_workers_up())
        for pool in self._pools:
            least = pool.rules.min_workers
            # The last one stays where nobody said when it may go.
            if counts[pool.name] != least:
                found.append(f"pool {pool.name} has {counts[pool.name]} workers where nobody asks, not {least}")
        found.extend(f"{each} still drains" for each in self._cluster.up() if self._cluster.is_draining(each))
        return found

    def _num_present(self, pool: ScaledPool) -> int:
        """Workers that stay or come."""
        agent = self._cluster.elastic_agent
        states = {} if agent is None else agent.states
        up = [
            worker_id
            for worker_id in self._cluster.elastic_workers_up()
            if self._working_for(worker_id) == pool.name and not self._cluster.is_draining(worker_id)
        ]
        return len(up) + sum(state == "starting" and pool_name(each) == pool.name for each, state in states.items())

    def _working_for(self, worker_id: str) -> str:
        """As `coordinator.pool_views.ClusterSeen.pool_of` says."""
        role = self._cluster.worker(worker_id).standing.info.role
        alike = [pool.name for pool in self._pools if pool.role == role]
        home = pool_name(worker_id)
        return home if home in alike or not alike else alike[0]

    def _note(self, status: OperationStatus) -> None:
        """An operation that was begun, once."""
        life = self._cluster.coordinator_life
        if (life, status.operation_id) in self._seen or status.state not in ("running", "done"):
            return
        self._seen.add((life, status.operation_id))
        if status.by != "autoscaler":
            return
        begun_s = asyncio.get_running_loop().time() - status.age_s
        match status.operation:
            case StartOperation(worker_id=worker_id):
                self._grown_s[life, pool_name(worker_id)] = begun_s
            case RemoveOperation(worker_id=worker_id) if self._cluster.is_up(worker_id):
                self._shrinks(life, self._working_for(worker_id), begun_s)
            case FlipOperation(role=role) if not self._lends:
                pool = next(pool for pool in self._pools if pool.role == role)
                others = [other.name for other in self._pools if other is not pool]
                for other in others:
                    self._shrinks(life, other, begun_s)
                self._grown_s[life, pool.name] = begun_s
            case _:
                pass

    def _shrinks(self, life: str, name: str, begun_s: float) -> None:
        cooldown_s = next(pool.rules.cooldown_down_s for pool in self._pools if pool.name == name)
        after_s = begun_s - self._grown_s.get((life, name), float("-inf"))
        if after_s < cooldown_s - _SLACK_S:
            self._say(f"pool {name} shrinks {after_s:.2f} s after it grew, its cooldown is {cooldown_s:g} s")
