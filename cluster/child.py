"""One life of a worker process: started by exec, or forked by a template; spoken to over three pipes, ended with its
whole group.

stdin carries the launch document and then only stays open (the life-line); stdout carries status lines;
stderr is the log. The process is made by `subprocess` and not by the event loop: on Linux that is a vfork and
an exec, which runs none of the fork handlers of gRPC, and its end is seen on a pidfd, whoever still holds
its pipes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from subprocess import PIPE
from typing import IO, TYPE_CHECKING, Protocol, Self

from cluster.launch import decode_status, encode_line
from cluster.process_log import LineSplitter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from cluster.guard import Guard
    from cluster.launch import Message, Status
    from cluster.process_log import ProcessLog

#: After the process is gone, its pipes may be held open by what it started; they get this long.
DRAIN_S = 1.0

_READ_BYTES = 64 * 1024


class Process(Protocol):
    """As much of `subprocess.Popen` as is needed here."""

    pid: int

    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    @property
    def stderr(self) -> IO[bytes] | None: ...
    def terminate(self) -> None: ...
    def wait(self) -> int: ...


class Child:
    """`ended` must be awaited once: it reads the pipes, and returns when the process is gone."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        launch: Message,
        guard: Guard,
        *,
        descriptors: Sequence[int] = (),
    ) -> None:
        """It inherits `descriptors`, under their numbers. Raises OSError when there is no such program, or no more
        processes."""
        process = subprocess.Popen(
            command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            bufsize=0,
            env=environ,
            start_new_session=True,
            pass_fds=tuple(descriptors),
        )
        self._begin(process, launch, guard)

    @classmethod
    def of(cls, process: Process, launch: Message, guard: Guard) -> Self:
        """Of one that was made in another way: a child of this process, that leads a group of its own."""
        child = cls.__new__(cls)
        child._begin(process, launch, guard)
        return child

    def _begin(self, process: Process, launch: Message, guard: Guard) -> None:
        self._guard = guard
        self._process = process
        guard.watch(process.pid)
        #: Its write end; closed by `terminate` and at the end.
        self._lifeline = _present(process.stdin)
        self.give(launch)

    @property
    def pid(self) -> int:
        return self._process.pid

    def give(self, message: Message) -> None:
        """Tells it what to be: at its start, and once more where that was to stand by, or to wait."""
        # Fits into the empty pipe, so this does not wait.
        with contextlib.suppress(BrokenPipeError):
            self._lifeline.write(encode_line(message))

    @property
    def is_alive(self) -> bool:
        """Before `ended` is awaited. One that is gone is left for `ended` or `bury` to see out."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def bury(self) -> None:
        """Instead of `ended`, of one that is gone: its group is dead, its pipes are closed."""
        self.kill()
        self._guard.forget(self.pid)
        self._process.wait()
        self._reap_orphans()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            _present(pipe).close()

    def told_so_far(self) -> list[Status]:
        """Status lines that wait to be read, without waiting for more. Before `ended` is awaited."""
        pipe = _present(self._process.stdout)
        os.set_blocking(pipe.fileno(), False)
        # A line is written at once, and the pipe holds all that a process tells while it stands by.
        lines = (pipe.read(_READ_BYTES) or b"").splitlines()
        return [status for status in map(decode_status, lines) if status is not None]

    def terminate(self) -> None:
        """Asks it to leave, twice over."""
        self._lifeline.close()
        self._process.terminate()

    def kill(self) -> None:
        """The process and whatever it started, unless that has left its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def ended(self, tell: Callable[[Status], Awaitable[None]], log: ProcessLog) -> str:
        """Passes on what it writes until it is gone; says how it ended. Its group is dead on every return."""
        try:
            async with asyncio.TaskGroup() as tasks:
                readers = [
                    tasks.create_task(self._read_status(tell, log), name=f"status-{self.pid}"),
                    tasks.create_task(self._read_log(log), name=f"log-{self.pid}"),
                ]
                await _dead(self.pid)
                # Before it is reaped: until then nobody else can have its group's number.
                self.kill()
                await asyncio.wait(readers, timeout=DRAIN_S)
                for task in readers:
                    task.cancel()
        finally:
            self.kill()
            self._lifeline.close()
            self._guard.forget(self.pid)
            code = await asyncio.shield(asyncio.to_thread(self._process.wait))
            self._reap_orphans()
        return _how(code)

    def _reap_orphans(self) -> None:
        """What the process had started, and this one got as its child (see `cluster.template`); its group's number is
        taken as long as there is any."""
        with contextlib.suppress(ChildProcessError):
            while os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOHANG) is not None:
                pass

    async def _read_status(self, tell: Callable[[Status], Awaitable[None]], log: ProcessLog) -> None:
        async with contextlib.aclosing(_lines(_present(self._process.stdout))) as lines:
            async for line in lines:
                status = decode_status(line)
                if status is None:
                    log.write(line)
                else:
                    await tell(status)

    async def _read_log(self, log: ProcessLog) -> None:
        async with contextlib.aclosing(_lines(_present(self._process.stderr))) as lines:
            async for line in lines:
                log.write(line)


def _present(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "all three pipes were asked for"
    return pipe


async def _lines(pipe: IO[bytes]) -> AsyncGenerator[bytes]:
    """Lines until the end of the pipe, which is closed on every way out."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    splitter = LineSplitter()
    try:
        while data := await reader.read(_READ_BYTES):
            for line in splitter.feed(data):
                yield line
        for line in splitter.finish():
            yield line
    finally:
        transport.close()


async def _dead(pid: int) -> None:
    """Returns once the process has ended."""
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _how(code: int) -> str:
    if code >= 0:
        return f"it exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it was ended by {name}"
