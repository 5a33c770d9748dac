"""Where searches for goodput begin and end, and how long their studies are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from contracts.latency import StepWork
from coordinator.planner.bench import SearchSettings

if TYPE_CHECKING:
    from coordinator.planner.plans import Parallelism
    from simulator.planning.costs import CostTable

#: Requests of a drawn workload whose length nobody gave: these, and as many more as come within so long; and of the
#: rough studies that order the plans.
MIN_REQUESTS, MIN_SPAN_S, MAX_REQUESTS = 1000, 60.0, 20_000
ROUGH_REQUESTS = 200

#: Searches stay between these, of the rate where they begin; at the lower one workers are nearly idle.
_LOWEST_FACTOR, _HIGHEST_FACTOR = 1.0 / 16.0, 64.0
#: Answers that a step writes, for the guess of where to begin.
_GUESSED_BATCH = 32


def search_settings(
    costs: CostTable, smallest: Parallelism, *, prompt_tokens: float, output_tokens: float, target: float
) -> SearchSettings:
    """Begins where the smallest worker would be half busy, if it read one prompt at a time; the lengths are means.
    Raises ConfigError for latencies that give no rate."""
    latency = costs.latency(smallest)
    num_prompt_tokens = max(1, round(prompt_tokens))
    read_s = latency.step_s(StepWork(num_prompt_tokens, num_prompt_tokens * (num_prompt_tokens + 1) / 2, 1))
    context_tokens = round(_GUESSED_BATCH * (num_prompt_tokens + output_tokens / 2))
    write_s = output_tokens * latency.step_s(StepWork(0, 0.0, 0, _GUESSED_BATCH, context_tokens)) / _GUESSED_BATCH
    worked_s = (read_s + write_s) * smallest.num_devices
    start_rps = 0.5 / worked_s if worked_s > 0 else math.inf
    if not (0 < start_rps < math.inf):
        raise ConfigError(f"the latencies ({costs.text}) give no rate to begin with")
    return SearchSettings(
        target=target,
        start_rps=start_rps,
        low_rps=start_rps * _LOWEST_FACTOR,
        high_rps=start_rps * _HIGHEST_FACTOR,
    )
