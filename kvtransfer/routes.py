"""A pull whose transport is not settled when it starts: the ways to its holder are tried in order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import Cancelled, TandemError, WorkerUnavailable
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
        """`transports` is not empty; `on_settled` hears the name of the one that answered."""
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
        try:
            transport = await self._first_to_connect(transports, endpoints)
            if self._stopped:
                raise Cancelled("the pull was stopped")
        except TandemError as error:
            return PullResult(num_bytes=0, wire_s=0.0, error=error)
        on_settled(transport.name)
        self._pull = transport.pull(endpoints[transport.name], pairs)
        return await self._pull.wait()

    async def _first_to_connect(self, transports: Sequence[Transport], endpoints: Mapping[str, bytes]) -> Transport:
        """Raises what the only transport said, or WorkerUnavailable with what each of them said."""
        failures: list[TandemError] = []
        for transport in transports:
            if self._stopped:
                raise Cancelled("the pull was stopped")
            try:
                await transport.connect(endpoints[transport.name], CONNECT_TIMEOUT_S)
            except TandemError as failure:
                failures.append(failure)
            else:
                return transport
        if len(failures) == 1:
            raise failures[0]
        said = (f"{each.name}: {failure.message}" for each, failure in zip(transports, failures, strict=True))
        raise WorkerUnavailable("no transport reaches the holder: " + "; ".join(said))
