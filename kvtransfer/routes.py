"""A pull whose transport is not settled when it starts: the ways to its holder are tried in order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import Cancelled, IncompatiblePeer, TandemError, WorkerUnavailable
from kvtransfer.transport import PullResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvtransfer.transport import BlockPair, Pull, Transport

#: How long each transport may take to connect.
CONNECT_TIMEOUT_S = 2.0


class FailedPull:
    """A pull that never began."""

    def __init__(self, error: TandemError) -> None:
        self._error = error

    async def wait(self) -> PullResult:
        return PullResult(num_bytes=0, wire_s=0.0, error=self._error)

    def request_stop(self) -> None:
        pass


class RoutedPull:
    """Connects by one transport after the other, most preferred first, and pulls by the first that answers.

    Only connecting is tried again: once bytes move, their failure is the pull's.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        endpoints: Mapping[str, bytes],
        pairs: Sequence[BlockPair],
        on_settled: Callable[[str], None],
    ) -> None:
        """`on_settled` hears the name of the transport that answered."""
        self._stopped = False
        #: Set once one of them answered.
        self._pull: Pull | None = None
        self._task = asyncio.create_task(self._run(transports, endpoints, tuple(pairs), on_settled), name="routed-pull")

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._task)

    def request_stop(self) -> None:
        self._stopped = True
        if self._pull is not None:
            self._pull.request_stop()

    async def _run(
        self,
        transports: Sequence[Transport],
        endpoints: Mapping[str, bytes],
        pairs: Sequence[BlockPair],
        on_settled: Callable[[str], None],
    ) -> PullResult:
        problems: list[str] = []
        error: TandemError = IncompatiblePeer("no transport is common to the two workers")
        for transport in transports:
            try:
                await transport.connect(endpoints[transport.name], CONNECT_TIMEOUT_S)
            except TandemError as failure:
                error = failure
                problems.append(f"{transport.name}: {failure.message}")
                continue
            if self._stopped:
                return PullResult(num_bytes=0, wire_s=0.0, error=Cancelled("the pull was stopped"))
            on_settled(transport.name)
            self._pull = transport.pull(endpoints[transport.name], pairs)
            return await self._pull.wait()
        if len(problems) > 1:
            error = WorkerUnavailable("no transport reaches the holder: " + "; ".join(problems))
        return PullResult(num_bytes=0, wire_s=0.0, error=error)
