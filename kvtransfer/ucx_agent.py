"""NIXL, as little of it as a leased pull needs: one agent, its memory, its peers, and one-sided reads.

Everything here blocks, and belongs to one thread. NIXL is loaded on first use.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator

    from kvtransfer.ucx_parts import Part

#: Import name -> distribution, by CUDA release. Both serve machines without CUDA.
PACKAGES = {"nixl_cu12": "nixl-cu12", "nixl_cu13": "nixl-cu13"}

BACKEND = "UCX"

#: NIXL's progress thread sleeps until UCX has something to do; it looks for itself this often. The default
#: of NIXL's Python package, 0, keeps a core busy for good.
PROGRESS_INTERVAL_US = 10_000

#: What UCX is told unless the process's environment says otherwise.
DEFAULTS = {
    # System V and POSIX shared memory cannot tell that a peer died, so UCX would only open and never use them.
    "UCX_TLS": "^sysv,posix",
    # A connection to a machine that has vanished ends within some ten seconds, whether it waits for bytes
    # (keep-alive), has sent some (user timeout), or is still being made (SYN).
    "UCX_TCP_KEEPIDLE": "3s",
    "UCX_TCP_KEEPINTVL": "2s",
    "UCX_TCP_KEEPCNT": "3",
    "UCX_TCP_USER_TIMEOUT": "10s",
    "UCX_TCP_SYN_CNT": "3",
    "UCX_KEEPALIVE_INTERVAL": "3s",
    # An unreachable peer does not hold up the others.
    "UCX_TCP_CONN_NB": "y",
    # Reads over TCP are answered in messages of this size: half as fast again as with UCX's own 8 KiB.
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    # UCX would patch every library of the process to hear of memory that goes, a third of a second with torch loaded.
    # It is for caches of registered memory; here only pools are, for as long as they live.
    "UCX_MEM_EVENTS": "n",
    # Signals are the interpreter's. A peer's death is a typed error here, not a line on standard output.
    "UCX_HANDLE_ERRORS": "none",
    "UCX_LOG_LEVEL": "fatal",
    "NIXL_LOG_LEVEL": "FATAL",
}


class State(enum.Enum):
    """Of one posted read."""

    BUSY = enum.auto()
    #: All bytes are there.
    DONE = enum.auto()
    #: Over; some bytes may be there.
    FAILED = enum.auto()


class Unreachable(Exception):
    """NIXL cannot reach the agent that some metadata describes."""


class Read:
    """One posted read. Must be polled until it is over, and then released."""

    def __init__(self, agent: Any, bindings: Any, handle: int, num_bytes: int) -> None:
        self._agent = agent
        self._bindings = bindings
        self._handle = handle
        self.num_bytes = num_bytes
        self.state = State.BUSY
        #: Why it failed, in NIXL's words.
        self.failure = ""

    def post(self) -> None:
        self._settle(self._agent.postXferReq)

    def poll(self) -> State:
        if self.state is State.BUSY:
            self._settle(self._agent.getXferStatus)
        return self.state

    def release(self) -> None:
        """Only when it is over: NIXL forgets a read under way, but its bytes still land."""
        assert self.state is not State.BUSY, "a read under way is released"
        # What NIXL could not let go stays with the agent.
        with contextlib.suppress(Exception):
            self._agent.releaseXferReq(self._handle)

    def _settle(self, ask: Any) -> None:
        try:
            status = ask(self._handle)
        except Exception as error:  # the bindings have a dozen kinds, of no common base
            self.state = State.FAILED
            self.failure = str(error)
            return
        if status == self._bindings.NIXL_SUCCESS:
            self.state = State.DONE


class Agent:
    """One NIXL agent over UCX, with what it registered."""

    def __init__(self, name: str, interface: str | None, *, serves: bool) -> None:
        """Listens on that network interface alone; None: on loopback. Raises ConfigError where NIXL is missing
        or cannot start. The first of a process loads NIXL, unless `preload` did.

        `serves`: others read from it, and a thread of NIXL's answers them. Otherwise nothing moves but in
        `Read.post`, `Read.poll` and `progress`.
        """
        devices = net_devices(interface)
        with _environment({**_chosen(), "UCX_NET_DEVICES": devices}):
            self._bindings, self.software = load()
            config = self._bindings.nixlAgentConfig()
            config.useProgThread = serves
            config.pthrDelay = PROGRESS_INTERVAL_US
            # Metadata travels over Tandem's own authenticated calls.
            config.useListenThread = False
            config.syncMode = self._bindings.NIXL_THREAD_SYNC_NONE
            try:
                self._agent: Any = self._bindings.nixlAgent(name, config)
                self._backend: int = self._agent.createBackend(BACKEND, {})
            except Exception as error:
                raise ConfigError(f"UCX over {devices} cannot start: {error}") from error
        self._registered: list[Any] = []

    def register(self, address: int, num_bytes: int, device: int | None) -> None:
        """Raises ConfigError where UCX cannot serve this memory."""
        pieces = self._bindings.nixlRegDList(self._memory(device), [(address, num_bytes, device or 0, "")])
        try:
            self._agent.registerMem(pieces, [self._backend])
        except Exception as error:
            where = "host memory" if device is None else f"memory of CUDA device {device}"
            raise ConfigError(f"UCX cannot register {num_bytes} bytes of {where}: {error}") from error
        self._registered.append(pieces)

    def metadata(self) -> bytes:
        """Covers all memory registered so far."""
        return bytes(self._agent.getLocalMD())

    def add(self, metadata: bytes) -> str:
        """Makes a peer known; its name. Returns before it is connected. Raises Unreachable."""
        try:
            name = self._agent.loadRemoteMD(metadata)
        except Exception as error:
            raise Unreachable(str(error)) from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def remove(self, name: str) -> None:
        """Forgets a peer and its connection; none of its reads may be under way."""
        # NIXL removes a peer by itself when its connection breaks.
        with contextlib.suppress(Exception):
            self._agent.invalidateRemoteMD(name)

    def read(self, peer: str, part: Part, source_device: int | None, target_device: int | None) -> Read:
        """Posts a read of the peer's pieces into one's own. Copies within one machine are over when it returns.
        Raises Unreachable."""
        bindings = self._bindings
        try:
            handle = self._agent.createXferReq(
                bindings.NIXL_READ,
                bindings.nixlXferDList(self._memory(target_device), part.targets),
                bindings.nixlXferDList(self._memory(source_device), part.sources),
                peer,
                "",
                [self._backend],
            )
        except Exception as error:
            raise Unreachable(str(error)) from error
        read = Read(self._agent, bindings, handle, part.num_bytes)
        read.post()
        return read

    def progress(self) -> None:
        """Takes note of what the peers' connections brought. One that does not serve must come here, or poll, every
        now and then: what nobody takes fills a connection until it breaks."""
        with contextlib.suppress(Exception):
            self._agent.getNotifs({}, [self._backend])

    def close(self) -> None:
        """No read may be under way. The sockets and NIXL's threads are gone afterwards."""
        for pieces in self._registered:
            with contextlib.suppress(Exception):
                self._agent.deregisterMem(pieces, [self._backend])
        self._registered.clear()
        self._agent = None

    def _memory(self, device: int | None) -> Any:
        return self._bindings.DRAM_SEG if device is None else self._bindings.VRAM_SEG


def net_devices(interface: str | None) -> str:
    """UCX's names of a network interface: its own, and those of the RDMA device behind it. None: loopback.

    Raises ConfigError where the machine has no such interface.
    """
    if interface is None:
        return "lo"
    known = [name for _, name in socket.if_nameindex()]
    if interface not in known:
        raise ConfigError(f"transfer.interface: no network interface {interface!r} here, only {', '.join(known)}")
    sysfs = Path("/sys/class/net") / interface
    try:
        port = int((sysfs / "dev_port").read_text()) + 1
        rdma = sorted(each.name for each in (sysfs / "device" / "infiniband").iterdir())
    except (OSError, ValueError):
        return interface
    return ",".join([*(f"{device}:{port}" for device in rdma), interface])


def load() -> tuple[Any, str]:
    """NIXL's bindings, and what a peer must run as well."""
    raise_exceptions = logging.raiseExceptions
    try:
        for module, distribution in PACKAGES.items():
            if importlib.util.find_spec(module) is not None:
                bindings = importlib.import_module(f"{module}._bindings")
                return bindings, f"nixl {importlib.metadata.version(distribution)}"
    except ImportError as error:
        raise ConfigError(f"transport ucx: NIXL is installed but cannot be loaded: {error}") from error
    finally:
        # NIXL sets logging up on import, for the whole process.
        logging.raiseExceptions = raise_exceptions
    raise ConfigError("transport ucx: NIXL is not installed; it comes with: pip install 'tandem-serve[ucx]'")


def preload() -> None:
    """Has the libraries in this process before an agent is made, which then takes less. No thread is started.
    Raises ConfigError as `load` does."""
    # Some settings are read when a library is loaded.
    with _environment(_chosen()):
        load()


def _chosen() -> dict[str, str]:
    return {name: os.environ.get(name, default) for name, default in DEFAULTS.items()}


@contextmanager
def _environment(settings: dict[str, str]) -> Generator[None]:
    """UCX reads its settings when an agent is made, from nowhere but the process's environment."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
