"""Figures as text for people: aligned columns, as the simulator's and the load test's reports print them."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from workload.figures import Attainment, LatencySummary

#: In characters.
_WIDTH = 118
_INDENT = 10


def facts(*named: tuple[str, str]) -> str:
    """Lines of each text, wrapped, behind its name."""
    return "".join(_wrapped(name, text) for name, text in named)


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """The first row is the heading, the first column is text; numbers stand to the right."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "".join(f"{line.rstrip()}\n" for line in lines)


def attainment_rows(classes: Sequence[Attainment], everything: Attainment) -> Iterator[tuple[str, ...]]:
    """Of `table`; the line of all classes stands only below several."""
    yield ("SLO attainment", "TTFT target ms", "TPOT target ms", "requests", "both met %", "TTFT met %", "TPOT met %")
    for each in classes if len(classes) == 1 else (*classes, everything):
        yield (
            each.name,
            "" if each.ttft_target_ms is None else f"{each.ttft_target_ms:g}",
            "" if each.tpot_target_ms is None else f"{each.tpot_target_ms:g}",
            f"{each.num_requests:,}",
            number(100 * each.joint, 2),
            number(100 * each.ttft_only, 2),
            number(100 * each.tpot_only, 2),
        )


def latency_rows(named: Iterable[tuple[str, LatencySummary]]) -> Iterator[tuple[str, ...]]:
    """Of `table`."""
    yield ("latency ms", "mean", "p50", "p90", "p95", "p99", "max", "values")
    for name, summary in named:
        figures = (
            summary.mean_ms,
            summary.p50_ms,
            summary.p90_ms,
            summary.p95_ms,
            summary.p99_ms,
            summary.max_ms,
        )
        yield (name, *map(number, figures), f"{summary.count:,}")


def number(value: float, decimals: int = 1) -> str:
    """A dash where it is not known."""
    return "-" if value != value else f"{value:,.{decimals}f}"


def _wrapped(name: str, text: str) -> str:
    lines = [part for line in text.splitlines() for part in wrap(line, _WIDTH - _INDENT)]
    return "".join(f"{name if index == 0 else '':<{_INDENT}}{line}\n" for index, line in enumerate(lines))
