"""The folder of a load test: claimed before the run, filled after it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Self

from contracts.errors import ConfigError
from loadtest import machine
from loadtest.report.csv_file import requests_csv
from loadtest.report.document import report_json

if TYPE_CHECKING:
    from types import TracebackType

    from loadtest.flags import ReportFlags
    from loadtest.report.document import LoadReport

REPORT_FILE, CSV_FILE, PAGE_FILE = "report.json", "requests.csv", "report.html"


class ReportFolder:
    """A context. Raises ConfigError on entering when nothing can be written there, or a report would be lost."""

    def __init__(self, flags: ReportFlags) -> None:
        self._flags = flags
        self._folder = flags.output or Path(f"loadtest-{machine.local_stamp()}")
        self._was_made = False

    def __enter__(self) -> Self:
        folder = self._folder
        if (folder / REPORT_FILE).exists() and not self._flags.force:
            raise ConfigError(f"--output {folder}: holds a report already; --force replaces it")
        self._was_made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._was_made and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def write(self, report: LoadReport) -> str:
        """Replaces what was there; the JSON comes first, whole, whatever becomes of the others. Returns what was
        written, for people."""
        try:
            for name in (REPORT_FILE, CSV_FILE, PAGE_FILE):
                (self._folder / name).unlink(missing_ok=True)
            self._put(REPORT_FILE, report_json(report))
            self._put(CSV_FILE, requests_csv(report).encode())
            if self._flags.html:
                # It loads matplotlib, half a second that a run without a page is spared.
                from loadtest.report.html import report_html

                self._put(PAGE_FILE, report_html(report).encode())
        except OSError as error:
            raise ConfigError(f"--output {self._folder}: cannot be written: {error.strerror}") from error
        page = f", {PAGE_FILE}" if self._flags.html else ""
        return f"{self._folder / REPORT_FILE}, {CSV_FILE}{page}"

    def _put(self, name: str, content: bytes) -> None:
        unfinished = self._folder / f"{name}.new"
        unfinished.write_bytes(content)
        unfinished.replace(self._folder / name)
