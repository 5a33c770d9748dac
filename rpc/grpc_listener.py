"""A gRPC server that goes on listening.

grpcio's asyncio server (seen with 1.85) reads the path of a call as UTF-8 in its main loop and does not expect
anything else: a single call with another byte there ends the loop, before any token is looked at, and with it the
listener and all calls that are open. The process lives on, deaf. So the loop is watched, and where it ends a new server
takes its place on the same address; peers connect again by themselves, as after any broken connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import types
from typing import TYPE_CHECKING, Any

from grpc import aio

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

#: Should a loop ever end without its task.
_LOOK_INTERVAL_S = 5.0
_CONNECT_TIMEOUT_S = 2.0
#: Somebody who can connect can do it again: so often at most everybody else is cut off.
_PAUSE_S = 0.2
_STOP_TIMEOUT_S = 1.0


class GrpcListener:
    """Bound to the event loop that it is started in."""

    def __init__(
        self, handler: grpc.GenericRpcHandler, options: Sequence[tuple[str, object]], log: Callable[[str], None]
    ) -> None:
        self._handler = handler
        self._options = options
        self._log = log
        self._server = self._new_server()
        self._address = ""
        self._guard: asyncio.Task[None] | None = None
        #: Set when a task of the server ended.
        self._look = asyncio.Event()

    async def start(self, bind: str) -> int:
        """The port that it listens on. Raises ConfigError when it cannot."""
        try:
            port: int = self._server.add_insecure_port(bind)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {bind}: {error}") from error
        host = bind.rpartition(":")[0]
        self._address = f"{host}:{port}"
        await self._begin()
        self._guard = asyncio.create_task(self._keep_listening(), name=f"listening on {self._address}")
        return port

    async def stop(self, grace_s: float) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.gather(self._guard, return_exceptions=True)
            self._guard = None
        await self._server.stop(grace_s)

    def _new_server(self) -> aio.Server:
        server = aio.server(options=list(self._options))
        server.add_generic_rpc_handlers((self._handler,))
        return server

    async def _begin(self) -> None:
        before = asyncio.all_tasks()
        await self._server.start()
        # That one of another server is among them does no harm.
        for task in _tasks_of_grpc() - before:
            task.add_done_callback(self._on_ended)

    def _on_ended(self, task: asyncio.Task[Any]) -> None:
        _hear(task)
        # The server shuts itself down in a task of its own, which ends with the same error.
        for each in _tasks_of_grpc():
            each.add_done_callback(_hear)
        self._look.set()

    async def _keep_listening(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_INTERVAL_S):
                    await self._look.wait()
            self._look.clear()
            if await self._listens():
                continue
            self._log(f"a call that gRPC could not read ended the listener on {self._address}: listening anew")
            try:
                await self.replace()
            except Exception as error:
                # Whatever it is: without this task the process would stay deaf.
                self._log(f"cannot listen on {self._address}: {error!r}; trying again")
                self._look.set()
            await asyncio.sleep(_PAUSE_S)

    async def _listens(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(_reachable(host), int(port))
        except ConnectionRefusedError:
            return False
        except (OSError, TimeoutError):
            # Too many open files, or a full backlog: not what a new listener would help.
            return True
        writer.close()
        return True

    async def replace(self) -> None:
        """A new server takes the place of the one that ended, on its address. Raises what gRPC raises."""
        before, self._server = self._server, self._new_server()
        # It has ended already, with the error that was told: what is left of it is let go.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await before.stop(None)
        self._server.add_insecure_port(self._address)
        await self._begin()


def _tasks_of_grpc() -> set[asyncio.Task[Any]]:
    """Those that are no coroutines of Python's."""
    return {task for task in asyncio.all_tasks() if not isinstance(task.get_coro(), types.CoroutineType)}


def _hear(task: asyncio.Task[Any]) -> None:
    """Takes its error: asyncio would print it, with no word of what it means."""
    if not task.cancelled():
        task.exception()


def _reachable(host: str) -> str:
    """An address at which a listener on this one is found from here."""
    plain = host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plain, plain)
