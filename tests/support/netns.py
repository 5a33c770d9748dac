"""Two machines on one: network namespaces joined by a virtual cable that can be cut and throttled.

    with two_machines() as (one, two, cable):
        with one.start([sys.executable, "-m", "some.server", "--bind", one.address]) as process:
            ...
            cable.cut()

Processes of the two see each other by `address` alone, on `interface`. They share everything else with the
test: files, process ids (signals work), and memory by CMA, so a transport that prefers shared memory must be
told not to. Needs iproute2 and the right to make namespaces; the test is skipped where either is missing.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: The same in both: each is alone in its namespace.
INTERFACE = "fabric0"

#: For one call of `ip` or `tc`, on a loaded machine.
COMMAND_TIMEOUT_S = 30.0

#: Bytes that tbf lets pass at once: more than the largest packet that segmentation offload hands it.
BURST = "128kb"

_NAME = re.compile(r"tandem-(\d+)-[0-9a-f]{6}-\d\b")


class NotPermitted(Exception):
    """A command of iproute2 failed, with what it said."""


def run_command(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise NotPermitted(f"{command[0]}: not installed") from error
    if done.returncode != 0:
        raise NotPermitted(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Machine:
    """One network namespace."""

    name: str
    address: str
    interface: str = INTERFACE

    def run(self, *command: str) -> str:
        """The output of a short command there. Raises NotPermitted where it fails."""
        return run_command("ip", "netns", "exec", self.name, *command)

    @contextmanager
    def start(self, command: Sequence[str], **environ: str) -> Generator[subprocess.Popen[str]]:
        """A process there, in the repository's root, with pipes for standard input and output; `environ` is
        added to this process's. Its id is the command's own. Killed at the end, also where it is stopped."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(COMMAND_TIMEOUT_S)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass(frozen=True, slots=True)
class Cable:
    """What joins the two. All changes hold for both directions, and may be repeated."""

    one: Machine
    two: Machine

    def cut(self) -> None:
        """Nothing passes, and neither side is told more than that its carrier is lost."""
        self._link("down")

    def restore(self) -> None:
        self._link("up")

    def throttle(self, rate: str) -> None:
        """At most `rate` each way, as tc writes it: "100mbit" is 12.5 MB/s."""
        for each in (self.one, self.two):
            shape = ("tbf", "rate", rate, "burst", BURST, "latency", "50ms")
            each.run("tc", "qdisc", "replace", "dev", each.interface, "root", *shape)

    def unthrottle(self) -> None:
        for each in (self.one, self.two):
            # Where it is not throttled there is nothing to delete.
            with contextlib.suppress(NotPermitted):
                each.run("tc", "qdisc", "del", "dev", each.interface, "root")

    def _link(self, state: str) -> None:
        for each in (self.one, self.two):
            each.run("ip", "link", "set", each.interface, state)


@contextmanager
def two_machines() -> Generator[tuple[Machine, Machine, Cable]]:
    """Makes both and their cable, and removes all of it at the end. Skips the test where that is not permitted."""
    stem = f"tandem-{os.getpid()}-{secrets.token_hex(3)}"
    one, two = Machine(f"{stem}-1", "10.77.0.1"), Machine(f"{stem}-2", "10.77.0.2")
    try:
        try:
            remove_abandoned()
            _join(one, two)
        except NotPermitted as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield one, two, Cable(one, two)
    finally:
        for each in (one, two):
            remove_namespace(each.name)


def _join(one: Machine, two: Machine) -> None:
    for each in (one, two):
        run_command("ip", "netns", "add", each.name)
    # Made inside the first, so that the test's own namespace never sees the cable.
    peer = ("peer", "name", INTERFACE, "netns", two.name)
    one.run("ip", "link", "add", INTERFACE, "type", "veth", *peer)
    for each in (one, two):
        each.run("ip", "address", "add", f"{each.address}/24", "dev", INTERFACE)
        each.run("ip", "link", "set", "lo", "up")
        each.run("ip", "link", "set", INTERFACE, "up")
    # The kernel tells of the carrier a moment later, and until then nothing uses the interface.
    deadline_s = time.monotonic() + COMMAND_TIMEOUT_S
    for each in (one, two):
        while "state UP" not in each.run("ip", "-oneline", "link", "show", INTERFACE):
            assert time.monotonic() < deadline_s, f"{INTERFACE} of {each.name} has no carrier"
            time.sleep(0.02)


def remove_namespace(name: str) -> None:
    """With a namespace goes its end of the cable, and with one end the other."""
    with contextlib.suppress(NotPermitted):
        run_command("ip", "netns", "delete", name)


def remove_abandoned() -> None:
    """Namespaces of test processes that were killed and could not remove their own."""
    for found in _NAME.finditer(run_command("ip", "netns", "list")):
        if not os.path.exists(f"/proc/{found.group(1)}"):
            remove_namespace(found.group(0))
