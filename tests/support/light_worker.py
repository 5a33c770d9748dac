"""A worker without an engine: registers, beats and tells of its blocks with the real parts, and computes nothing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.messages import LatencyFit, TransferReport, WorkerLoad
from kvstore.block_keys import HINT_BYTES, KEY_BYTES
from kvtransfer import Ledger
from worker.block_publisher import BlockPublisher
from worker.registration import Registration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.clock import Clock
    from contracts.messages import WorkerInfo, WorkerLife
    from rpc import Network

_FILLER = "light"
NO_STEPS = LatencyFit(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)


class LightWorker:
    """Use: `await run()`; it ends with `worker.watchdog.LifeOver` once the coordinator has given this life up."""

    def __init__(
        self,
        info: WorkerInfo,
        network: Network,
        coordinator_address: str,
        clock: Clock,
        *,
        fit: LatencyFit = NO_STEPS,
        log: Callable[[str], None],
    ) -> None:
        """Its cache has `info.total_blocks` blocks and holds none of them."""
        self.info = info
        self.ledger = Ledger(info.total_blocks)
        #: What it was told of others' ends.
        self.gone: list[WorkerLife] = []
        self._registration = Registration(
            info=info,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            load=lambda: WorkerLoad(**self.ledger.load()),
            transfers=TransferReport,
            latency=lambda: fit,
            on_gone=self.gone.append,
            on_registered_anew=lambda: self._publisher.registered_anew(),
            log=log,
        )
        self.registered = self._registration.registered
        self._publisher = BlockPublisher(
            info=info,
            held=self.ledger.all_keys,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            registered=self.registered,
            log=log,
        )
        self.ledger.key_listener = self._publisher

    def hold(self, hints: Iterable[bytes]) -> None:
        """Blocks with keys that begin so come into its cache; the ones used least lately leave when it is full."""
        for hint in hints:
            key = hint.ljust(KEY_BYTES, b"\0")
            if self.ledger.lookup(key) is not None:
                continue
            blocks = self.ledger.allocate(_FILLER, 1)
            assert blocks is not None, "nothing here is in use for longer than this"
            self.ledger.set_key(blocks[0], key)
            self.ledger.release(_FILLER, blocks)

    def forget(self, num_blocks: int) -> None:
        """So many blocks are needed for something else, free ones first, and are free again at once."""
        blocks = self.ledger.allocate(_FILLER, num_blocks)
        assert blocks is not None, f"fewer than {num_blocks} blocks are there"
        self.ledger.release(_FILLER, blocks)

    def held(self) -> set[bytes]:
        """Hints."""
        return {key[:HINT_BYTES] for key in self.ledger.all_keys()}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._registration.keep(), name=f"{self.info.worker_id}-registration")
            tasks.create_task(self._publisher.run(), name=f"{self.info.worker_id}-block-events")
