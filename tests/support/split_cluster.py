"""Two prefill and two decode workers, a coordinator and a gateway: each a process of its own, and at a site of its own
where there are sites. Nobody restarts what a test has ended."""

from __future__ import annotations

import contextlib
import time
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx

from contracts.errors import TandemError
from contracts.messages import MEMBERS, Empty
from rpc import GrpcNetwork
from tests.support.chaos_asking import Asker, asking, clean, until_audit
from tests.support.sites import Site, sites

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from benchmarks.chaos_reference import Auditor
    from contracts.messages import AuditReply, MembersReply
    from tests.support.chaos_processes import Part, Processes
    from tests.support.chaos_worker import Brake

#: Gateway, coordinator, then the workers, as their sites are named.
NAMES = ("gateway", "coordinator", "prefill-0", "prefill-1", "decode-0", "decode-1")
#: Keys of the tenants; the last is of those without one.
RED, BLUE, OPEN = "red-key", "blue-key", "open-key"

CONFIG: dict[str, Any] = {
    "model": "demo",
    "dtype": "float32",
    "transport": "shm",
    # Measuring takes blocks for a while.
    "transfer": {"probe": False},
    "engine": {"max_batch_tokens": 96},
    "gateway": {
        "api_keys": [OPEN],
        "tenants": [{"name": "red", "api_keys": [RED]}, {"name": "blue", "api_keys": [BLUE]}],
    },
    "pools": [
        {"name": "prefill", "role": "prefill", "workers": 2, "kv_blocks": 256},
        {"name": "decode", "role": "decode", "workers": 2, "kv_blocks": 256},
    ],
}

#: By which a step of a braked decode worker takes longer.
SLOW_STEP_S = 0.02

#: What a worker sends in its next heartbeat but one has happened before: bookings of what is over are gone.
_SETTLED_S = 0.6


class SplitCluster:
    """Ready once constructed. `addresses` are those by which its processes know each other."""

    def __init__(
        self, processes: Processes, places: Mapping[str, Site], stack: ExitStack, auditor: Auditor, brake: Brake
    ) -> None:
        self.processes = processes
        self.sites = places
        self._brake = brake
        self.auditor = auditor
        self._stack = stack
        self.coordinator = self._at("coordinator", processes.start_coordinator)
        self.addresses = {"coordinator": self.coordinator.address}
        self.workers: dict[str, Part] = {}
        for name in NAMES[2:]:
            self.workers[name] = self._at(name, partial(self._start_worker, name))
        host = {"gateway.host": self.sites["gateway"].address} if self.sites else {}
        self.gateway = self._at("gateway", lambda _: processes.start_gateway(settings=host))
        for name, worker in self.workers.items():
            processes.wait_ready(worker)
            self.addresses[name] = worker.address
            worker.address = self._reached(name, worker.address)
        base_url = self.gateway.address
        self.gateway.address = f"http://{self._reached('gateway', base_url.removeprefix('http://'))}"
        self.coordinator_reached = self._reached("coordinator", self.coordinator.address)
        processes.wait_serving(self.gateway)

    # --- asking -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def asker(self) -> AsyncGenerator[Asker]:
        """For one test: begins and ends with everything up and clean."""
        await self.until_calm()
        try:
            async with asking(self.gateway.address, self.auditor) as asker:
                asker.client.headers["authorization"] = f"Bearer {OPEN}"
                yield asker
        finally:
            self._brake.release()
        await self.until_calm()

    @contextlib.asynccontextmanager
    async def client(self, key: str) -> AsyncGenerator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(base_url=self.gateway.address, timeout=60.0, headers=headers) as client:
            yield client

    # --- looking ----------------------------------------------------------------------------------

    async def audit(self) -> Mapping[str, AuditReply]:
        """Of those that live and answer."""
        try:
            living = [one for one in self.workers.values() if one.process.poll() is None]
            return await self.processes.audit(living, 2.0)
        except TandemError:
            return {}

    async def members(self) -> MembersReply | None:
        """As the coordinator tells; None: it does not answer."""
        async with AsyncExitStack() as stack:
            network = GrpcNetwork(token=self.processes.token)
            stack.push_async_callback(network.close)
            try:
                return await network.channel(self.coordinator_reached).call(MEMBERS, Empty(), timeout_s=2.0)
            except TandemError:
                return None

    async def until_calm(self) -> None:
        """Every worker up, heard of by the coordinator since whatever was asked before ended, and its books clean."""
        await until_audit(
            self.audit, lambda audits: len(audits) == len(self.workers) and clean(audits), "every ledger is clean"
        )
        began_s = time.monotonic()
        while True:
            reply = await self.members()
            heard_s = time.monotonic()
            if reply is not None and len(reply.members) == len(self.workers):
                beats_s = [heard_s - member.heartbeat_age_s for member in reply.members]
                if min(beats_s) > began_s + _SETTLED_S and {one.state for one in reply.members} == {"up"}:
                    return
            assert heard_s < began_s + 60.0, f"not everybody is up: {reply and reply.members}"

    async def directory_blocks(self) -> int:
        reply = await self.members()
        return 0 if reply is None or reply.coordinator is None else reply.coordinator.directory_blocks

    async def busiest(self, role: str) -> str:
        """Name of the worker with most requests."""
        audits = await self.audit()
        return max(
            (name for name in self.workers if name.startswith(role)), key=lambda name: audits[name].open_requests
        )

    # --- meddling ---------------------------------------------------------------------------------

    def restart_coordinator(self, settings: Mapping[str, str] | None = None) -> None:
        """Ends it if it has not ended, and starts it again on its address."""
        self.coordinator.kill()
        self.coordinator = self._at(
            "coordinator",
            lambda _: self.processes.start_coordinator(self.addresses["coordinator"], settings=settings),
        )

    def slow_decoding(self) -> None:
        """Answers last as long as a fault does, however fast the machine is; until the asker leaves."""
        for name, worker in self.workers.items():
            if name.startswith("decode"):
                self._brake.slow(worker.process.pid, SLOW_STEP_S)

    def revive(self) -> None:
        """Starts the workers that have ended anew, on the address they had."""
        for name, worker in self.workers.items():
            if worker.process.poll() is not None:
                new = self._at(name, partial(self._start_worker, name, known=self.addresses[name]))
                self.processes.wait_ready(new)
                new.address = worker.address
                self.workers[name] = new

    def _start_worker(self, name: str, bind: str, known: str | None = None) -> Part:
        """`known`: where it was before."""
        pool, _, index = name.rpartition("-")
        return self.processes.start_worker(pool, int(index), known or bind, wait=False)

    def _at(self, name: str, start: Callable[[str], Part]) -> Part:
        """Starts a process where it belongs; `start` is given the address to bind to."""
        site = self.sites.get(name)
        self.processes.launcher = () if site is None else site.launcher
        part = start("127.0.0.1:0" if site is None else f"{site.address}:0")
        return part

    def _reached(self, name: str, address: str) -> str:
        site = self.sites.get(name)
        return address if site is None else self._stack.enter_context(site.reachable(address))


def places(stack: ExitStack) -> dict[str, Site]:
    """A site for each name. Raises NotPermitted."""
    return stack.enter_context(sites(NAMES[:1], NAMES[1:2], NAMES[2:]))


async def until_directory(cluster: SplitCluster, num_blocks: int) -> None:
    """Returns once the coordinator knows of so many blocks."""
    until_s = time.monotonic() + 60.0
    while (known := await cluster.directory_blocks()) < num_blocks:
        assert time.monotonic() < until_s, f"the directory has {known} blocks, not {num_blocks}"
