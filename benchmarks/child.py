"""A process of a benchmark that does one thing for each line that it is told, and answers with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPO = Path(__file__).parents[1]


class Child:
    """It says "ready" once it has imported everything, or why it cannot."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
        """`environ`: None for this process's."""
        #: Told only where the child fails.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def why_not(self) -> str | None:
        """None once it is ready."""
        line = self._line()
        return None if line == "ready" else line or "it ended"

    def ask(self, words: str) -> dict[str, float]:
        """Raises RuntimeError with what the child said last when it cannot."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{words}\n")
            self._process.stdin.flush()
        line = self._line()
        if not line.startswith("{"):
            raise RuntimeError(f"{words}: {line or self._last_words()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """Idempotent."""
        if not self._errors.closed:
            with suppress(BrokenPipeError):
                self._process.communicate()
            self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"it ended with {code}: {lines[-1] if lines else 'without a word'}"

    def _line(self) -> str:
        """Some libraries print to the same place: only what we asked for counts."""
        assert self._process.stdout is not None
        last = ""
        while line := self._process.stdout.readline():
            last = line.strip()
            if last == "ready" or last.startswith("{") or "Error" in last:
                break
        return last
