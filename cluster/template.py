"""One process that has imported all that a CPU worker needs, and of which workers are forked within milliseconds.

Most of a small worker's start is Python's imports. Started by exec, N workers import N times; forked of one process
that has, they import once, and share those pages. It works for processes in which nothing runs but one thread, and
which have touched no device: the template (`cluster.template_process`) answers for that and refuses otherwise. Whatever
does not work, the worker is started by exec.

A fork makes a process that is the agent's own child, as one of exec is: the template forks twice, and the kernel gives
the orphan to the agent, which asks for orphans (PR_SET_CHILD_SUBREAPER) no longer than that takes. Whoever else of its
descendants lost a parent just then is a child of the agent as well: `Child` reaps what is left of its group.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, ClassVar

from cluster.child import Child
from cluster.launch import Forked, ForkWish, NotForked, TemplateLaunch, Warm, decode_template_answer, encode_line
from cluster.standby import OWN_LATER, lasting
from cluster.template_process import TEMPLATE_FLAG
from cluster.uninterrupted import uninterrupted

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from cluster.guard import Guard
    from cluster.launch import Message, TemplateAnswer
    from cluster.process_log import ProcessLog
    from contracts.clock import Clock

#: Those who want to be forked of a template that has only just been started wait so long for it, and are then started
#: by exec: it compiles operators for this machine, or hangs.
WARM_WITHIN_S = 30.0
#: A template that has not answered by then hangs, and is killed.
ANSWER_WITHIN_S = 5.0
#: Between the end of one and the start of the next; twice as long each time when one ends before it is warm.
_RETRY_S = 5.0
_RETRY_MAX_S = 300.0

_MAX_ANSWER_BYTES = 4096
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePlan:
    """What a node agent needs to know to have one."""

    launch: TemplateLaunch
    log: ProcessLog
    #: Have one whatever is started; else only where several workers are at once.
    always: bool


class Template:
    """The agent's end. `run` keeps the process; `fork` makes workers of it."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        launch: TemplateLaunch,
        log: ProcessLog,
        clock: Clock,
        *,
        retry_s: float = _RETRY_S,
    ) -> None:
        """`command` and `environ` are those of the workers; `launch` lacks its descriptor."""
        self._command = tuple(command)
        self._environ = {**environ, **dict.fromkeys(OWN_LATER, "1")}
        self._launch = launch
        self._log = log
        self._clock = clock
        self._retry_s = retry_s
        self._life: _Life | None = None
        #: Whether the first one has become warm, or will not. Nobody waits for a later one.
        self._settled = asyncio.Event()
        self._one_by_one = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """Of one that workers are forked of; None where there is none now."""
        return self._life.child.pid if self._life is not None and self._life.is_warm else None

    def renew(self) -> None:
        """The program may be another one from now on: the next workers are not forked of what was imported before."""
        if self._life is not None:
            self._life.is_warm = False
            self._life.child.kill()

    async def fork(
        self, command: Sequence[str], environ: Mapping[str, str], launch: Message, guard: Guard
    ) -> Child | None:
        """A worker that would be started in this way; None where it has to be. Waits for the first template only."""
        if tuple(command) != self._command or lasting(environ) != lasting(self._environ):
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WARM_WITHIN_S):
                await self._settled.wait()
        made: list[Child] = []
        try:
            await uninterrupted(self._fork(environ, launch, guard, made))
        except asyncio.CancelledError:
            for child in made:
                child.kill()
                child.bury()
            raise
        return made[0] if made else None

    async def _fork(self, environ: Mapping[str, str], launch: Message, guard: Guard, made: list[Child]) -> None:
        async with self._one_by_one:
            life = self._life
            if life is None or not life.is_warm:
                return
            own = {name: value for name, value in environ.items() if name in OWN_LATER}
            try:
                made.append(Child.of(await life.forked(own), launch, guard))
            except (OSError, TimeoutError) as error:
                self._log.write(f"nothing is forked: {str(error) or 'the template does not answer'}".encode())
                life.is_warm = False
                life.child.kill()

    async def run(self, guard: Guard) -> None:
        """Until it is cancelled."""
        try:
            delay_s = self._retry_s
            while True:
                was_warm = await self._one_life(guard)
                self._settled.set()
                # One that cannot work here, for whatever reason, costs a core for seconds each time.
                delay_s = self._retry_s if was_warm else min(2 * delay_s, _RETRY_MAX_S)
                await self._clock.sleep(delay_s)
        finally:
            self._settled.set()

    async def _one_life(self, guard: Guard) -> bool:
        """Whether it has been warm."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                with theirs:
                    launch = TemplateLaunch(
                        parent_pid=self._launch.parent_pid, device=self._launch.device, descriptor=theirs.fileno()
                    )
                    command = (*self._command, TEMPLATE_FLAG)
                    child = Child(command, self._environ, launch, guard, descriptors=(theirs.fileno(),))
            except OSError as error:
                self._log.write(f"no template can be started: {error.strerror}".encode())
                return False
            ours.setblocking(False)
            self._life = life = _Life(child, ours)
            ended = asyncio.create_task(child.ended(_nothing, self._log), name=f"template-{child.pid}")
            was_told = False
            try:
                while await life.hear():
                    if life.is_warm and not was_told:
                        was_told = True
                        self._log.write(f"workers are forked of process {child.pid}".encode())
                        self._settled.set()
            finally:
                self._life = None
                life.over()
                child.kill()
                await asyncio.wait([ended])
            self._log.write(f"the template is gone: {ended.exception() or ended.result()}".encode())
            return was_told


class _Life:
    """One template process, and what it answers."""

    def __init__(self, child: Child, link: socket.socket) -> None:
        self.child = child
        self.is_warm = False
        self._link = link
        self._answer: asyncio.Future[TemplateAnswer] | None = None

    async def hear(self) -> bool:
        """Waits for what it says next; False when it is gone."""
        try:
            data = await asyncio.get_running_loop().sock_recv(self._link, _MAX_ANSWER_BYTES)
        except ConnectionError:
            return False
        match decode_template_answer(data) if data else None:
            case None:
                return False
            case Warm():
                self.is_warm = True
            case answer:
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(answer)
        return True

    def over(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the template has ended"))

    async def forked(self, environ: dict[str, str]) -> ForkedProcess:
        """Raises OSError and TimeoutError where nothing was made, or nothing that is this process's child."""
        self._answer = asyncio.get_running_loop().create_future()
        with contextlib.ExitStack() as stack:
            pipes = [os.pipe() for _ in range(3)]
            ends = [end for pipe in pipes for end in pipe]
            for end in ends:
                stack.callback(os.close, end)
            (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = pipes
            with _orphans_are_ours():
                # Its buffer is empty: one wish goes after the other.
                socket.send_fds(self._link, [encode_line(ForkWish(environ=environ))], [stdin, stdout, stderr])
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    answer = await self._answer
            match answer:
                case Forked(pid=pid):
                    _assert_child(pid)
                case NotForked(why=why):
                    raise OSError(why)
                case Warm():
                    raise OSError("the template said that it is warm once more")
            stack.pop_all()
        for end in (stdin, stdout, stderr):
            os.close(end)
        return ForkedProcess(pid, FileIO(to_stdin, "w"), FileIO(from_stdout), FileIO(from_stderr))


class ForkedProcess:
    """As much of `subprocess.Popen` as a `Child` needs, of a process that somebody else forked for this one."""

    def __init__(self, pid: int, stdin: FileIO, stdout: FileIO, stderr: FileIO) -> None:
        self.pid = pid
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self._code: int | None = None

    def terminate(self) -> None:
        # Once it is reaped, another process may have its number.
        if self._code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._code = os.waitstatus_to_exitcode(status)
        return self._code


class _Orphans:
    """How many in this process want orphans now: the flag is the whole process's."""

    num_wanted: ClassVar[int] = 0


@contextmanager
def _orphans_are_ours() -> Generator[None]:
    """Descendants that lose their parent meanwhile become children of this process. Raises OSError."""
    if _Orphans.num_wanted == 0:
        _set_subreaper(1)
    _Orphans.num_wanted += 1
    try:
        yield
    finally:
        _Orphans.num_wanted -= 1
        if _Orphans.num_wanted == 0:
            _set_subreaper(0)


def _set_subreaper(value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def _assert_child(pid: int) -> None:
    """Raises OSError when the process is somebody else's; it then ends by itself, as its life-line is cut."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        raise OSError(f"process {pid} did not become a child of this one") from None


def forks_work_here() -> bool:
    """Whether this is a system that has what all this rests on."""
    return sys.platform == "linux"


async def _nothing(status: object) -> None:
    """A template says what it has to say on its socket."""
