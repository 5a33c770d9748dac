"""A site for every process: network namespaces on one bridge, between any two of which the way can be lost, each
direction by itself.

    with sites(["gateway", "coordinator"]) as (gateway, coordinator):
        subprocess.Popen([*gateway.launcher, sys.executable, "-m", "some.server", "--bind", gateway.address])
        with gateway.reachable("10.78.0.1:8000") as address: ...
        with lost((gateway, coordinator)): ...

What is lost is lost in silence: packets go to a hardware address that nobody has. Files, processes and memory are
shared, as are unix sockets in the file system. The test itself is nowhere: it sees a site's servers through
`reachable`. Needs iproute2 and the right to make namespaces; the test is skipped where either is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.layout import ROOT
from tests.support.netns import COMMAND_TIMEOUT_S, INTERFACE, NotPermitted, remove_abandoned, remove_namespace, run_command

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: Of no interface here.
_NOBODY = "02:00:00:00:00:ee"


@dataclass(frozen=True, slots=True)
class Site:
    """One network namespace."""

    name: str
    address: str
    #: Of its interface.
    hardware: str

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command is put behind to run there. Its process id stays its own."""
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def reachable(self, address: str) -> Generator[str]:
        """Where the test finds the server that listens at `address` there, for as long as the block lasts."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # A socket stays in the namespace in which it was made, whoever accepts from it.
            command = (sys.executable, "-m", "tests.support.relay", str(listener.fileno()), address)
            relay = subprocess.Popen([*self.launcher, *command], cwd=ROOT, pass_fds=[listener.fileno()])
            try:
                yield f"127.0.0.1:{listener.getsockname()[1]}"
            finally:
                relay.kill()
                relay.wait(COMMAND_TIMEOUT_S)


@contextmanager
def lost(*ways: tuple[Site, Site]) -> Generator[None]:
    """Nothing passes from the first to the second of each; the other direction is another way. Established
    connections survive a short loss, as TCP's do: what is under way then comes late."""
    try:
        for source, sink in ways:
            _direct(source, sink, _NOBODY)
        yield
    finally:
        for source, sink in ways:
            _direct(source, sink, sink.hardware)


def both_ways(one: Site, *others: Site) -> list[tuple[Site, Site]]:
    """Every way between `one` and each of the others."""
    return [way for other in others for way in ((one, other), (other, one))]


@contextmanager
def sites(names: Sequence[str]) -> Generator[list[Site]]:
    """Makes one for each name, all joined, and removes them at the end. Skips the test where that is not permitted."""
    # The suffix makes those of killed tests known to others, which remove them.
    stem = f"tandem-{os.getpid()}-{secrets.token_hex(3)}"
    hub = f"{stem}-0"
    made = [hub]
    try:
        try:
            remove_abandoned()
            _ip("netns", "add", hub)
            _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            _ip("-n", hub, "link", "set", "bridge", "up")
            found: list[Site] = []
            for number in range(1, 1 + len(names)):
                made.append(f"{stem}-{number}")
                found.append(_join(hub, made[-1], number))
            for site in found:
                for other in found:
                    if other is not site:
                        _direct(site, other, other.hardware)
        except NotPermitted as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield found
    finally:
        for name in reversed(made):
            with contextlib.suppress(NotPermitted):
                remove_namespace(name)


def _join(hub: str, name: str, number: int) -> Site:
    _ip("netns", "add", name)
    port = f"port{number}"
    _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _ip("-n", hub, "link", "set", port, "master", "bridge")
    _ip("-n", hub, "link", "set", port, "up")
    site = Site(name, f"10.78.0.{number}", f"02:00:00:00:01:{number:02x}")
    _ip("-n", name, "address", "add", f"{site.address}/24", "dev", INTERFACE)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "set", INTERFACE, "address", site.hardware)
    _ip("-n", name, "link", "set", INTERFACE, "up")
    return site


def _ip(*arguments: str) -> None:
    run_command("ip", *arguments)


def _direct(source: Site, sink: Site, hardware: str) -> None:
    """Packets from `source` to `sink` go to whoever has that hardware address."""
    _ip(
        *("-n", source.name, "neighbour", "replace", sink.address),
        *("lladdr", hardware, "dev", INTERFACE, "nud", "permanent"),
    )
