"""How a child process learns that its parent is gone, and takes its place on the machine.

Two independent ways: the kernel's parent-death signal (at once, Linux), and the end of file on stdin (works
wherever a pipe does, and also when the parent only closes its end).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.launch import Launch

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process when `parent_pid` dies; exits now if it already has."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


def settle(launch: Launch) -> None:
    """First thing in a worker's life, before torch is imported: threads inherit the cores set here."""
    if launch.parent_pid is not None:
        die_with_parent(launch.parent_pid)
    if launch.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, launch.cores)


def is_at_end_of_file(fd: int) -> bool:
    """Whether the other end of the pipe `fd` is closed by now, seen or not."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


async def wait_for_end_of_file(fd: int) -> None:
    """Returns once the other end of the pipe `fd` is closed; what is written to it is dropped."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not os.read(fd, 4096) and not closed.done():
            loop.remove_reader(fd)
            closed.set_result(None)

    loop.add_reader(fd, on_readable)
    try:
        await closed
    finally:
        loop.remove_reader(fd)
