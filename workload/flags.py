"""The flags that say a workload, on every command that takes one. None says: not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated

from cyclopts import Group, Parameter

WORKLOAD_GROUP = Group("Workload (--workload, --trace, or drawn from distributions)", sort_key=3)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadFlags:
    """Who asks what, when, and how fast the answer must be."""

    workload: Annotated[
        str | None,
        Parameter(
            name="--workload",
            group=WORKLOAD_GROUP,
            help="chat, code, summarise, agents, long-context, bursty, or a workload file (YAML). Other flags of this "
            "group replace what it says.",
        ),
    ] = None

    trace: Annotated[
        Path | None,
        Parameter(
            name="--trace",
            group=WORKLOAD_GROUP,
            help="Mooncake JSONL, Azure CSV, BurstGPT CSV, or ShareGPT JSON; recognised by its content.",
        ),
    ] = None

    arrivals: Annotated[
        str | None,
        Parameter(
            name="--arrivals",
            group=WORKLOAD_GROUP,
            help="poisson:4, gamma:4,cv=2, ramp:1-8,60 ... in requests per second. Default: poisson:1.",
        ),
    ] = None

    prompts: Annotated[
        str | None,
        Parameter(
            name="--prompts",
            group=WORKLOAD_GROUP,
            help="Prompt lengths: fixed:512, lognormal:mean=755,p95=2000, sharegpt. Default: sharegpt.",
        ),
    ] = None

    outputs: Annotated[
        str | None,
        Parameter(name="--outputs", group=WORKLOAD_GROUP, help="Answer lengths, likewise. Default: sharegpt."),
    ] = None

    requests: Annotated[
        int | None,
        Parameter(
            name="--requests",
            group=WORKLOAD_GROUP,
            help="So many requests at most. Default: the whole trace; 1000 drawn ones where no --duration is given.",
        ),
    ] = None

    start: Annotated[
        str | None,
        Parameter(name="--start", group=WORKLOAD_GROUP, help="Skip what comes before, such as 10min; before --speed."),
    ] = None

    duration: Annotated[
        str | None,
        Parameter(name="--duration", group=WORKLOAD_GROUP, help="So long only, such as 1h; of a trace before --speed."),
    ] = None

    speed: Annotated[
        float | None,
        Parameter(name="--speed", group=WORKLOAD_GROUP, help="Let time run so many times faster: 2 doubles the rate."),
    ] = None

    rate: Annotated[
        float | None,
        Parameter(
            name="--rate",
            group=WORKLOAD_GROUP,
            help="Scale time so that this many requests come per second on average.",
        ),
    ] = None

    spread_ties: Annotated[
        bool,
        Parameter(
            name="--spread-ties",
            group=WORKLOAD_GROUP,
            negative="",
            show_default=False,
            help="Requests that a trace gives one time are spread up to its next time: for traces with rounded times, "
            "such as Mooncake's (3 s).",
        ),
    ] = False

    think: Annotated[
        str | None,
        Parameter(
            name="--think",
            group=WORKLOAD_GROUP,
            help="Mean pause between an answer and a chat's next turn, such as 5s. Default: the workload's, else 30s.",
        ),
    ] = None

    scale_lengths: Annotated[
        float | None,
        Parameter(
            name="--scale-lengths",
            group=WORKLOAD_GROUP,
            help="Prompts and answers so many times as long, such as 0.0625; what prompts share stays shared.",
        ),
    ] = None

    max_context: Annotated[
        int | None,
        Parameter(
            name="--max-context",
            group=WORKLOAD_GROUP,
            help="Cut requests to so many tokens of prompt and answer, and end chats there; after --scale-lengths.",
        ),
    ] = None

    cancel: Annotated[
        str | None,
        Parameter(
            name="--cancel",
            group=WORKLOAD_GROUP,
            help="Share of clients that go away in mid-answer, and after how many tokens: 0.05, or "
            "0.05@lognormal:mean=30,sigma=1.",
        ),
    ] = None

    seed: Annotated[int, Parameter(name="--seed", group=WORKLOAD_GROUP, help="Of everything that is drawn.")] = 0

    slo: Annotated[
        tuple[str, ...],
        Parameter(
            name="--slo",
            group=WORKLOAD_GROUP,
            negative="",
            show_default=False,
            help="NAME:TTFT_MS,TPOT_MS, ttft=250ms,tpot=100ms, or a published class. Several: each request draws one. "
            "Default: interactive:1000,50.",
        ),
    ] = ()
