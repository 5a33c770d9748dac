"""The shift of `benchmarks.elasticity`: long prompts, then long answers, with workers lent between the roles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.elasticity_runs import Job, Load, Phase, Ran
from benchmarks.report import print_table
from contracts.control_messages import FlipOperation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: Prefill workers of sixteen that are tried for each phase.
READING_SPLITS = (5, 6, 7, 8, 9)
WRITING_SPLITS = (1, 2, 3)
#: A role that is taken back within this was not needed.
TURN_BACK_S = 60.0


def phases(seconds: float) -> tuple[Phase, Phase]:
    """Each at four fifths of what its best split can do."""
    return (
        Phase(rate_rps=28.0, prompt_tokens=1200, output_tokens=30, seconds=seconds),
        Phase(rate_rps=16.0, prompt_tokens=150, output_tokens=400, seconds=seconds),
    )


def shift(run_all: Callable[[Iterable[Job]], list[Ran]], seconds: float) -> dict[str, float]:
    reading, writing = phases(seconds)
    splits = [(reading, count) for count in READING_SPLITS] + [(writing, count) for count in WRITING_SPLITS]
    alone = run_all(Job(load=Load(phases=(phase,)), num_prefill=count, moves=True) for phase, count in splits)
    best = {phase: _best(alone, splits, phase) for phase in (reading, writing)}
    load, first, between = Load(phases=(reading, writing)), best[reading][0], _between(best, reading, writing)
    stays, evened, lends = run_all(
        Job(load=load, num_prefill=count, moves=True, autoscale=is_lent)
        for count, is_lent in ((first, False), (between, False), (first, True))
    )
    optimum = sum(int(ran.is_met.sum()) for _, ran in best.values())
    names = {
        "that of the first": stays,
        "one between": evened,
        "lent with the load": lends,
    }
    rows: list[list[object]] = [
        ["best split of each phase", f"{best[reading][0]}, then {best[writing][0]}", optimum, 0.0, 0, 0]
    ]
    for name, ran in names.items():
        rows.append([name, ran.job.num_prefill, int(ran.is_met.sum()), _lost(ran, optimum), *flips(ran)])
    print_table(
        f"{seconds:.0f} s of long prompts, {reading.rate_rps:g} requests/s, then of long answers, {writing.rate_rps:g}",
        ["split", "prefill workers", "requests met", "lost", "changes of role", "back within a minute"],
        rows,
    )
    changes, turned_back = flips(lends)
    calm = lends.prefill_load[len(lends.prefill_load) * 3 // 4 :], lends.decode_load[len(lends.decode_load) * 3 // 4 :]
    print_table(
        "loads of both roles in the last quarter, once workers have been lent (parts of the targets)",
        ["role", "mean", "deviation"],
        [[name, float(load.mean()), float(load.std())] for name, load in zip(("prefill", "decode"), calm, strict=True)],
    )
    return {
        "shift_goodput_lost": _lost(lends, optimum),
        "shift_goodput_lost_without": _lost(stays, optimum),
        "shift_role_changes": changes,
        "shift_turned_back": turned_back,
        "shift_decode_load_deviation": float(np.std(calm[1])),
    }


def _best(runs: Sequence[Ran], splits: Sequence[tuple[Phase, int]], phase: Phase) -> tuple[int, Ran]:
    """The split with which most requests meet their targets, and of equal ones the one with the least latency."""
    own = [(count, ran) for (each, count), ran in zip(splits, runs, strict=True) if each is phase]
    return max(own, key=lambda one: (int(one[1].is_met.sum()), -float(np.mean(one[1].e2e_s))))


def _between(best: dict[Phase, tuple[int, Ran]], *both: Phase) -> int:
    return round(sum(best[phase][0] for phase in both) / len(both))


def _lost(ran: Ran, optimum: int) -> float:
    return 1.0 - int(ran.is_met.sum()) / optimum


def flips(ran: Ran) -> tuple[int, int]:
    """Changes of role while requests came, and those of them that took a worker back soon after it had been given
    another role."""
    changed_s: dict[str, float] = {}
    turned_back = changes = 0
    for at_s, operation in ran.operations:
        if not isinstance(operation, FlipOperation) or at_s > ran.arrival_s[-1]:
            continue
        changes += 1
        turned_back += at_s - changed_s.get(operation.worker_id, -np.inf) < TURN_BACK_S
        changed_s[operation.worker_id] = at_s
    return changes, turned_back
