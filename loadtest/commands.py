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

#: Flags whose values may be keys: reports are passed on. Of the last, by mistake.
_SECRET_FLAGS = ("--header", "--extra-body", "--api-key-env")


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
    """The arguments as a report may show them: of what may hold a key that it was given, and no more."""
    is_value = False
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        # The command line takes both spellings.
        is_secret = not is_value and flag.replace("_", "-") in _SECRET_FLAGS
        if is_value:
            yield "..."
        else:
            yield f"{flag}=..." if equals and is_secret else argument
        is_value = is_secret and not equals
