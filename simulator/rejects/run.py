"""The body of `tandem rejects`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from simulator.rejects.reader import read_logs
from simulator.rejects.rebuild import best_stretch, rebuild
from simulator.rejects.replay import ReplaySettings, SimulatedCluster, replay
from simulator.rejects.report import Replay, document, replay_text, summary_text
from simulator.rejects.summary import summarise
from simulator.study.progress import StudyProgress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from simulator.heap.results import StudyResult
    from simulator.rejects.flags import RejectsFlags
    from simulator.rejects.reader import DecisionHistory
    from simulator.rejects.rebuild import Asked, Rebuilt
    from simulator.study.branches import Fate


def run_rejects(logs: Sequence[Path], flags: RejectsFlags) -> int:
    """Prints what the logs say and, if asked to, what a replay says; returns the exit code. Raises ConfigError."""
    if not logs:
        raise ConfigError("no log: name the file of coordinator.decision_log, with older parts (.1) before it")
    if flags.samples < 1:
        raise ConfigError(f"--samples must be at least 1: {flags.samples}")
    history = read_logs(logs)
    if not history.num_decisions:
        print(f"{', '.join(map(str, logs))}: no decisions yet")
        return 0
    summary = summarise(history)
    print(summary_text(history, summary), end="", flush=True)
    replayed = _replay(history, flags) if flags.replay else None
    if replayed is not None:
        print(f"\n{replay_text(replayed)}", end="")
    if flags.json is not None:
        try:
            flags.json.write_bytes(document(history, summary, replayed))
        except OSError as error:
            raise ConfigError(f"--json {flags.json}: cannot be written: {error.strerror}") from error
    return 0


def _replay(history: DecisionHistory, flags: RejectsFlags) -> Replay:
    stretch = best_stretch(history.stretches)
    rebuilt = rebuild(stretch)
    if not rebuilt.requests:
        raise ConfigError("--replay: every request was refused for want of workers or of room for its prompt")
    settings = ReplaySettings(num_tried=flags.samples, seed=flags.seed)
    result = replay(rebuilt, settings, _TellingCluster())
    return Replay(stretch=stretch, num_stretches=len(history.stretches), rebuilt=rebuilt, result=result)


class _TellingCluster:
    """The event heap, on all cores, which tells how far it is."""

    def follow(self, rebuilt: Rebuilt, tried: Sequence[Asked]) -> tuple[StudyResult, list[Fate]]:
        num_accepted = sum(each.is_accepted for each in rebuilt.requests)
        with StudyProgress("replay, as decided", num_accepted) as progress:
            cluster = SimulatedCluster(max_branches=os.cpu_count() or 1, progress=progress.update)
            return cluster.follow(rebuilt, tried)

    def decide(self, rebuilt: Rebuilt) -> StudyResult:
        with StudyProgress("replay, decided anew", len(rebuilt.requests)) as progress:
            return SimulatedCluster(progress=progress.update).decide(rebuilt)
