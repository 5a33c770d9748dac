"""Measures a transport to one holder: pulls blocks of it into scratch blocks, and looks at the clock.

Scratch blocks are reserved in the ledger like those of a lease, so that a probe that does not end leaves them in
quarantine, never free. What the holder's blocks hold does not matter, and is never read.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity, TandemError
from contracts.ids import BlockId, LeaseId
from kvtransfer.links import Measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from kvtransfer.ledger import Ledger
    from kvtransfer.transport import BlockPair, PullResult, Transport

#: Bytes of one bandwidth sample, as far as both pools have blocks for it.
BULK_BYTES = 16 << 20

#: Samples of each kind; the best counts, for the machine may be busy with other starts.
NUM_SAMPLES = 3

#: How long connecting, and each sample, may take.
STEP_TIMEOUT_S = 3.0


class Prober:
    """Probes of one worker. `on_settled` is called whenever scratch blocks came back."""

    def __init__(self, ledger: Ledger, clock: Clock, *, block_bytes: int, on_settled: Callable[[], None]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._block_bytes = block_bytes
        self._on_settled = on_settled
        self._numbers = itertools.count(1)
        #: Probes given up whose last pull is not terminal.
        self._stragglers: set[asyncio.Task[None]] = set()

    async def measure(self, transport: Transport, endpoint: bytes, holder_blocks: int) -> Measured:
        """What the way or the holder does wrong is `Measured.problem`.

        Raises NoCapacity when this pool has no block to spare: then nothing was learnt.
        """
        wanted = max(1, min(BULK_BYTES // self._block_bytes, holder_blocks, self._ledger.available_blocks // 4))
        lease_id = LeaseId(f"probe/{transport.name}/{next(self._numbers)}")
        scratch = self._ledger.reserve(lease_id, wanted)
        if scratch is None:
            raise NoCapacity("no free block to measure with")
        pairs = [(BlockId(index), block) for index, block in enumerate(scratch)]
        try:
            await transport.connect(endpoint, STEP_TIMEOUT_S)
            latency_s = await self._best(transport, endpoint, lease_id, pairs[:1])
            bulk_s = await self._best(transport, endpoint, lease_id, pairs) if wanted > 1 else latency_s
        except TandemError as error:
            return Measured(transport=transport.name, problem=error.message)
        except TimeoutError:
            return Measured(
                transport=transport.name, problem=f"a pull of {wanted} blocks took longer than {STEP_TIMEOUT_S:g} s"
            )
        finally:
            # Quarantined where a pull is still in flight; `_settle` ends that.
            self._ledger.abort(lease_id)
            self._on_settled()
        num_bytes = wanted * self._block_bytes
        return Measured(
            transport=transport.name, bandwidth_bytes_per_s=num_bytes / max(bulk_s, 1e-9), latency_s=latency_s
        )

    async def close(self) -> None:
        """Waits for nothing: the transports' own close ends what is in flight."""
        for task in self._stragglers:
            task.cancel()
        if self._stragglers:
            await asyncio.wait(self._stragglers)

    async def _best(self, transport: Transport, endpoint: bytes, lease_id: LeaseId, pairs: list[BlockPair]) -> float:
        """Seconds of the fastest of some pulls. Raises what a pull ended with, or TimeoutError."""
        best_s = float("inf")
        for _ in range(NUM_SAMPLES):
            started_s = self._clock.now_s()
            result = await self._pull(transport, endpoint, lease_id, pairs)
            if result.error is not None:
                raise result.error
            best_s = min(best_s, self._clock.now_s() - started_s)
        return best_s

    async def _pull(
        self, transport: Transport, endpoint: bytes, lease_id: LeaseId, pairs: list[BlockPair]
    ) -> PullResult:
        self._ledger.begin_pull(lease_id)
        pull = transport.pull(endpoint, pairs)

        async def settle() -> None:
            await pull.wait()
            self._ledger.settle(lease_id)
            self._on_settled()

        waiting = asyncio.ensure_future(pull.wait())
        try:
            async with asyncio.timeout(STEP_TIMEOUT_S):
                result = await asyncio.shield(waiting)
        except BaseException:
            pull.request_stop()
            waiting.cancel()
            straggler = asyncio.create_task(settle(), name=f"settle {lease_id}")
            self._stragglers.add(straggler)
            straggler.add_done_callback(self._stragglers.discard)
            raise
        self._ledger.end_pull(lease_id)
        return result
