"""The other side of `cluster.template`: the process that workers are forked of.

It has one thread, always: a lock that another one holds would stay locked in the fork. So it has imported gRPC and
torch, and used neither: no channel, no event loop, no team of OpenMP threads (it computes nothing, and its environment
allows one thread only). That is checked before each fork.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.child_main import log
from cluster.launch import (
    MAX_LAUNCH_BYTES,
    Forked,
    NotForked,
    Warm,
    decode_fork_wish,
    decode_template_launch,
    encode_line,
)
from cluster.lifeline import die_with_parent
from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.launch import ForkWish

#: The word that a worker's program is told on its command line.
TEMPLATE_FLAG = "--template"

_NUM_PIPES = 3


def be_template(warm_up: Callable[[str], None]) -> bool:
    """Takes a `TemplateLaunch` from stdin, warms up for its device, and forks as often as it is asked to. True in each
    fork, whose stdin, stdout and stderr are its own, and its launch unread; False in the template, when it is over."""
    try:
        launch = decode_template_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        die_with_parent(launch.parent_pid)
        # What is imported stays. Collections would write to its pages, which the forks share.
        gc.disable()
        warm_up(launch.device)
        gc.freeze()
        gc.enable()
        if (count := num_threads()) != 1:
            log(f"template: what it imported has started threads: there are {count}, and nothing can be forked")
            return False
    except TandemError as error:
        log(f"template: {error.message}")
        return False
    with socket.socket(fileno=launch.descriptor) as link:
        try:
            return _serve(link)
        except ConnectionError:
            return False


def _serve(link: socket.socket) -> bool:
    """As `be_template`. Raises ConnectionError when the node agent is gone."""
    link.send(encode_line(Warm()))
    while True:
        data, descriptors, _, _ = socket.recv_fds(link, MAX_LAUNCH_BYTES, _NUM_PIPES)
        if not data:
            return False
        try:
            if _forks(link, decode_fork_wish(data), descriptors):
                return True
        except OSError as error:
            link.send(encode_line(NotForked(why=str(error))))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


def num_threads() -> int:
    """Of this process, Python's and all others."""
    return len(os.listdir("/proc/self/task"))


def _forks(link: socket.socket, wish: ForkWish, descriptors: Sequence[int]) -> bool:
    """True in the process that was made, False in this one. Raises OSError when there is none."""
    if len(descriptors) != _NUM_PIPES:
        raise OSError(f"{len(descriptors)} pipes came with the wish")
    if (count := num_threads()) != 1:
        raise OSError(f"this process has {count} threads")
    pid_end, pid_start = os.pipe()
    go_end, go_start = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            if os.fork() != 0:
                os._exit(0)
        except OSError:
            os._exit(1)
        # A group of its own before anybody knows its number, and signals it.
        os.setsid()
        os.write(pid_start, b"%d" % os.getpid())
        for descriptor in (pid_end, pid_start, go_start):
            os.close(descriptor)
        # Not before the middle one is gone: until then the parent is a wrong one.
        if not os.read(go_end, 1):
            os._exit(1)
        os.close(go_end)
        link.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.environ.update(wish.environ)
        _drop_flag()
        return True
    for descriptor in (pid_start, go_end):
        os.close(descriptor)
    try:
        os.waitpid(middle, 0)
        told = os.read(pid_end, 20)
        if not told:
            raise OSError("no process could be made")
        os.write(go_start, b"!")
    finally:
        os.close(pid_end)
        os.close(go_start)
    link.send(encode_line(Forked(pid=int(told))))
    return False


def _drop_flag() -> None:
    """A fork is listed as what it is: without the word that made a template of its parent's parent."""
    sys.argv.remove(TEMPLATE_FLAG)
    # Where the kernel keeps the command line that it shows: fields 48 and 49 of a process's line.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    # Zeros, to somebody who may not look there.
    if start < end and (at := ctypes.string_at(start, end - start).find(TEMPLATE_FLAG.encode() + b"\0")) >= 0:
        ctypes.memset(start + at, 0, len(TEMPLATE_FLAG))
