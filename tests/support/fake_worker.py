"""A worker process without a model: takes its launch and behaves as FAKE_BEHAVIOUR says.

Behaviours: `ready` serves until stopped; `crash` is ready and then dies by its own hand; `start-crash` dies
before it is ready; `bad-config` fails with a configuration error; `stuck` never gets ready and ignores
SIGTERM; `stubborn` is ready and ignores SIGTERM and its life-line; `family` starts a child that outlives it
and holds its pipes, then crashes; `noisy` writes a line of garbage to its status pipe and long log lines;
`frozen` is ready and then stops itself, as SIGSTOP does; `mute` is ready and shows no sign of life, though it heeds
SIGTERM; `parent` starts a child that outlives it and serves until stopped; `flood`
is ready and writes status lines as fast as they are taken; `environ` logs a variable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading

from cluster.child_main import stand_by
from cluster.launch import (
    MAX_LAUNCH_BYTES,
    SIGN_OF_LIFE_S,
    Alive,
    Failed,
    Loading,
    Ready,
    Status,
    decode_launch,
    encode_line,
)
from cluster.lifeline import settle, wait_for_end_of_file
from cluster.standby import STANDBY_FLAG
from cluster.template_process import TEMPLATE_FLAG, be_template


def tell(status: Status) -> None:
    sys.stdout.buffer.write(encode_line(status))
    sys.stdout.buffer.flush()


def start_grandchild() -> int:
    return subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid


async def beat() -> None:
    while True:
        await asyncio.sleep(SIGN_OF_LIFE_S)
        tell(Alive())


async def live(behaviour: str) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(f"log line of {os.getpid()}", file=sys.stderr, flush=True)
    tell(Loading(what="weights", fraction=0.5))
    match behaviour:
        case "start-crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "bad-config":
            tell(Failed(error="config_error", message="architecture Unknown is not supported"))
            return 1
        case "environ":
            print(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}", file=sys.stderr, flush=True)
        case "stuck":
            await asyncio.Event().wait()
        case "noisy":
            print("a library prints here", flush=True)
            print("x" * 50_000, file=sys.stderr, flush=True)
        case "family" | "parent":
            print(f"grandchild {start_grandchild()}", file=sys.stderr, flush=True)
        case _:
            pass
    tell(Ready(address=f"fake:{os.getpid()}"))
    if behaviour in ("crash", "family"):
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour == "flood":
        while True:
            tell(Alive())
    beating = asyncio.create_task(asyncio.Event().wait() if behaviour == "mute" else beat())
    if behaviour == "stubborn":
        await beating
    await asyncio.wait(
        [beating, asyncio.create_task(stop.wait()), asyncio.create_task(wait_for_end_of_file(0))],
        return_when=asyncio.FIRST_COMPLETED,
    )
    return 0


def warm_up(device: str) -> None:
    """As the environment says: at once, never, not at all, or in a way that forbids forks."""
    match os.environ.get("FAKE_STANDBY"):
        case "slow":
            signal.pause()
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "threads":
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        case _:
            pass


def main() -> int:
    if TEMPLATE_FLAG in sys.argv and not be_template(warm_up):
        return 0
    if STANDBY_FLAG in sys.argv and not stand_by(warm_up):
        return 0
    settle(decode_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES)))
    with contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(live(os.environ["FAKE_BEHAVIOUR"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
