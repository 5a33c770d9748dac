"""What a decision log and its replay say, as text for people and as one JSON document."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from simulator.rejects.rebuild import REPLAYED
from workload.tables import facts, number, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.rejects.reader import DecisionHistory, Stretch
    from simulator.rejects.rebuild import Rebuilt
    from simulator.rejects.replay import Replayed, Verdict
    from simulator.rejects.summary import Count, Summary

FORMAT = "tandem-rejects-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """One replay and what it was of."""

    stretch: Stretch
    num_stretches: int
    rebuilt: Rebuilt
    result: Replayed


def summary_text(history: DecisionHistory, summary: Summary) -> str:
    """Sections of aligned columns; ends with a line break."""
    everything = summary.everything
    began = datetime.fromtimestamp(summary.began_at, UTC)
    reasons = sorted({reason for count in summary.by_class for reason in count.refused_for})
    sections = [
        facts(
            (
                "log",
                f"{everything.offered:,} requests, {summary.num_decisions:,} decisions in {summary.span_s:,.1f} s from "
                f"{began:%Y-%m-%d %H:%M:%S} UTC",
            ),
            ("refused", _refused(everything)),
            *_gaps(history),
        )
    ]
    if everything.refused:
        sections += [
            table(_rows("class", reasons, (*summary.by_class, everything))),
            table(_rows("tenant", reasons, summary.by_tenant)) if len(summary.by_tenant) > 1 else "",
            table(_rows("time", reasons, summary.over_time)) if summary.over_time else "",
        ]
    return "\n".join(section for section in sections if section)


def replay_text(replay: Replay) -> str:
    """The same for a replay."""
    result, rebuilt = replay.result, replay.rebuilt
    overall = result.overall
    sections = [
        facts(
            ("replay", _what(replay)),
            *(("assumed", each) for each in rebuilt.assumptions),
            ("check", _check(replay)),
            ("accepted", _accepted(result)),
            ("predicted", _predicted(result)),
        )
    ]
    if result.num_refused:
        sections += [
            table(_verdict_rows(replay)),
            facts(("verdict", _verdict(overall, result.num_accepted + result.num_refused))),
        ]
    else:
        sections.append(facts(("verdict", f"nothing was refused for {_listed(REPLAYED)}: nothing to judge")))
    return "\n".join(sections)


def document(history: DecisionHistory, summary: Summary, replay: Replay | None) -> bytes:
    """UTF-8, indented; a figure that is not known (NaN) is null."""
    content: dict[str, object] = {
        "format": FORMAT,
        "summary": asdict(summary),
        "lost_decisions": history.num_lost,
        "unreadable_lines": history.num_unreadable,
        "cut_files": history.cut_files,
        "replay": None,
    }
    if replay is not None:
        content["replay"] = {"assumptions": replay.rebuilt.assumptions, **asdict(replay.result)}
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


# --- parts of the summary -----------------------------------------------------------------------------


def _refused(everything: Count) -> str:
    if not everything.refused:
        return "none"
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in everything.refused_for.items())
    return f"{everything.refused:,} requests, {everything.refused / everything.offered:.1%} of all: {reasons}"


def _gaps(history: DecisionHistory) -> Iterator[tuple[str, str]]:
    if history.num_lost:
        yield "warning", f"{history.num_lost:,} decisions are missing: the disk did not take them"
    if history.num_unreadable:
        yield "warning", f"{history.num_unreadable:,} lines cannot be read and are left out"
    for name in history.cut_files:
        yield "warning", f"the last line of {name} is cut and left out: its coordinator died, or is still writing"


def _rows(what: str, reasons: list[str], counts: tuple[Count, ...]) -> Iterator[tuple[str, ...]]:
    yield (what, "requests", "refused", "refused %", *reasons)
    for count in counts:
        share = 100 * count.refused / count.offered if count.offered else float("nan")
        yield (
            count.name,
            f"{count.offered:,}",
            f"{count.refused:,}",
            number(share),
            *(f"{count.refused_for.get(reason, 0):,}" for reason in reasons),
        )


# --- parts of the replay ------------------------------------------------------------------------------


def _what(replay: Replay) -> str:
    decisions = replay.stretch.decisions
    spec = replay.rebuilt.spec
    workers = ", ".join(f"{group.count} {group.role}" for group in spec.groups)
    part = (
        ""
        if replay.num_stretches == 1
        else f"; of {replay.num_stretches} stretches in which workers stayed the same, the one that says most"
    )
    left_out = replay.rebuilt.num_left_out
    left = f"; {left_out:,} refused for other reasons than {_listed(REPLAYED)} are left out" if left_out else ""
    return (
        f"{len(replay.rebuilt.requests):,} requests in {decisions[-1].at_s - decisions[0].at_s:,.1f} s over {workers} "
        f"workers{part}{left}"
    )


def _check(replay: Replay) -> str:
    result = replay.result
    share = result.num_refused / (result.num_accepted + result.num_refused)
    return (
        f"left to itself the policy refuses {result.refused_again:.1%} in the replay; it refused {share:.1%}. Where "
        f"these are far apart, what was assumed does not hold"
    )


def _accepted(result: Replayed) -> str:
    if not result.num_accepted:
        return "none"
    return f"{result.num_accepted:,} requests, {_percent(result.accepted_met)} of them meet their targets"


def _predicted(result: Replayed) -> str:
    errors = result.calibration
    if not errors.num_requests:
        return "nothing was"
    return (
        f"TTFT less what the replay saw: median {errors.ttft_median_s * 1e3:+,.1f} ms, 90 % within "
        f"{errors.ttft_p90_abs_s * 1e3:,.1f} ms; TPOT: median {errors.tpot_median_s * 1e3:+,.2f} ms, 90 % within "
        f"{errors.tpot_p90_abs_s * 1e3:,.2f} ms ({errors.num_requests:,} requests)"
    )


def _verdict_rows(replay: Replay) -> Iterator[tuple[str, ...]]:
    result = replay.result
    yield ("class", "reason", "refused", "tried", "would have met", "%", "95 % interval")
    for each in (*result.verdicts, *([result.overall] if len(result.verdicts) > 1 else [])):
        interval = f"{number(100 * each.interval.low)} - {number(100 * each.interval.high)}" if each.num_tried else "-"
        yield (
            each.slo_class,
            each.reason,
            f"{each.num_refused:,}",
            f"{each.num_tried:,}",
            f"{each.num_met:,}",
            number(100 * each.share),
            interval,
        )


def _verdict(overall: Verdict, num_offered: int) -> str:
    interval = overall.interval
    counts = [round(share * overall.num_refused) for share in (overall.share, interval.low, interval.high)]
    of_offered = overall.share * overall.num_refused / num_offered
    return (
        f"of {overall.num_refused:,} refused requests about {counts[0]:,} ({counts[1]:,} to {counts[2]:,}) would have "
        f"met their targets: {of_offered:.2%} of all that were asked"
    )


def _percent(share: float) -> str:
    return "-" if share != share else f"{share:.1%}"


def _listed(words: tuple[str, ...]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]
