"""What clients ask of a cluster, without clients: arrivals, lengths, traces, shared prefixes, SLO classes.

Load test, simulator and planner read the same streams of `WorkloadRequest`s. Randomness is an argument.
What needs numpy is not imported here (`workload.prompts`, `workload.figures`): a command's help would wait for it.
"""

from __future__ import annotations

from workload.arrivals import Arrivals, Constant, Diurnal, Gamma, Poisson, Ramp, Step
from workload.lengths import PUBLISHED_LENGTHS, Fixed, Histogram, Lengths, LogNormal, PowerLaw, PublishedLengths
from workload.prefixes import SharedPrefixes
from workload.request import WorkloadRequest
from workload.reuse import PrefixReuse, prefix_reuse
from workload.slo import PUBLISHED_SLOS, SloClass, parse_slo
from workload.spec import ARRIVAL_FORMS, LENGTH_FORMS, parse_arrivals, parse_outputs, parse_prompts
from workload.synthetic import synthetic
from workload.trace_rows import TraceKind
from workload.traces import Trace, TraceSummary, read_trace
from workload.transform import ContextClip, at_rate, at_speed, mean_rate_rps, repeat, window

__all__ = [
    "ARRIVAL_FORMS",
    "LENGTH_FORMS",
    "PUBLISHED_LENGTHS",
    "PUBLISHED_SLOS",
    "Arrivals",
    "Constant",
    "ContextClip",
    "Diurnal",
    "Fixed",
    "Gamma",
    "Histogram",
    "Lengths",
    "LogNormal",
    "Poisson",
    "PowerLaw",
    "PrefixReuse",
    "PublishedLengths",
    "Ramp",
    "SharedPrefixes",
    "SloClass",
    "Step",
    "Trace",
    "TraceKind",
    "TraceSummary",
    "WorkloadRequest",
    "at_rate",
    "at_speed",
    "mean_rate_rps",
    "parse_arrivals",
    "parse_outputs",
    "parse_prompts",
    "parse_slo",
    "prefix_reuse",
    "read_trace",
    "repeat",
    "synthetic",
    "window",
]
