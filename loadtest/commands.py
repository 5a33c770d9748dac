"""The command `tandem loadtest`, also `python -m loadtest`. Help loads nothing heavy."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

from cyclopts import Parameter

from loadtest.flags import ReportFlags, RunFlags, ServerFlags
from workload.flags import WorkloadFlags


def loadtest(
    url: Annotated[str | None, Parameter(help="Of the server, with or without /v1.")] = None,
    /,
    *,
    server: ServerFlags | None = None,
    workload: WorkloadFlags | None = None,
    run: RunFlags | None = None,
    report: ReportFlags | None = None,
) -> int:
    """Measure an OpenAI-compatible server from outside: open loop, honest clock, goodput, a report with plots."""
    from loadtest.run import run_loadtest

    return run_loadtest(
        url,
        server or ServerFlags(),
        workload or WorkloadFlags(),
        run or RunFlags(),
        report or ReportFlags(),
        command=shlex.join(["tandem", "loadtest", *_arguments()]),
    )


def _arguments() -> list[str]:
    """Of this command, whichever way it was started."""
    return sys.argv[2:] if sys.argv[1:2] == ["loadtest"] else sys.argv[1:]
