"""Many trials over several processes, what they found together, and the command that repeats a failure.

Each child process plays every so-many-th seed and prints one line of JSON for each; the parent adds up.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from contracts.failpoints import never_reached
from simulator.chaos.trial import Verdict, try_seed

if TYPE_CHECKING:
    from collections.abc import Callable

#: A line of a child: a verdict with the tail of a log.
_LINE_LIMIT_BYTES = 2**22
#: Real seconds without a line from a child after which it counts as hung.
SILENCE_LIMIT_S = 120.0
#: Seeds whose failure is told in full.
MAX_FAILURES = 20


@dataclass(slots=True)
class Campaign:
    """What a number of trials found together."""

    num_trials: int = 0
    failures: list[Verdict] = field(default_factory=list[Verdict])
    num_failed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    counts: Counter[str] = field(default_factory=Counter[str])
    virtual_s: float = 0.0
    #: What went wrong with a child itself.
    broken: list[str] = field(default_factory=list[str])

    def add(self, verdict: Verdict) -> None:
        self.num_trials += 1
        self.outcomes.update(verdict.outcomes)
        self.counts.update(verdict.counts)
        self.virtual_s += verdict.virtual_s
        if verdict.problems:
            self.num_failed += 1
            if len(self.failures) < MAX_FAILURES:
                self.failures.append(verdict)

    @property
    def held(self) -> bool:
        return not self.num_failed and not self.broken

    def never_reached(self) -> list[str]:
        """Failpoints and rare paths that no trial came to."""
        return never_reached(self.counts)


def replay_command(seed: int) -> str:
    return f"python -m simulator.chaos --seed {seed}"


def explain(verdict: Verdict, *, log_lines: int = 40) -> str:
    """A failed trial for people: what was wrong, the end of its log, and how to see it again."""
    tail = verdict.log_tail.splitlines()[-log_lines:]
    return "\n".join(
        [
            f"seed {verdict.seed}: {verdict.scenario}",
            *(f"  ! {problem}" for problem in verdict.problems[:20]),
            f"  the last {len(tail)} lines of its log:",
            *(f"    {line}" for line in tail),
            f"  repeat it: {replay_command(verdict.seed)}",
        ]
    )


def play_seeds(first: int, count: int, stride: int) -> None:
    """A child's work: one line on standard output for each seed."""
    for seed in range(first, first + count * stride, stride):
        line = msgspec.json.encode(try_seed(seed))
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


async def run_campaign(
    first: int, count: int, *, num_processes: int, on_verdict: Callable[[Verdict], None] | None = None
) -> Campaign:
    """Plays the seeds `first` to `first + count - 1`. A child that dies or hangs is told in `broken`, its other
    seeds are missing; the rest goes on."""
    campaign = Campaign()

    async def look_after(child: int) -> None:
        share = len(range(child, count, num_processes))
        if not share:
            return
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "simulator.chaos", "--child"),
            *("--first", str(first + child), "--seeds", str(share), "--stride", str(num_processes)),
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT_BYTES,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None, "asked for"
        try:
            await _read_verdicts(process.stdout, share, campaign, on_verdict)
        except (TimeoutError, ValueError) as error:
            campaign.broken.append(f"the process of seeds {first + child}, +{num_processes}, ...: {error}")
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async with asyncio.TaskGroup() as children:
        for child in range(num_processes):
            children.create_task(look_after(child))
    return campaign


async def _read_verdicts(
    lines: asyncio.StreamReader, share: int, campaign: Campaign, on_verdict: Callable[[Verdict], None] | None
) -> None:
    for number in range(share):
        told = f"after {number} of {share} trials"
        try:
            async with asyncio.timeout(SILENCE_LIMIT_S):
                line = await lines.readline()
            if not line:
                raise ValueError(f"it ended {told}")
            verdict = msgspec.json.decode(line, type=Verdict)
        except TimeoutError:
            raise ValueError(f"it was silent for {SILENCE_LIMIT_S:g} s {told}") from None
        except msgspec.DecodeError as error:
            raise ValueError(f"what it said {told} is no verdict: {error}") from error
        campaign.add(verdict)
        if on_verdict is not None:
            on_verdict(verdict)
