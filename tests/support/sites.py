"""Sites for processes: network namespaces on one bridge, between any two of which the way can be lost, each direction
by itself.

    with sites(["gateway"], ["prefill", "decode"]) as found:
        gateway = found["gateway"]
        subprocess.Popen([*gateway.launcher, sys.executable, "-m", "some.server", "--bind", gateway.address])
        with gateway.reachable(f"{gateway.address}:8000") as address: ...
        with lost((gateway, found["decode"])): ...

Sites of one group share a namespace (shared memory does not pass between two) and have an address each. What is lost is
lost in silence: packets go to a hardware address that nobody has. Files, processes and memory are shared by all. The
test itself is nowhere: it sees a site's servers through `reachable`. Needs iproute2 and the right to make namespaces.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.support.layout import ROOT
from tests.support.netns import (
    COMMAND_TIMEOUT_S,
    INTERFACE,
    NotPermitted,
    remove_abandoned,
    remove_namespace,
    run_command,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: Addresses of no interface here.
_NOBODY, _NOBODYS = "10.78.255.254", "02:00:00:00:00:ee"
#: Routing table by which everything goes there.
_LOST = "100"


@dataclass(frozen=True, slots=True)
class Site:
    """An address in a network namespace."""

    namespace: str
    address: str
    #: Its namespace has no other: what starts there comes from its address.
    is_alone: bool

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command is put behind to run there. Its process id stays its own."""
        return ("ip", "netns", "exec", self.namespace)

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
    connections survive a short loss, as TCP's do: what is under way then comes late.

    Of a group's site only what it answers is lost: what it begins does not come from its own address. `whole_group`
    loses that as well."""
    try:
        for source, sink in ways:
            _rule("add", source, sink)
        yield
    finally:
        for source, sink in ways:
            with contextlib.suppress(NotPermitted):
                _rule("del", source, sink)


def both_ways(one: Site, *others: Site) -> list[tuple[Site, Site]]:
    """Every way between `one` and each of the others."""
    return [way for other in others for way in ((one, other), (other, one))]


def whole_group(site: Site) -> Site:
    """As the source of a way: all that leaves its namespace."""
    return replace(site, is_alone=True)


@contextmanager
def sites(*groups: Sequence[str]) -> Generator[dict[str, Site]]:
    """Makes one for each name, all joined, and removes them at the end. Raises NotPermitted."""
    # Those of killed tests are known by such names, and removed by others.
    stem = f"tandem-{os.getpid()}-{secrets.token_hex(3)}"
    hub = f"{stem}-0"
    made = [hub]
    found: dict[str, Site] = {}
    try:
        remove_abandoned()
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for number, names in enumerate(groups, 1):
            made.append(f"{stem}-{number}")
            addresses = [f"10.78.{number}.{1 + at}" for at in range(len(names))]
            _join(hub, made[-1], number, addresses)
            for name, address in zip(names, addresses, strict=True):
                found[name] = Site(made[-1], address, len(names) == 1)
        yield found
    finally:
        for name in reversed(made):
            with contextlib.suppress(NotPermitted):
                remove_namespace(name)


def _join(hub: str, name: str, number: int, addresses: Sequence[str]) -> None:
    _ip("netns", "add", name)
    port = f"port{number}"
    _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", name)
    _ip("-n", hub, "link", "set", port, "master", "bridge")
    _ip("-n", hub, "link", "set", port, "up")
    for address in addresses:
        _ip("-n", name, "address", "add", f"{address}/16", "dev", INTERFACE)
    _ip("-n", name, "link", "set", "lo", "up")
    _ip("-n", name, "link", "set", INTERFACE, "up")
    # Where what is lost goes: a neighbour that is not there.
    _ip("-n", name, "neighbour", "add", _NOBODY, "lladdr", _NOBODYS, "dev", INTERFACE, "nud", "permanent")
    _ip("-n", name, "route", "add", "default", "via", _NOBODY, "dev", INTERFACE, "table", _LOST)


def _rule(change: str, source: Site, sink: Site) -> None:
    leaving = ("from", source.address) if not source.is_alone else ()
    _ip("-n", source.namespace, "rule", change, *leaving, "to", sink.address, "lookup", _LOST)


def _ip(*arguments: str) -> None:
    run_command("ip", *arguments)
