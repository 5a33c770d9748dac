"""The command `tandem loadtest`, also `python -m loadtest`. Help loads nothing heavy."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loadtest.flags import ReportFlags, RunFlags, ServerFlags
from workload.flags import WorkloadFlags

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: Flags whose values may be keys: reports are passed on.
_SECRET_FLAGS = ("--header", "--extra-body")


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
        command=shlex.join(["tandem", "loadtest", *without_secrets(_arguments())]),
    )


def _arguments() -> list[str]:
    """Of this command, whichever way it was started."""
    return sys.argv[2:] if sys.argv[1:2] == ["loadtest"] else sys.argv[1:]


def without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments as a report may show them: of headers and extra fields that they were given, and no more."""
    is_secret = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if is_secret:
            yield "..."
        else:
            yield f"{flag}=..." if equals and flag in _SECRET_FLAGS else argument
        is_secret = not is_secret and argument in _SECRET_FLAGS
