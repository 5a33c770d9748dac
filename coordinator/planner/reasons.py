"""Why a plan was chosen, what limits it and what the others lost by, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from coordinator.planner.plans import Found, Planned

#: Attainments of the two targets nearer than this are both to blame.
_EQUAL_SHARE = 0.01

Binding = Literal["TTFT", "TPOT", "both", "nothing"]


def binding(found: Found) -> Binding:
    """The target that is missed first as the rate grows."""
    if found.missed is None:
        return "nothing"
    attained = found.missed[1]
    if abs(attained.ttft - attained.tpot) < _EQUAL_SHARE:
        return "both"
    return "TTFT" if attained.ttft < attained.tpot else "TPOT"


def why_limited(found: Found) -> str:
    """What stops this plan from serving more."""
    target = binding(found)
    if found.missed is None:
        return f"meets the targets at every rate that was tried, up to {found.goodput_rps:,.3g}/s"
    rate_rps, attained = found.missed
    shares = (
        f"at {rate_rps:,.3g}/s {attained.ttft:.1%} meet TTFT, {attained.tpot:.1%} TPOT and {attained.joint:.1%} both"
    )
    if found.plan.is_colocated:
        cause = {
            "TTFT": "prompts wait: their chunks share each step with the answers",
            "TPOT": "answers are slowed by the chunks and the batch they share steps with",
            "both": "prompts and answers hold each other up",
        }[target]
    else:
        cause = {
            "TTFT": "reading prompts is the bottleneck",
            "TPOT": "writing answers is the bottleneck",
            "both": "both phases are at their limit",
        }[target]
    name = target if target != "both" else "TTFT and TPOT"
    return f"{name} binds first: {shares}; {cause}" if target != "both" else f"{name} bind together: {shares}; {cause}"


def why_chosen(planned: Planned) -> str:
    """One line about the best plan against the colocated one. There must be a best plan."""
    best, colocated = planned.best, planned.colocated
    assert best is not None, "without a plan there is nothing to explain"
    if colocated is None:
        return "no colocated plan meets the targets at any rate"
    if best.plan.is_colocated:
        return _why_colocated(planned, best)
    fewer = colocated.plan.num_devices > best.plan.num_devices
    if planned.rate_rps is not None and colocated.goodput_rps >= planned.rate_rps and fewer:
        return (
            f"colocated workers need {colocated.plan.num_devices} devices for this rate, these {best.plan.num_devices}"
        )
    ratio = best.goodput_per_device_rps / colocated.goodput_per_device_rps
    return f"{ratio:.2f} times the goodput per device of the best colocated plan, whose limit is {binding(colocated)}"


def why_lost(planned: Planned, found: Found) -> str:
    """What another plan is behind by. There must be a best plan."""
    best = planned.best
    assert best is not None, "without a plan there is nothing to lose to"
    more_devices = found.plan.num_devices - best.plan.num_devices
    change = found.goodput_rps / best.goodput_rps - 1.0
    if abs(change) <= planned.tolerance:
        if more_devices > 0:
            return f"serves as much with {more_devices} more devices"
        return "serves as much, within what the search tells apart"
    amount = f"{abs(change):.1%} {'less' if change < 0 else 'more'} in all"
    return f"{amount}, with {more_devices} more devices" if more_devices > 0 else amount


def _why_colocated(planned: Planned, best: Found) -> str:
    split = planned.split
    if split is None:
        return "no split of the devices into prefill and decode workers meets the targets at any rate"
    fewer = split.plan.num_devices > best.plan.num_devices
    if planned.rate_rps is not None and split.goodput_rps >= planned.rate_rps and fewer:
        return f"the best split needs {split.plan.num_devices} devices for this rate, this {best.plan.num_devices}"
    return (
        f"{best.goodput_per_device_rps / split.goodput_per_device_rps:.2f} times the goodput per device of the best "
        f"split, whose limit is {binding(split)}: a split leaves devices of one phase waiting for the other's"
    )
