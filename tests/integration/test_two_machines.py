"""Leased pulls over UCX between two machines, whose cable is throttled, cut and restored: real services, real gRPC,
two network namespaces. Skipped where namespaces are not permitted."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kvtransfer.ucx_agent import PACKAGES
from tests.support.netns import INTERFACE, two_machines

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Generator

    from tests.support.netns import Cable, Machine

NUM_BLOCKS = 96
BLOCK_BYTES = 1 << 20
#: Leaves a third of the reader's pool to others.
LEASED_BLOCKS = 64
LEASED_WORDS = LEASED_BLOCKS * BLOCK_BYTES // 8

#: 25 MB/s: the leased blocks take two and a half seconds.
SLOW = "200mbit"

#: Nothing waits for it when all is well.
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(package) for package in PACKAGES), reason="NIXL is not installed"
)

#: Within which a transfer whose machine has vanished must end; UCX is told ten seconds.
VANISHED_S = 20.0


class Side:
    """A worker's process, and calls to it."""

    def __init__(self, machine: Machine, process: subprocess.Popen[str]) -> None:
        self.machine = machine
        self.process = process
        self.address = str(self._answer()["address"])

    def __call__(self, method: str, *arguments: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the process on {self.machine.name} ended"
        return json.loads(line)


class Cluster:
    def __init__(self, holder: Side, reader: Side, cable: Cable) -> None:
        self.holder = holder
        self.reader = reader
        self.cable = cable

    def lease(self, num_blocks: int = LEASED_BLOCKS) -> tuple[str, list[int]]:
        opened = self.holder("open", self.reader.address, num_blocks)
        return opened["lease"], opened["blocks"]

    def end(self, lease: str) -> str:
        """How the lease ended for its reader."""
        until(lambda: lease in self.reader("ends"))
        return str(self.reader("ends")[lease])

    def check_adopted(self, lease: str, sources: list[int]) -> None:
        assert self.end(lease) == "adopted"
        assert self.reader("holds", lease, sources)
        self.reader("release", lease)

    def check_rest(self) -> None:
        """Nothing is held on either side."""
        until(lambda: [side("load")["free_blocks"] for side in (self.holder, self.reader)] == [NUM_BLOCKS] * 2)


@contextmanager
def cluster(ttl_s: float) -> Generator[Cluster]:
    with ExitStack() as stack:
        one, two, cable = stack.enter_context(two_machines())

        def start(kind: str, machine: Machine) -> Side:
            numbers = (str(NUM_BLOCKS), str(BLOCK_BYTES), str(ttl_s))
            module = (sys.executable, "-m", "tests.support.lease_worker")
            # Both are on one machine after all, and would copy memory.
            command = (*module, kind, machine.address, INTERFACE, *numbers)
            return Side(machine, stack.enter_context(machine.start(command, UCX_TLS="tcp")))

        yield Cluster(start("holder", one), start("reader", two), cable)


def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> float:
    """The seconds it took."""
    started_s = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started_s
        assert waited_s < within_s, f"not within {within_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - started_s


def test_bytes_cross_and_nothing_listens_elsewhere() -> None:
    with cluster(ttl_s=10.0) as both:
        lease, sources = both.lease()
        both.check_adopted(lease, sources)
        both.check_rest()
        for side in (both.holder, both.reader):
            listening = side.machine.run("ss", "-Hltn").splitlines()
            # gRPC's socket is of the other family, at the same address.
            hosts = {line.split()[3].rsplit(":", 1)[0].strip("[]").removeprefix("::ffff:") for line in listening}
            assert hosts == {side.machine.address}


def test_nothing_lands_in_blocks_that_were_reused() -> None:
    with cluster(ttl_s=2.0) as both:
        both.cable.throttle(SLOW)
        lease, _ = both.lease()
        until(lambda: both.reader("landed") > 0)
        both.holder.freeze()
        assert both.end(lease) != "adopted"
        # The lease is over, its pull is not: nobody gets those blocks, however much they are wanted.
        assert both.reader("load")["quarantined_blocks"] == LEASED_BLOCKS
        assert both.reader("reuse") == NUM_BLOCKS - LEASED_BLOCKS
        time.sleep(2.0)
        assert both.reader("load")["quarantined_blocks"] == LEASED_BLOCKS
        assert both.reader("reuse") == NUM_BLOCKS - LEASED_BLOCKS
        before_waking = both.reader("landed")
        both.holder.wake()
        until(lambda: both.reader("load")["quarantined_blocks"] == 0)
        landed = both.reader("landed")
        assert both.reader("reuse") == NUM_BLOCKS
        # Bytes did land late, in nobody's blocks, and the pull ended well before its last part.
        assert before_waking < landed < LEASED_WORDS
        # As long as the rest of the transfer would take, and more.
        time.sleep(4.0)
        assert both.reader("intact")
        assert both.reader("landed") == 0
        both.reader("release", "other")
        both.cable.unthrottle()
        lease, sources = both.lease()
        both.check_adopted(lease, sources)
        both.check_rest()


def test_short_cut_is_only_a_pause() -> None:
    with cluster(ttl_s=20.0) as both:
        both.cable.throttle(SLOW)
        lease, sources = both.lease()
        until(lambda: both.reader("landed") > 0)
        both.cable.cut()
        time.sleep(1.5)
        landed = both.reader("landed")
        time.sleep(0.5)
        assert both.reader("landed") == landed < LEASED_WORDS
        both.cable.restore()
        both.check_adopted(lease, sources)
        both.check_rest()


def test_vanished_machine_ends_the_pull_within_a_bound() -> None:
    with cluster(ttl_s=60.0) as both:
        both.cable.throttle(SLOW)
        lease, _ = both.lease()
        until(lambda: both.reader("landed") > 0)
        both.cable.cut()
        until(lambda: lease in both.reader("ends"), VANISHED_S)
        assert both.end(lease).startswith("transfer_aborted: ")
        assert "ended or cannot be reached" in both.end(lease)
        until(lambda: both.reader("load")["free_blocks"] == NUM_BLOCKS)
        assert both.reader("reuse") == NUM_BLOCKS
        both.cable.restore()
        both.cable.unthrottle()
        time.sleep(1.0)
        assert both.reader("intact")
        both.reader("release", "other")
        # The same lives find each other again.
        lease, sources = both.lease(8)
        both.check_adopted(lease, sources)


def test_throttled_in_mid_transfer() -> None:
    with cluster(ttl_s=10.0) as both:
        both.cable.throttle("1gbit")
        lease, sources = both.lease()
        until(lambda: both.reader("landed") > 0)
        both.cable.throttle(SLOW)
        both.check_adopted(lease, sources)
        both.check_rest()
