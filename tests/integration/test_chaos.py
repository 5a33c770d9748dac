"""The chaos run, small: `benchmarks.chaos --quick`, whose own exit status says whether anything was wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import pytest

from tests.support.layout import ROOT
from tests.support.long_tests import only_long

#: About a minute; several times that on a loaded machine.
BOUND_S = 280.0


async def chaos(*arguments: str) -> dict[str, Any]:
    """The figures of a run that found nothing wrong."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.chaos", *arguments),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), BOUND_S)
    finally:
        if process.returncode is None:
            # With its cluster, whose workers follow.
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    text = output.decode(errors="replace")
    assert process.returncode == 0, text
    figures: dict[str, Any] = json.loads(text.splitlines()[-1])["figures"]
    return figures


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("--seed", "1"), id="split"),
        pytest.param(
            ("--seed", "2", "--cluster", "mixed"),
            id="mixed",
            marks=only_long,
        ),
    ],
)
async def test_nothing_is_wrong_after_random_faults(arguments: tuple[str, ...]) -> None:
    figures = await chaos("--quick", *arguments)
    assert figures["requests"] >= 120
    assert figures["replays"] > 0
    for name in ("leaked_blocks", "unanswered", "wrong_tokens", "problems"):
        assert figures[name] == 0, name
