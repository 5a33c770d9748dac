"""What the two lease services share: a machine in its shell, calls whose failures are values, work on blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from contracts.errors import TandemError
from kvtransfer.shell import MachineShell

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import msgspec

    from contracts.clock import Clock
    from contracts.messages import Method, Peer
    from kvtransfer.block_work import BlockWork
    from kvtransfer.shell import Machine
    from rpc import Network

Event = TypeVar("Event")
Instruction = TypeVar("Instruction")
RequestT = TypeVar("RequestT", bound="msgspec.Struct")
ReplyT = TypeVar("ReplyT", bound="msgspec.Struct")


class LeaseService(ABC, Generic[Event, Instruction]):
    """One side of the leased pull, live. An async context manager."""

    def __init__(
        self,
        machine: Machine[Event, Instruction],
        *,
        network: Network,
        clock: Clock,
        tick: Event,
        work: BlockWork,
        close_grace_s: float,
        log: Callable[[str], None],
    ) -> None:
        self._network = network
        self._work = work
        self._log = log
        self._shell = MachineShell[Event, Instruction](
            machine,
            clock=clock,
            perform=self._perform,
            tick=tick,
            stop=self._end_all,
            close_grace_s=close_grace_s,
        )

    async def __aenter__(self) -> Self:
        await self._shell.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._shell.__aexit__(kind, error, trace)
        finally:
            self._work.close()

    @abstractmethod
    def _perform(self, instruction: Instruction) -> None:
        """Carries out one instruction of the machine, without waiting."""

    @abstractmethod
    def _end_all(self) -> None:
        """Ends every lease: the service is being left."""

    async def _call(
        self, peer: Peer, method: Method[RequestT, ReplyT], body: RequestT, timeout_s: float
    ) -> ReplyT | TandemError:
        """Calls a peer; what failed is an answer like any other to a machine."""
        try:
            return await self._network.channel(peer.address).call(method, body, timeout_s=timeout_s)
        except TandemError as error:
            return error
