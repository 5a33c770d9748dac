"""Which requests are refused at once because they would miss the targets of their class.

A request that is bound to be late costs the others what it takes, and its client learns of it last. So a request of a
class with targets is refused where the best place that the dispatch policy found for it

- has a predicted TTFT beyond `ttft_share` of the target. Prompts are read in turn, so this protects the accepted ones
  too: they stand before it. With queues by deadline it does so among requests of one class;
- has a predicted TPOT beyond `tpot_share` of the target. `predicted`: with the answers that are expected to be written
  when this one begins. `current`: with those that are written now. The latter looks one prefill time too late: while
  prompts are read nobody counts their answers, too many are accepted, then too few, and the loads of the two pools
  swing against each other (Mooncake, arXiv 2407.00079, section 7.2).

The share of TTFT is smaller for a class of which too many that were accepted were late (`coordinator.margins`).

A request that was accepted before is not refused any more. After a refusal both shares of the class are smaller by
`hysteresis`, until one of it is accepted: between two neighbouring loads it does not flicker.

**When to come again**: after the time in which the excess is predicted to have gone if nothing else came, the queue a
second each second, the answers as they end; and up to as much again, drawn by chance, so that those who were refused
together do not come back together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from contracts.errors import SloUnattainable
from coordinator.decision import Refused

if TYPE_CHECKING:
    from contracts.messages import DispatchItem
    from coordinator.decision import Chosen
    from coordinator.policy.settings import AdmissionRule
    from workload.slo import SloClass

SHORTEST_RETRY_AFTER_S = 0.1
LONGEST_RETRY_AFTER_S = 30.0


class Limits(NamedTuple):
    """What a request's predictions may be at most, and the targets of its class."""

    ttft_s: float
    tpot_s: float
    ttft_target_s: float
    tpot_target_s: float


def limits_of(slo: SloClass, rule: AdmissionRule, ttft_margin: float, *, was_refused: bool) -> Limits:
    """`ttft_margin`: of its class; `was_refused`: the last of it that was judged."""
    share = 1.0 - rule.hysteresis if was_refused else 1.0
    ttft_s, tpot_s = slo.ttft_ms / 1e3, slo.tpot_ms / 1e3
    return Limits(ttft_s * rule.ttft_share * share * ttft_margin, tpot_s * rule.tpot_share * share, ttft_s, tpot_s)


def admit(
    item: DispatchItem,
    best: Chosen,
    limits: Limits,
    rule: AdmissionRule,
    *,
    tpot_now_s: float,
    answer_s: float,
    chance: float,
) -> Refused | None:
    """None: it is accepted. `tpot_now_s`: with the answers that are written now, where that form asks for it;
    `answer_s`: mean duration of an answer; `chance` in [0, 1)."""
    predicted = best.predicted
    if rule.form == "none" or predicted is None or item.was_accepted:
        return None
    if predicted.ttft_s > limits.ttft_s:
        return _refused("ttft", predicted.ttft_s - limits.ttft_s, best, chance)
    tpot_s = tpot_now_s if rule.form == "current" else predicted.tpot_s
    if item.max_tokens > 1 and tpot_s > limits.tpot_s:
        return _refused("tpot", answer_s * math.log(tpot_s / limits.tpot_s), best, chance)
    return None


def _refused(why: Literal["ttft", "tpot"], excess_s: float, best: Chosen, chance: float) -> Refused:
    retry_after_s = min(max(excess_s * (1.0 + chance), SHORTEST_RETRY_AFTER_S), LONGEST_RETRY_AFTER_S)
    return Refused(why, SloUnattainable.code, retry_after_s, best)
