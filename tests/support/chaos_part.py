"""`tandem` whose `worker` is that of `tests.support.chaos_worker`: `python -m tests.support.chaos_part worker …`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn
from unittest import mock

from cluster.cli import main

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROGRAM = (sys.executable, "-m", "tests.support.chaos_part")

_execve = os.execve


def _become(path: str, arguments: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    changed = ["tests.support.chaos_worker" if word == "cluster.worker_main" else word for word in arguments]
    assert changed != list(arguments), arguments
    _execve(path, changed, environ)


if __name__ == "__main__":
    with mock.patch.object(os, "execve", _become):
        main()
