"""Gets to know the workers that KV will come from: asks how their pools are reached, and measures every way there.

A worker that writes answers probes each life of each worker that reads prompts, once, as soon as the coordinator knows
it; one that fetches prefixes probes whatever may hold some: stores, and workers of all roles. What is too slow for its
class is refused before a request meets it. A store probes the workers that it is offered blocks by.

The same list of members says which store a worker uses.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from contracts.errors import IncompatiblePeer, NoCapacity, TandemError
from contracts.failpoints import Failpoint
from contracts.messages import DESCRIBE, MEMBERS, DescribeRequest, Empty, Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from contracts.ids import WorkerId
    from contracts.messages import Member, WorkerInfo
    from kvtransfer import Prober, TransportSet
    from rpc import Network

#: How often the members are asked for: soon after the start, when the others start too, and later.
EAGER_INTERVAL_S = 0.5
EAGER_FOR_S = 20.0
CALM_INTERVAL_S = 5.0

ASK_TIMEOUT_S = 1.0

#: A peer whose transports were all too slow is measured again after this long: the machine may have been busy.
REPEAT_AFTER_S = 10.0

#: Tries to describe and measure one life before it is left to its first pull.
MAX_TRIES = 3

_MET_LATE = Failpoint("worker.peer_met_late", "a peer is measured late, maybe after its first offer")
_LONGEST_LATENESS_S = 2.0


def nearest_store(own: WorkerInfo, members: Sequence[Member]) -> Peer | None:
    """The store that a worker uses: its own machine's, else the first by id, of those whose KV fits. Pure."""
    infos = [member.info for member in members if member.info.role == "store"]
    fitting = [info for info in infos if own.identity.mismatch(info.identity) is None]
    if not fitting:
        return None
    store = min(fitting, key=lambda info: (not own.node or info.node != own.node, info.worker_id))
    return Peer(worker_id=store.worker_id, incarnation=store.incarnation, address=store.address)


class PeerWatch:
    """Use: `await run()` beside the rest of the worker, until cancelled."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        network: Network,
        coordinator_address: str,
        transports: TransportSet,
        prober: Prober,
        clock: Clock,
        fetches: bool,
        probes: bool = True,
        on_store: Callable[[Peer | None], None] = lambda store: None,
        log: Callable[[str], None],
    ) -> None:
        """`fetches`: whether prefixes may come from other workers and from stores; `probes`: whether anything is
        measured before it is needed. `on_store` is told which store this
        worker uses, again and again; the last one told counts while the coordinator does not answer."""
        self._info = info
        self._network = network
        self._coordinator_address = coordinator_address
        self._transports = transports
        self._prober = prober
        self._clock = clock
        self._fetches = fetches
        self._probes = probes
        self._on_store = on_store
        self._log = log
        #: Failed tries of lives that are not measured yet.
        self._tries: dict[Peer, int] = {}
        #: When the refused are measured again.
        self._repeat_at_s: dict[WorkerId, float] = {}
        #: Since the start, or since the role changed.
        self._eager_since_s = 0.0
        #: All that were told last.
        self.stores: frozenset[WorkerId] = frozenset()

    def role_changed(self, info: WorkerInfo) -> None:
        """This worker takes KV from others than before, and gets to know them as it did at its start."""
        self._info = info
        self._eager_since_s = self._clock.now_s()

    async def run(self) -> None:
        self._eager_since_s = self._clock.now_s()
        while True:
            for member in await self._members():
                await self._meet(member)
            eager = self._clock.now_s() - self._eager_since_s < EAGER_FOR_S
            await self._clock.sleep(EAGER_INTERVAL_S if eager else CALM_INTERVAL_S)

    async def _members(self) -> list[Member]:
        """Those that KV may come from and that are not measured; none while nobody answers."""
        try:
            channel = self._network.channel(self._coordinator_address)
            members = (await channel.call(MEMBERS, Empty(), timeout_s=ASK_TIMEOUT_S)).members
        except TandemError:
            return []  # the heartbeat task reports it
        # What was noted of workers that are gone goes with them.
        present = {member.info.worker_id: member.info.incarnation for member in members}
        self._tries = {each: n for each, n in self._tries.items() if present.get(each.worker_id) == each.incarnation}
        self._repeat_at_s = {each: at_s for each, at_s in self._repeat_at_s.items() if each in present}
        self.stores = frozenset(member.info.worker_id for member in members if member.info.role == "store")
        self._on_store(nearest_store(self._info, members))
        return [member for member in members if self._probes and self._concerns(member.info)]

    def _concerns(self, other: WorkerInfo) -> bool:
        if other.worker_id == self._info.worker_id or not self._takes_from(other):
            return False
        if not self._transports.is_probed(other.worker_id, other.incarnation):
            return True
        return self._clock.now_s() >= self._repeat_at_s.get(other.worker_id, math.inf)

    def _takes_from(self, other: WorkerInfo) -> bool:
        """Whether this worker's role has it take KV from the other's."""
        match self._info.role:
            case "store":
                return other.role != "store"
            case "decode":
                return other.role in ("prefill", "mixed")
            case "prefill":
                return self._fetches
            case "mixed":
                return self._fetches or other.role in ("prefill", "mixed")

    async def _meet(self, member: Member) -> None:
        other = member.info
        peer = Peer(worker_id=other.worker_id, incarnation=other.incarnation, address=other.address)
        if self._tries.get(peer, 0) >= MAX_TRIES:
            return
        await _MET_LATE.delay(_LONGEST_LATENESS_S)
        try:
            ask = DescribeRequest(target=peer.incarnation)
            described = await self._network.channel(peer.address).call(DESCRIBE, ask, timeout_s=ASK_TIMEOUT_S)
            if (mismatch := self._info.identity.mismatch(described.identity)) is not None:
                raise IncompatiblePeer(f"its KV does not fit: {mismatch}")
            choice = await self._transports.probe(peer, described.endpoints, described.num_blocks, self._prober)
        except NoCapacity:
            return  # the pool is full: later
        except TandemError as error:
            self._tries[peer] = self._tries.get(peer, 0) + 1
            self._log(f"{peer.worker_id} was not measured: {error.message}")
            return
        self._tries.pop(peer, None)
        self._repeat_at_s.pop(peer.worker_id, None)
        if choice.transport is None and not self._transports.is_probed(peer.worker_id, peer.incarnation):
            self._log(f"{peer.worker_id} is measured again: {choice.reason}")
        elif choice.transport is None:
            self._repeat_at_s[peer.worker_id] = self._clock.now_s() + REPEAT_AFTER_S
            self._log(f"ERROR: no KV is taken from {peer.worker_id}: {choice.reason}")
        else:
            self._log(f"KV from {peer.worker_id} comes by {choice.reason}")
