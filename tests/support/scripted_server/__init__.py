"""An OpenAI-compatible server with known delays, which does what a script says, faults and all.

    python -m tests.support.scripted_server --port 0 --ttft-ms 50 --itl-ms 10 --fault reset_mid_stream=0.05

    async with serving(Behaviour(ttft_ms=50, itl_ms=10)) as server:      # inside a test's event loop
        ask server.base_url ...; look into server.log

    with serving_process("--ttft-ms", "50") as base_url:                 # in a process of its own
        ask base_url ...; GET /script/log

A request's own field `script` names its fault: `{"script": "error_event", ...}`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from tests.support.layout import ROOT
from tests.support.scripted_server.log import LogEntry as LogEntry
from tests.support.scripted_server.script import Behaviour as Behaviour
from tests.support.scripted_server.script import Fault as Fault
from tests.support.scripted_server.script import FaultRule as FaultRule
from tests.support.scripted_server.server import ScriptedServer as ScriptedServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

READY = "listening on "


@asynccontextmanager
async def serving(behaviour: Behaviour | None = None, *, port: int = 0) -> AsyncGenerator[ScriptedServer]:
    server = ScriptedServer(behaviour or Behaviour())
    await server.start(port=port)
    try:
        yield server
    finally:
        await server.close()


@contextmanager
def serving_process(*arguments: str) -> Generator[str]:
    """Yields the base URL. The process is killed at the end, whatever happened.

    Raises RuntimeError when it does not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.scripted_server", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith(READY):
                raise RuntimeError(f"the scripted server did not start with {arguments}: {line!r}")
            yield line.removeprefix(READY).strip()
        finally:
            process.kill()
