"""What the processes of a node agent have in common: status lines, signs of life, and how they are ended."""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
import sys
from typing import TYPE_CHECKING, TypeVar, cast

import uvloop

from cluster.launch import (
    MAX_LAUNCH_BYTES,
    SIGN_OF_LIFE_S,
    Alive,
    Failed,
    Status,
    StoreLaunch,
    Warm,
    WorkerLaunch,
    decode_standby_launch,
    encode_line,
)
from cluster.lifeline import die_with_parent, is_at_end_of_file, settle, wait_for_end_of_file
from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from io import BufferedReader

    from contracts.clock import Clock

LaunchT = TypeVar("LaunchT", WorkerLaunch, StoreLaunch)

#: How long a busy thread may keep the interpreter from one that wants it. Every kernel call lets it go, and the
#: engine's thread would wait the default of 5 ms for it to come back whenever the loop is busy.
SWITCH_INTERVAL_S = 0.0005


#: What a process prepares before it leaves may take so long. Whoever sent the signal expects it to be gone within 10 s.
LEAVE_S = 8.0


def log(line: str) -> None:
    """One line to stderr, which the node agent collects. A full disk or a gone reader ends no worker."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def tell(status: Status) -> None:
    """One status line to the node agent. When it does not read any more, the life-line says so too."""
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(encode_line(status))
        sys.stdout.buffer.flush()


def tell_if_room(status: Status) -> None:
    """As `tell`, but never waits: a status that nobody takes is dropped. For a running event loop."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if any(events & select.POLLOUT for _, events in poll.poll(0)):
        tell(status)


class Departure:
    """How a process leaves that somebody else than its parent tells to go: `prepare` is awaited first, for as long as
    `LEAVE_S` at most. None: there is nothing to prepare."""

    def __init__(self) -> None:
        self.prepare: Callable[[], Coroutine[object, object, object]] | None = None


def stand_by(warm_up: Callable[[str], None]) -> bool:
    """Takes a `StandbyLaunch` from stdin, warms up for its device, says so, and waits. Returns when the launch comes,
    which is left unread; False when the parent is gone, or wants nothing of this process any more."""
    try:
        launch = decode_standby_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        if launch.parent_pid is not None:
            die_with_parent(launch.parent_pid)
        warm_up(launch.device)
    except TandemError as error:
        log(f"standing by: {error.message}")
        return False
    tell(Warm())
    # Closed, it is readable too, and has nothing to read.
    return bool(cast("BufferedReader", sys.stdin.buffer).peek(1))


def run_child(
    what: str,
    decode: Callable[[bytes], LaunchT],
    serve: Callable[[LaunchT, Departure], Coroutine[object, object, None]],
) -> int:
    """The whole life of a process: takes its launch from stdin and its place, serves, and tells why it ends where it
    cannot go on. Returns the exit status."""
    name = what
    try:
        launch = decode(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        name = launch.worker_id
        settle(launch)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        departure = Departure()
        uvloop.run(serve_until_told(serve(launch, departure), departure))
    except TandemError as error:
        tell(Failed(error=error.code, message=error.message))
        log(f"{name}: {error.message}")
        return 1
    return 0


async def serve_until_told(serving: Coroutine[object, object, None], departure: Departure | None = None) -> None:
    """Runs until the parent goes away or asks this process to stop, or somebody else does and what `departure` prepares
    is done. A second signal ends that at once. Raises what `serving` ends with."""
    loop = asyncio.get_running_loop()
    stops = [asyncio.Event(), asyncio.Event()]

    def on_signal() -> None:
        stops[1 if stops[0].is_set() else 0].set()

    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, on_signal)
    server = asyncio.create_task(serving, name="serve")
    enders: list[asyncio.Task[object]] = [
        asyncio.create_task(stops[0].wait(), name="stop-signal"),
        asyncio.create_task(wait_for_end_of_file(sys.stdin.fileno()), name="life-line"),
    ]
    await asyncio.wait([server, *enders], return_when=asyncio.FIRST_COMPLETED)
    prepare = None if departure is None else departure.prepare
    if stops[0].is_set() and prepare is not None and not server.done() and not is_at_end_of_file(sys.stdin.fileno()):
        enders.append(asyncio.create_task(stops[1].wait(), name="second-signal"))
        leaving = asyncio.ensure_future(prepare())
        enders.append(asyncio.create_task(asyncio.wait_for(leaving, LEAVE_S), name="leaving"))
        await asyncio.wait([server, *enders[1:]], return_when=asyncio.FIRST_COMPLETED)
    for task in (server, *enders):
        task.cancel()
    await asyncio.wait([server, *enders])
    if not server.cancelled() and (error := server.exception()) is not None:
        raise single(error)


def single(error: BaseException) -> BaseException:
    """The first error of a group: a process ends with one reason."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return single(group.exceptions[0])
    return error


async def tell_alive(clock: Clock) -> None:
    """From the event loop: a loop that is stuck tells nothing, and the node agent ends it."""
    while True:
        await clock.sleep(SIGN_OF_LIFE_S)
        tell_if_room(Alive())
