"""All transports of one worker, over its one pool: which of them a pull takes, and what became of the pulls.

A holder's life that was probed has a settled way, or none that is acceptable (`refusal`). One that was not is
reached by the first transport that connects, in the order of preference, until its probe is done.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from contracts.errors import ConfigError, IncompatiblePeer, WorkerUnavailable
from contracts.messages import LinkReport, PullTally
from kvtransfer.links import LinkChoice, LinkPolicy, Measured, best_of, choose
from kvtransfer.routes import FailedPull, RoutedPull

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import Peer
    from kvtransfer.probe import Prober
    from kvtransfer.transport import BlockPair, Pool, Pull, PullResult, Transport

#: Rounds of measuring in which nothing is acceptable, before a holder is refused.
ROUNDS_TO_REFUSE = 3

_LifeKey = tuple["WorkerId", "Incarnation"]


class _CountedPull:
    """Passes everything on, and counts the end once."""

    def __init__(self, pull: Pull, life: _Life, tallies: _Tallies) -> None:
        self._pull = pull
        self._life = life
        self._tallies = tallies
        self._counted = False

    async def wait(self) -> PullResult:
        result = await self._pull.wait()
        if not self._counted:
            self._counted = True
            self._tallies.add(self._life.way or "none", result)
        return replace(result, transport=self._life.way or "")

    def request_stop(self) -> None:
        self._pull.request_stop()


@dataclass(slots=True)
class _Tally:
    count: int = 0
    num_bytes: int = 0
    wire_s: float = 0.0
    wait_s: float = 0.0


class _Tallies:
    """Ended pulls by transport and outcome."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def add(self, transport: str, result: PullResult) -> None:
        outcome = "ok" if result.error is None else result.error.code
        tally = self._tallies.setdefault((transport, outcome), _Tally())
        tally.count += 1
        tally.num_bytes += result.num_bytes
        tally.wire_s += result.wire_s
        tally.wait_s += result.wait_s

    def report(self) -> tuple[PullTally, ...]:
        return tuple(
            PullTally(transport, outcome, tally.count, tally.num_bytes, tally.wire_s, tally.wait_s)
            for (transport, outcome), tally in sorted(self._tallies.items())
        )


@dataclass(slots=True)
class _Life:
    """What is known of one life of one holder."""

    #: Endpoints that were used, by transport.
    used: dict[str, bytes] = field(default_factory=dict[str, bytes])
    #: The transport that pulls take; None until one has answered.
    way: str | None = None
    measured: tuple[Measured, ...] = ()
    num_rounds: int = 0
    #: None until it was probed.
    choice: LinkChoice | None = None


class TransportSet:
    """The transports of one worker, most preferred first."""

    def __init__(self, transports: Sequence[Transport], policy: LinkPolicy | None = None) -> None:
        self._transports = {transport.name: transport for transport in transports}
        self._policy = policy or LinkPolicy()
        self._tallies = _Tallies()
        #: Lives that were probed or pulled from, until they are forgotten.
        self._lives: dict[_LifeKey, _Life] = {}
        #: Encoded once the pool is registered.
        self._endpoints: dict[str, bytes] | None = None

    def __repr__(self) -> str:
        return f"<TransportSet {', '.join(self._transports)} | {len(self._lives)} holders>"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._transports)

    def get(self, name: str) -> Transport:
        return self._transports[name]

    def register(self, pool: Pool, *, needed: bool = True) -> list[ConfigError]:
        """`needed`: every transport must work here. Otherwise those that do not are left out, and why is returned.

        Raises ConfigError where a needed transport, or all of them, cannot work on this machine.
        """
        failures: list[ConfigError] = []
        for name, transport in list(self._transports.items()):
            try:
                transport.register(pool)
            except ConfigError as error:
                if needed or len(self._transports) == 1:
                    raise
                failures.append(error)
                del self._transports[name]
        return failures

    def endpoints(self) -> dict[str, bytes]:
        if self._endpoints is None:
            self._endpoints = {name: each.endpoint() for name, each in self._transports.items()}
        return self._endpoints

    # --- pulls --------------------------------------------------------------------------------------------

    def refusal(self, holder: Peer) -> str | None:
        """Why nothing is pulled from this holder: every way to it was measured and none is acceptable."""
        life = self._lives.get((holder.worker_id, holder.incarnation))
        if life is None or life.choice is None or life.choice.transport is not None:
            return None
        return f"no transport to {holder.worker_id} is fast enough: {life.choice.reason}"

    def pull(self, holder: Peer, endpoints: Mapping[str, bytes], pairs: Sequence[BlockPair]) -> Pull:
        """As `Transport.pull`, by the way that is best to this holder."""
        common = [transport for name, transport in self._transports.items() if name in endpoints]
        if not common:
            ours, theirs = ", ".join(self.names), ", ".join(endpoints)
            return FailedPull(IncompatiblePeer(f"transports: {ours} here, {theirs} there"))
        life = self._life(holder)
        if len(common) == 1:
            life.way = common[0].name
        if life.way is None:
            return _CountedPull(self._routed(life, common, endpoints, pairs), life, self._tallies)
        life.used[life.way] = endpoints[life.way]
        pull = self._transports[life.way].pull(endpoints[life.way], pairs)
        return _CountedPull(pull, life, self._tallies)

    def _life(self, holder: Peer) -> _Life:
        """The record of this life; those of earlier lives of the same worker go."""
        key = (holder.worker_id, holder.incarnation)
        if key not in self._lives:
            for worker_id, incarnation in list(self._lives):
                if worker_id == holder.worker_id and incarnation < holder.incarnation:
                    self.forget(worker_id, incarnation)
            self._lives[key] = _Life()
        return self._lives[key]

    def _routed(
        self, life: _Life, common: Sequence[Transport], endpoints: Mapping[str, bytes], pairs: Sequence[BlockPair]
    ) -> RoutedPull:
        def settled(name: str) -> None:
            life.used[name] = endpoints[name]
            if life.way is None:
                life.way = name

        return RoutedPull(common, endpoints, pairs, settled)

    def forget(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """That life is over: what the transports keep for it may go."""
        life = self._lives.pop((worker_id, incarnation), None)
        for name, endpoint in life.used.items() if life is not None else ():
            self._transports[name].forget(endpoint)

    # --- measuring ----------------------------------------------------------------------------------------

    async def probe(
        self, holder: Peer, endpoints: Mapping[str, bytes], holder_blocks: int, prober: Prober
    ) -> LinkChoice:
        """Measures every common transport to this holder, one after the other, and settles the way.

        The best figures of all measurements count: on a busy machine one of them proves nothing. So a holder is
        refused only after `ROUNDS_TO_REFUSE` of them; before, `LinkChoice.transport` None settles nothing.

        Raises ConfigError when no transport is common, WorkerUnavailable when none could be measured: that says
        nothing about its speed, and nothing is settled.
        """
        measured: list[Measured] = []
        life = self._life(holder)
        known = {each.transport: each for each in life.measured}
        for name, transport in self._transports.items():
            if name in endpoints:
                life.used[name] = endpoints[name]
                new = await prober.measure(transport, endpoints[name], holder_blocks)
                measured.append(best_of(known.get(name), new))
        if measured and all(each.bandwidth_bytes_per_s is None for each in measured):
            raise WorkerUnavailable("; ".join(str(each) for each in measured))
        choice = choose(measured, self._policy)
        life.measured = tuple(measured)
        life.num_rounds += 1
        if choice.transport is not None or life.num_rounds >= ROUNDS_TO_REFUSE:
            life.choice, life.way = choice, choice.transport
        return choice

    def is_probed(self, worker_id: WorkerId, incarnation: Incarnation) -> bool:
        life = self._lives.get((worker_id, incarnation))
        return life is not None and life.choice is not None

    # --- for metrics --------------------------------------------------------------------------------------

    def tallies(self) -> tuple[PullTally, ...]:
        return self._tallies.report()

    def links(self) -> tuple[LinkReport, ...]:
        return tuple(
            LinkReport(
                peer=worker_id,
                transport=measured.transport,
                bandwidth_bytes_per_s=measured.bandwidth_bytes_per_s,
                latency_s=measured.latency_s,
                chosen=measured.transport == life.way,
                note=_note(measured, life.choice),
            )
            for (worker_id, _), life in sorted(self._lives.items())
            for measured in life.measured
        )

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self._transports.values()))


def _note(measured: Measured, choice: LinkChoice | None) -> str:
    if choice is None:
        return measured.problem
    return choice.notes.get(measured.transport, "fastest" if measured.transport == choice.transport else "")
