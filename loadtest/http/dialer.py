"""Opens connections to one server, whose name is looked up once."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from loadtest.http.connection import Connection


class Dialer:
    """Of a base URL. Raises ConfigError when that is none.

    `verify` false takes any certificate.
    """

    def __init__(self, base_url: str, *, verify: bool = True) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url!r}: must be http://HOST:PORT or https://HOST")
        self._host: str = parts.hostname
        self._tls = _tls_context(verify=verify) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        #: As the header `Host` wants it, and what stands before every path.
        self.netloc = parts.netloc
        self.path = parts.path.rstrip("/")
        #: The one that worked last comes first; empty: not looked up yet.
        self._addresses: list[str] = []
        self._lookup: asyncio.Task[list[str]] | None = None

    async def open(self, factory: Callable[[], Connection]) -> Connection:
        """Raises OSError: of the last address, when the server has several."""
        failure: OSError | None = None
        for address in tuple(self._addresses or await self._look_up()):
            try:
                _, connection = await asyncio.get_running_loop().create_connection(
                    factory, address, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
                )
            except OSError as error:
                failure = error
                continue
            if address != self._addresses[0]:
                self._addresses.remove(address)
                self._addresses.insert(0, address)
            return connection
        assert failure is not None
        try:
            raise failure
        finally:
            # Its traceback refers to this frame, and nobody collects circles during a run.
            del failure

    async def _look_up(self) -> list[str]:
        """All who wait for the name share one question; after a failure the next one asks anew."""
        if self._lookup is None:
            self._lookup = asyncio.create_task(self._ask())
        lookup = self._lookup
        try:
            # One who gives up does not take the answer from the others.
            self._addresses = await asyncio.shield(lookup)
        finally:
            if lookup.done() and self._lookup is lookup:
                self._lookup = None
            # As in `open`: its exception refers to this frame.
            del lookup
        return self._addresses

    async def _ask(self) -> list[str]:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise socket.gaierror(socket.EAI_NONAME, f"{self._host!r} is no name of a host: {error}") from None
        return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _tls_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
