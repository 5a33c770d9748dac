"""What a chaos run says at its end: tables for people, figures for programs, and whether anything is wrong."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import TYPE_CHECKING

from benchmarks.chaos_client import End
from benchmarks.chaos_faults import Kind, can_drop_links
from benchmarks.report import finish, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.chaos_client import Outcome, Try
    from benchmarks.chaos_faults import Tally
    from benchmarks.chaos_load import Load, Plan, Result

#: Above this share of requests that end with an error the run fails: those that met more faults than replays are few.
MAX_ERROR_SHARE = 0.05
#: Of the longest gaps, how many are explained, and by the faults of how long before them.
SHOWN_GAPS = 6
SHOWN_BEFORE_S = 6.0


def report(result: Result, plan: Plan) -> bool:
    """Prints tables and the figures; whether nothing is wrong."""
    load, tally = result.load, result.tally
    ends = Counter(outcome.last.end for outcome in load.outcomes)
    unanswered = ends[End.UNANSWERED] + ends[End.BROKEN]
    errors = _errors(load)
    refusals = Counter(
        record.error[0] if record.error else "no connection" for outcome in load.outcomes for record in outcome.refusals
    )
    whole = [outcome.last for outcome in load.outcomes if outcome.last.end is End.WHOLE]
    replayed = [record for record in whole if record.replays]
    gaps_s = resume_gaps_s(replayed, tally)
    all_gaps_s = sorted(gap_s for gaps in gaps_s.values() for gap_s in gaps)
    print_table("faults", ["kind", "injected", "in flight"], _fault_rows(tally))
    if not can_drop_links():
        print("links were left alone: this process may not have a network namespace of its own")
    print_table("requests", ["end", "number"], [[end.value, ends[end]] for end in End])
    print_table("errors told to clients", ["code", "number"], sorted(errors.items()))
    print_table("refused and asked again", ["code", "number"], sorted(refusals.items()))
    rows: list[list[object]] = [
        ["replays of whole answers", sum(record.replays for record in replayed)],
        ["answers with a replay", len(replayed)],
        ["frozen for good to gone, worst s", max(tally.hang_kill_s, default=0.0)],
        ["tokens checked", load.auditor.num_tokens],
        ["ties with the reference", load.auditor.num_ties],
        ["seconds at peace", result.peace_s],
        ["seconds of faults", result.chaos_s],
        ["idle and clean after s", "never" if result.idle_s is None else result.idle_s],
    ]
    print_table("longest gap of replayed streams, by the fault in it", ["fault", "streams", "p50 s", "p99 s"], [
        [name, len(gaps), _quantile(gaps, 0.5), _quantile(gaps, 0.99)] for name, gaps in gaps_s.items()
    ])  # fmt: skip
    _print_longest(replayed, tally)
    print_table("figures", ["what", "value"], rows)
    broken = [f"{outcome.question.name}: {outcome.last.end.value}: {outcome.last.how}"
              for outcome in load.outcomes if outcome.last.end in (End.UNANSWERED, End.BROKEN)]  # fmt: skip
    num_errors = sum(errors.values())
    too_many = num_errors > MAX_ERROR_SHARE * len(load.outcomes)
    hurt = [f"{num_errors} of {len(load.outcomes)} requests ended with an error"] if too_many else []
    wrong = [*load.wrong, *broken, *hurt, *result.problems]
    for line in wrong[:40]:
        print(f"WRONG {line}")
    for name, count in Counter(message for outcome in load.outcomes if (message := _message(outcome))).most_common(12):
        print(f"error {count} x {name}")
    finish(
        "chaos",
        {
            "requests": len(load.outcomes),
            "leaked_blocks": result.leaked_blocks,
            "unanswered": unanswered,
            "wrong_tokens": len(load.wrong),
            "errors": num_errors,
            "refusals": sum(refusals.values()),
            "replays": sum(record.replays for record in replayed),
            "resume_gap_s_p50": _quantile(all_gaps_s, 0.5),
            "resume_gap_s_p99": _quantile(all_gaps_s, 0.99),
            "resume_gap_after_kill_s_p99": _quantile(gaps_s.get(Kind.KILL.value, []), 0.99),
            "problems": len(result.problems),
            "faults": sum(tally.injected.values()),
            "seed": plan.seed,
        },
    )
    return not wrong


def resume_gaps_s(replayed: Sequence[Try], tally: Tally) -> dict[str, list[float]]:
    """The longest gap of each replayed stream, ascending, by the kind of fault that lies in it."""
    gaps_s: dict[str, list[float]] = {}
    for record in replayed:
        if record.stream:
            began_s, ended_s = record.longest_gap
            strike = tally.cause(began_s, ended_s)
            gaps_s.setdefault("none" if strike is None else strike.kind.value, []).append(ended_s - began_s)
    return {name: sorted(gaps) for name, gaps in sorted(gaps_s.items())}


def _print_longest(replayed: Sequence[Try], tally: Tally) -> None:
    """The longest gaps, with every fault that began in or shortly before them: why they were so long."""
    streams = [record for record in replayed if record.stream]
    start_s = min((strike.began_s for strike in tally.strikes), default=0.0)
    rows: list[list[object]] = []
    for record in sorted(streams, key=lambda each: each.longest_gap[0] - each.longest_gap[1])[:SHOWN_GAPS]:
        began_s, ended_s = record.longest_gap
        faults = [
            f"{strike.began_s - start_s:.1f} {strike.what}"
            for strike in tally.strikes
            if began_s - SHOWN_BEFORE_S < strike.began_s < ended_s
        ]
        rows.append([f"{began_s - start_s:.1f}", ended_s - began_s, record.replays, "; ".join(faults)])
    print_table("longest gaps", ["from s", "long s", "replays", "faults"], rows)


def _errors(load: Load) -> Counter[str]:
    """What ended a request, by code, where it began; refusals to the end count too."""
    return Counter(
        outcome.last.error[0] if outcome.last.error else "no connection"
        for outcome in load.outcomes
        if outcome.last.end in (End.ERROR, End.UNREACHED)
    )


def _message(outcome: Outcome) -> str | None:
    """What a client was told, without the numbers that make each different."""
    error = outcome.last.error
    return None if error is None else re.sub(r"\d+", "#", f"{error[0]}: {error[1]}")


def _fault_rows(tally: Tally) -> list[list[object]]:
    return [[kind.value, tally.injected[kind], tally.in_flight[kind]] for kind in Kind]


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0
