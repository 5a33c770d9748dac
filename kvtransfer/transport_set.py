"""All transports of one worker, over its one pool: which of them a pull takes, and what became of the pulls."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import IncompatiblePeer
from contracts.messages import PullTally
from kvtransfer.transport import PullResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import Peer
    from kvtransfer.transport import BlockPair, Pool, Pull, Transport


class FailedPull:
    """A pull that never began."""

    def __init__(self, error: IncompatiblePeer) -> None:
        self._error = error

    async def wait(self) -> PullResult:
        return PullResult(num_bytes=0, wire_s=0.0, error=self._error)

    def request_stop(self) -> None:
        pass


class _CountedPull:
    """Passes everything on, and counts the end once."""

    def __init__(self, pull: Pull, name: str, tallies: _Tallies) -> None:
        self._pull = pull
        self._name = name
        self._tallies = tallies
        self._counted = False

    async def wait(self) -> PullResult:
        result = await self._pull.wait()
        if not self._counted:
            self._counted = True
            self._tallies.add(self._name, result)
        return result

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


class TransportSet:
    """The transports of one worker, most preferred first."""

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = {transport.name: transport for transport in transports}
        self._tallies = _Tallies()
        #: Endpoints that pulls were made from, by the holder's life.
        self._used: dict[tuple[WorkerId, Incarnation], dict[str, bytes]] = {}
        self._endpoints: dict[str, bytes] | None = None

    def __repr__(self) -> str:
        return f"<TransportSet {', '.join(self._transports)}>"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._transports)

    def register(self, pool: Pool) -> None:
        for transport in self._transports.values():
            transport.register(pool)

    def endpoints(self) -> dict[str, bytes]:
        if self._endpoints is None:
            self._endpoints = {name: each.endpoint() for name, each in self._transports.items()}
        return self._endpoints

    def pull(self, holder: Peer, endpoints: Mapping[str, bytes], pairs: Sequence[BlockPair]) -> Pull:
        """As `Transport.pull`, by the way that is best to this holder."""
        name = self._choose(endpoints)
        if name is None:
            ours, theirs = ", ".join(self.names), ", ".join(endpoints)
            return FailedPull(IncompatiblePeer(f"transports: {ours} here, {theirs} there"))
        life = (holder.worker_id, holder.incarnation)
        self._used.setdefault(life, {})[name] = endpoints[name]
        return _CountedPull(self._transports[name].pull(endpoints[name], pairs), name, self._tallies)

    def _choose(self, endpoints: Mapping[str, bytes]) -> str | None:
        return next((name for name in self._transports if name in endpoints), None)

    def forget(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """That life is over: what the transports keep for it may go."""
        for name, endpoint in self._used.pop((worker_id, incarnation), {}).items():
            self._transports[name].forget(endpoint)

    def tallies(self) -> tuple[PullTally, ...]:
        return self._tallies.report()

    async def close(self) -> None:
        await asyncio.gather(*(transport.close() for transport in self._transports.values()))
