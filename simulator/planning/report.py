"""What `tandem plan` prints."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from coordinator.planner.reasons import why_chosen, why_limited, why_lost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.planner.plans import Found, Planned

_LABEL_WIDTH = 11
_LINE_WIDTH = 119
#: Dropped workers and plans that are told; the others are counted.
_MAX_DROPPED = 6


def report_text(
    planned: Planned,
    *,
    workload: str,
    latency: str,
    machines: str,
    targets: str,
    took_s: float,
    warnings: Sequence[str],
) -> str:
    lines = [
        *_labelled("workload", workload),
        *_labelled("latency", latency),
        *_labelled("machines", machines),
        *_labelled("targets", f"{targets}; {planned.target:.0%} of the requests are to meet both"),
        *_labelled(
            "searched",
            f"{planned.num_plans:,} plans by {planned.num_rough_runs} rough, {planned.num_phase_runs} one-phase and "
            f"{planned.num_joint_runs} whole studies in {took_s:,.1f} s",
        ),
        *_dropped(planned),
        "",
        *_answer(planned),
    ]
    lines += [line for warning in warnings for line in _labelled("warning", warning)]
    return "\n".join(lines)


def summary(found: Found) -> str:
    """One line: the plan, what it serves and attains."""
    num_devices = found.plan.num_devices
    return (
        f"{found.plan}: {found.goodput_rps:,.3g} requests/s on {num_devices} device{'s' * (num_devices > 1)}, "
        f"{found.goodput_per_device_rps:,.3g} each; {found.attained.joint:.1%} meet both targets"
    )


def _answer(planned: Planned) -> list[str]:
    if planned.best is None:
        return _labelled("no plan", "whatever the rate, too few requests meet their targets")
    lines: list[str] = []
    if planned.rate_rps is not None and planned.best.goodput_rps < planned.rate_rps:
        lines += _labelled(
            "not enough",
            f"no plan on these devices serves {planned.rate_rps:,.3g} requests/s; this is the most they can",
        )
    lines += _labelled("best", summary(planned.best))
    lines += _labelled("", f"why: {why_chosen(planned)}")
    lines += _labelled("", f"limit: {why_limited(planned.best)}")
    told = [planned.best.plan]
    for label, found in (
        ("runner-up", planned.runner_up),
        ("colocated", planned.colocated),
        ("split", planned.split),
    ):
        if found is None:
            lines += _labelled(label, "none meets the targets")
        elif found.plan not in told:
            told.append(found.plan)
            lines += _labelled(label, summary(found))
            lines += _labelled("", f"{why_lost(planned, found)}; {why_limited(found)}")
    return lines


def _dropped(planned: Planned) -> list[str]:
    lines: list[str] = []
    for each in planned.dropped[:_MAX_DROPPED]:
        lines += _labelled("dropped", f"{each.what}: {each.why}")
    if more := len(planned.dropped) - _MAX_DROPPED:
        lines += _labelled("", f"and {more} more") if more > 0 else []
    return lines


def _labelled(label: str, text: str) -> list[str]:
    indent = " " * _LABEL_WIDTH
    if len(label) >= _LABEL_WIDTH:
        return [label, *textwrap.wrap(text, _LINE_WIDTH, initial_indent=indent, subsequent_indent=indent)]
    return textwrap.wrap(
        text, _LINE_WIDTH, initial_indent=f"{label:<{_LABEL_WIDTH}}", subsequent_indent=indent, break_on_hyphens=False
    )
