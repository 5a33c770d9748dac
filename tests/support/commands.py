"""`tandem` commands: inside this process, or as subprocesses whose output is read line by line."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cluster.cli import main
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator

#: Long enough for a machine under load; nothing waits for it when all is well.
PATIENCE_S = 100.0

PROGRAM = (sys.executable, "-c", "from cluster.cli import main; main()")


@dataclass(frozen=True, slots=True)
class Done:
    status: int
    stdout: str
    stderr: str


class Tandem:
    """Runs a command to its end inside this process: quick, for commands that start no worker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str, **environ: str) -> Done:
        with self._monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("TANDEM_")]:
                patch.delenv(name)
            for name, value in {"COLUMNS": "200", "NO_COLOR": "1", **environ}.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tandem", *arguments])
            with pytest.raises(SystemExit) as left:
                main()
        captured = self._capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, captured.out, captured.err)


@pytest.fixture
def run_tandem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tandem:
    return Tandem(monkeypatch, capsys)


class Command:
    """A command that goes on. `wait_for` reads its output up to a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait(self) -> tuple[int, str]:
        """The exit status, and the output that was not read yet."""
        output, _ = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, output

    def wait_for(self, start: str) -> str:
        """The rest of the first line that starts so. The test's own timeout bounds it."""
        assert self.process.stdout is not None
        seen: list[str] = []
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
            seen.append(line)
        raise AssertionError(f"{self.process.args!r} ended without {start!r}:\n{''.join(seen)}")


@contextmanager
def tandem(*arguments: str, **environ: str) -> Generator[Command]:
    """Killed at the end, if it still runs."""
    process = subprocess.Popen(
        [*PROGRAM, *arguments],
        cwd=ROOT,
        env=_environ(environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield Command(process)
        finally:
            process.kill()


def _environ(extra: dict[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    return {**clean, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", **extra}
