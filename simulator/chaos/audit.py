"""What must hold in every trial, whatever was done to the cluster.

Every request is answered once or refused, within its deadline; every token is right; the ledgers add up at every
look; when the faults are over the cluster comes back by itself: all workers known, all blocks free, no lease, nothing
in quarantine, and new requests answered.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity, TandemError
from simulator.chaos.pools import PoolAuditor
from simulator.chaos.scenario import Weather

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import AuditReply
    from coordinator.policy import FleetView
    from simulator.chaos.scenario import Scenario
    from simulator.chaos.witness import Witness
    from simulator.clients import Answer
    from simulator.cluster import SimulatedCluster
    from simulator.engine import BlockContent

#: How often the books of all workers and stores are looked at.
LOOK_INTERVAL_S = 0.1
#: How often copies of blocks are compared: a wrong one is seldom there for less than a second.
LOOKS_PER_COMPARISON = 10
#: What a request may take beyond its deadline: the gateway's timer, and what is on its way then.
DEADLINE_SLACK_S = 0.5
#: From the end of the last fault to a clean cluster, beyond two terms of a lease: a death is known after 3 s, a
#: replacement up after 1 s more, a silent connection is broken after 3 s, a hung transfer ends a life after 5 s.
RECOVERY_S = 25.0
#: Who was not heard in the last moments of a fault is given up 3 s later.
STEADY_S = 3.5

#: What a client may be told. Anything else is a bug's voice.
CODES: dict[Weather, frozenset[str]] = {
    Weather.CALM: frozenset({"no_capacity"}),
    Weather.SURVIVABLE: frozenset(),
    Weather.ROUGH: frozenset(
        {"no_capacity", "not_ready", "worker_unavailable", "deadline_exceeded", "transfer_aborted"}
    ),
}


class Auditor:
    """Collects what is wrong in one trial; an empty `problems` is a trial that held."""

    def __init__(self, scenario: Scenario, cluster: SimulatedCluster, witness: Witness) -> None:
        """`witness`: the cluster's; it is told when to look."""
        self._scenario = scenario
        self._cluster = cluster
        self._witness = witness
        self._started_s = _now_s()
        self.problems: list[str] = []
        #: Sentences found by looks, to say each once.
        self._said: set[str] = set()
        elastic = scenario.cluster.elastic
        self._pools: PoolAuditor | None = None
        if elastic is not None:
            is_calm = scenario.weather is Weather.CALM
            self._pools = PoolAuditor(elastic, cluster, self._say_once, is_calm=is_calm)

    async def watch(self) -> None:
        """Looks at the books until cancelled, and where there are stores at what stands under which key."""
        for number in itertools.count():
            self.look()
            if self._scenario.cluster.stores and number % LOOKS_PER_COMPARISON == 0:
                self.compare_copies()
            await asyncio.sleep(LOOK_INTERVAL_S)

    def look(self) -> None:
        """At the books of every worker and store that is up, between two turns of the loop."""
        self._witness.look(self._cluster.ledgers())
        for host, problems in self._cluster.problems().items():
            for problem in problems:
                self._say_once(f"{host}: {problem}")
        if self._pools is not None:
            self._pools.look()

    def _say_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            self.problems.append(f"at {_now_s():.3f} s: {sentence}")

    def judge(self, answers: Sequence[Answer]) -> None:
        """What the clients got; all of them have ended or have had the time."""
        allowed = CODES[self._scenario.weather]
        for number, answer in enumerate(answers):
            where = f"request {number}"
            self.problems.extend(f"{where}: {problem}" for problem in answer.problems())
            if answer.ended_s is None:
                self.problems.append(f"{where}: not ended {_now_s() - answer.asked_s:.3f} s after it was asked")
                continue
            took_s = answer.ended_s - answer.asked_s
            if took_s > answer.ask.deadline_s + DEADLINE_SLACK_S:
                self.problems.append(f"{where}: took {took_s:.3f} s, its deadline was {answer.ask.deadline_s:g} s")
            if answer.error is not None and answer.error.code not in allowed:
                self.problems.append(f"{where}: failed with {answer.error.code}: {answer.error.message}")
            # A queue moves on once the faults are over: who waits on for so long waits for what never comes.
            calm_s = answer.ended_s - max(answer.asked_s, self._started_s + self._scenario.healed_s)
            if answer.error is not None and calm_s > self._patience_s:
                self.problems.append(f"{where}: stood still for {calm_s:.3f} s without a fault: {answer.error!r}")
            # It says that nothing was started; only a replay that found no room may say it later.
            is_refused = answer.error is not None and answer.error.code == "no_capacity"
            if is_refused and answer.token_ids and self._scenario.weather is Weather.CALM:
                self.problems.append(f"{where}: refused after {len(answer.token_ids)} tokens: {answer.error!r}")
        if self._scenario.weather is Weather.CALM:
            self._judge_calm()

    def _judge_calm(self) -> None:
        """Where nothing was done to the cluster nothing may be lost either, not even what a replay or a restart
        brings back before any client notices."""
        stats = self._cluster.core.stats
        for code, count in sorted(stats.replays.items()):
            # A full worker's request may go to another one.
            if code != NoCapacity.code:
                self.problems.append(f"{count} requests were taken up again without a fault: {code}")
        # That of a worker that was stopped ends with it.
        if stats.lost_streams > len(self._cluster.stopped):
            self.problems.append(f"{stats.lost_streams} streams of frames ended without a fault")
        for worker_id, reason in self._cluster.ended:
            self.problems.append(f"{worker_id} ended its life without a fault: {reason}")

    @property
    def _patience_s(self) -> float:
        """What a cluster may take until it is as if nothing had been."""
        pools_s = 0.0 if self._pools is None else self._pools.patience_s
        return 2 * self._scenario.cluster.lease_ttl_s + RECOVERY_S + pools_s

    def compare_copies(self) -> None:
        """Blocks with one key are equal, wherever they stand, and written to the end: whoever finds one goes on from
        it."""
        first: dict[bytes, tuple[str, BlockContent]] = {}
        for where, key, content in self._cluster.named_blocks():
            other, right = first.setdefault(key, (where, content))
            if None in content:
                self._say_once(f"{where} has a key, and is not written to the end")
            elif content is not right and content != right:
                self._say_once(f"{where} and {other} have one key, and differ")

    async def until_recovered(self) -> None:
        """Waits until the cluster is as if nothing had been, for `STEADY_S`; says what is not when it does not get
        there."""
        patience_s = self._patience_s
        until_s = _now_s() + patience_s
        steady_since_s = _now_s()
        while _now_s() - steady_since_s < STEADY_S:
            if remains := await self._remains():
                steady_since_s = _now_s()
                if steady_since_s > until_s:
                    self.problems.extend(f"{patience_s:g} s after the last fault: {each}" for each in remains)
                    return
            await asyncio.sleep(0.5)

    async def _remains(self) -> list[str]:
        """What still keeps the cluster from being clean."""
        members = {*self._scenario.cluster.roles, *self._scenario.cluster.stores}
        if self._pools is not None:
            # How many there are is the pools' business.
            members = {*self._cluster.up(), *self._scenario.cluster.stores}
        down = sorted(members - set(self._cluster.up()))
        remains = [f"{worker_id} is down" for worker_id in down]
        if not self._cluster.gateway_is_up:
            return [*remains, "the gateway is down"]
        core = self._cluster.core
        if core.num_open:
            remains.append(f"the gateway holds {core.num_open} open requests")
        try:
            known = {str(member.info.worker_id) for member in await core.members()}
            audits = await self._cluster.audits()
        except TandemError as error:
            return [*remains, f"an audit failed: {error.message}"]
        missing = sorted(members - known)
        remains.extend(f"the coordinator does not know {worker_id}" for worker_id in missing)
        for worker_id, audit in audits.items():
            remains.extend(f"{worker_id}: {each}" for each in _unclean(audit))
        remains.extend(_still_placed(self._cluster.fleet()))
        if self._pools is not None:
            remains.extend(self._pools.remains())
        for store in [each for each in self._scenario.cluster.stores if each in self._cluster.up()]:
            if num_windows := self._cluster.store(store).machine.num_windows:
                remains.append(f"{store} reads ahead for {num_windows} workers where nothing waits")
        return remains


def _unclean(audit: AuditReply) -> list[str]:
    load = audit.load
    found = list(audit.problems)
    held = audit.total_blocks - load.available_blocks
    if held:
        found.append(f"{held} of {audit.total_blocks} blocks are in use ({load.quarantined_blocks} in quarantine)")
    for count, what in (
        (audit.open_requests, "open requests"),
        (audit.holder_leases, "leases as holder"),
        (audit.reader_leases, "leases as reader"),
    ):
        if count:
            found.append(f"{count} {what}")
    return found


def _still_placed(fleet: FleetView) -> list[str]:
    """Load that the coordinator sees on idle workers: it would send requests elsewhere, or refuse them, for ever."""
    columns = zip(fleet.infos, fleet.prefill_load_tokens, fleet.decode_load_tokens, fleet.waiting_requests, strict=True)
    return [
        f"the coordinator counts {prefill} prompt tokens, {decode} context tokens and {waiting} waiting requests at "
        f"{info.worker_id}"
        for info, prefill, decode, waiting in columns
        if prefill or decode or waiting
    ]


def _now_s() -> float:
    return asyncio.get_running_loop().time()
