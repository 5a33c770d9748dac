"""The UCX transport, by way of NIXL: one-sided reads over RDMA, TCP, CMA or CUDA IPC, whatever joins two workers.

The holder's process takes no part in a read over RDMA, CMA or CUDA IPC; over TCP a thread of NIXL's answers.
See `kvtransfer.ucx_thread` for what makes a pull terminal, and docs/transports.md for what happens to pulls from
holders that are killed, frozen or cut off.

The data port listens on one network interface and knows no authentication: that network must be private.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, InvariantBroken
from kvtransfer.ucx_endpoint import encode_endpoint
from kvtransfer.ucx_thread import Forget, UcxThread
from kvtransfer.ucx_work import Probe, UcxPull

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from contracts.ids import Incarnation
    from kvtransfer.transport import BlockPair, Pool

#: How long `close` waits for pulls to become terminal. More than a vanished machine's connection takes to end.
CLOSE_TIMEOUT_S = 15.0


class UcxTransport:
    """`kvtransfer.transport.Transport` for workers that one network, or one machine, joins."""

    name = "ucx"

    def __init__(self, *, clock: Clock, incarnation: Incarnation, worker_name: str, interface: str | None) -> None:
        """`interface`: the network interface that KV travels on; None: this machine's workers alone."""
        self._clock = clock
        self._incarnation = incarnation
        self._worker_name = worker_name
        self._interface = interface
        #: From `register` to `close`.
        self._thread: UcxThread | None = None
        self._endpoint: bytes | None = None

    def register(self, pool: Pool) -> None:
        """Takes half a second, and where RDMA pins the pool longer: it does so twice, once for each direction. A pool
        with an attribute `device` that is not None lies in the memory of that CUDA device."""
        if self._thread is not None:
            raise InvariantBroken("a second pool is registered with the UCX transport")
        # No two lives share a name, not even those of one worker: peers tell them apart by it.
        agent = f"{self._worker_name}/{self._incarnation}/{secrets.token_hex(4)}"
        self._thread = UcxThread(
            pool, self._clock, agent=agent, interface=self._interface, incarnation=self._incarnation
        )
        assert self._thread.endpoint is not None, "the thread has started"
        self._endpoint = encode_endpoint(self._thread.endpoint)

    def endpoint(self) -> bytes:
        if self._endpoint is None:
            raise InvariantBroken("the UCX transport has no pool registered")
        return self._endpoint

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        thread = self._running()
        probe = Probe(endpoint, self._clock.now_s(), thread.scratch_address)
        thread.submit(probe)
        try:
            async with asyncio.timeout(deadline_s):
                error = await probe.done
        except TimeoutError:
            raise DeadlineExceeded(f"no holder answered over UCX within {deadline_s:g} s") from None
        if error is not None:
            raise error

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> UcxPull:
        thread = self._running()
        pull = UcxPull(endpoint, pairs, self._clock.now_s(), thread.rouse)
        thread.submit(pull)
        return pull

    def forget(self, endpoint: bytes) -> None:
        if self._thread is not None:
            self._thread.submit(Forget(endpoint))

    async def close(self) -> None:
        """As promised by `Transport`, within `CLOSE_TIMEOUT_S`. A pull whose holder is frozen by then is still not
        terminal: its `wait` goes on, and a thread of this process keeps the pool mapped until it is, or until the
        process ends."""
        thread, self._thread = self._thread, None
        self._endpoint = None
        if thread is not None:
            await thread.close(CLOSE_TIMEOUT_S)

    def _running(self) -> UcxThread:
        if self._thread is None:
            raise InvariantBroken("the UCX transport has no pool registered, or was closed")
        return self._thread
