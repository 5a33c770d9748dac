"""What is done with blocks besides their transfer: at the holder before they are announced, at the reader after
they were pulled and before they count as pulled. Checksums, and staging of pools in device memory.

It runs on a thread of its own, one piece after the other. While it runs the blocks keep their class in the ledger
(pinned there, being pulled here), so that a late copy never meets another's bytes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from contracts.errors import ConfigError, TandemError
from kvtransfer.checksums import block_checksums, corrupt_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from contracts.ids import BlockId
    from kvtransfer.staging import Staging
    from kvtransfer.transport import Pool

Result = TypeVar("Result")


class Offload(Protocol):
    """Runs a function elsewhere than on the event loop."""

    async def __call__(self, work: Callable[[], Result], /) -> Result: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What came of making blocks ready. `error` None: they may be announced."""

    #: Parallel to the blocks; empty where checksums are off.
    checksums: tuple[int, ...] = ()
    #: Bytes hashed, and the time that took.
    num_bytes: int = 0
    checksum_s: float = 0.0
    error: TandemError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """What came of landing pulled blocks. All but the corrupt ones are where the engine reads them."""

    #: Positions in the order of the blocks asked about.
    corrupt: tuple[int, ...] = ()
    num_bytes: int = 0
    checksum_s: float = 0.0
    error: TandemError | None = None


class WorkThread:
    """An `Offload` to one thread, which starts with the first piece of work."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def __call__(self, work: Callable[[], Result], /) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """Waits for the piece under way; what is queued behind it is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class BlockWork:
    """Checksums and staging of one pool, as far as they are wanted."""

    def __init__(
        self,
        *,
        pool: Pool | None,
        checksum: bool,
        staging: Staging | None,
        clock: Clock,
        offload: Offload | None = None,
    ) -> None:
        """`offload` None: a thread of its own. Raises ConfigError for checksums without a pool."""
        if checksum and pool is None:
            raise ConfigError("checksums of blocks need the pool that holds them")
        self._pool = pool if checksum else None
        self._staging = staging
        self._clock = clock
        self._thread = WorkThread("kv-blocks") if offload is None else None
        self._offload = self._thread if offload is None else offload

    @property
    def checksum(self) -> bool:
        return self._pool is not None

    @property
    def wanted(self) -> bool:
        """There is anything to do at all."""
        return self._pool is not None or self._staging is not None

    async def prepare(self, blocks: Sequence[BlockId]) -> Preparation:
        """Makes final blocks ready to be pulled: to the host first, then their checksums there."""
        try:
            if self._staging is not None:
                await self._staging.stage_out(blocks)
            if self._pool is None:
                return Preparation()
            checksums, checksum_s = await self._timed(lambda pool: block_checksums(pool, blocks))
        except TandemError as error:
            return Preparation(error=error)
        return Preparation(checksums=checksums, num_bytes=len(blocks) * self._pool.block_bytes, checksum_s=checksum_s)

    async def land(self, blocks: Sequence[BlockId], expected: Sequence[int]) -> Landing:
        """Compares the bytes of pulled blocks, and moves the good ones on to the device.

        `expected` is parallel to `blocks`, or empty: then nothing is compared.
        """
        corrupt: tuple[int, ...] = ()
        num_bytes, checksum_s = 0, 0.0
        try:
            if self._pool is not None and expected:
                corrupt, checksum_s = await self._timed(lambda pool: corrupt_blocks(pool, blocks, expected))
                num_bytes = len(blocks) * self._pool.block_bytes
            bad = frozenset(corrupt)
            good = [block for index, block in enumerate(blocks) if index not in bad]
            if self._staging is not None and good:
                await self._staging.stage_in(good)
        except TandemError as error:
            return Landing(corrupt=corrupt, num_bytes=num_bytes, checksum_s=checksum_s, error=error)
        return Landing(corrupt=corrupt, num_bytes=num_bytes, checksum_s=checksum_s)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()

    async def _timed(self, work: Callable[[Pool], Result]) -> tuple[Result, float]:
        pool, offload = self._pool, self._offload
        assert pool is not None, "a checksum is asked for without a pool"
        assert offload is not None, "neither a thread nor another way to offload"

        def run() -> tuple[Result, float]:
            started_s = self._clock.now_s()
            return work(pool), self._clock.now_s() - started_s

        return await offload(run)
