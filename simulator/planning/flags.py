"""The flags of `tandem plan` beside those of the workload and of the latency. None says: not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated, Literal

from cyclopts import Group, Parameter

PLAN_GROUP = Group("Plan", sort_key=1)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """What there is to plan with, what is asked, and where the answer goes."""

    gpus: Annotated[int, Parameter(name="--gpus", group=PLAN_GROUP, help="Devices in all.")]

    nodes: Annotated[
        int | None,
        Parameter(
            name="--nodes", group=PLAN_GROUP, help="Machines that they are divided among. Default: of 8 devices each."
        ),
    ] = None

    fabric: Annotated[
        Literal["fast", "slow"],
        Parameter(
            name="--fabric",
            group=PLAN_GROUP,
            help="fast: KV may go between machines. slow: prefill and decode workers are paired within a machine.",
        ),
    ] = "fast"

    link_bandwidth: Annotated[
        str | None,
        Parameter(
            name="--link-bandwidth",
            group=PLAN_GROUP,
            help="Bytes a second into or out of a worker, such as 25GB. Default: the profile's; else 50GB on a fast "
            "fabric and the device's own link on a slow one.",
        ),
    ] = None

    max_pipeline: Annotated[
        int, Parameter(name="--max-pipeline", group=PLAN_GROUP, help="Pipeline stages of one worker at most.")
    ] = 2

    max_batch_tokens: Annotated[
        int | None,
        Parameter(
            name="--max-batch-tokens",
            group=PLAN_GROUP,
            help="Token budget of one step. Default: 512 or 2048, what suits each kind of worker better.",
        ),
    ] = None

    max_sequences: Annotated[
        int | None,
        Parameter(
            name="--max-sequences",
            group=PLAN_GROUP,
            help="Running sequences of each worker. Default: 256; 64 with a profile.",
        ),
    ] = None

    target_attainment: Annotated[
        float,
        Parameter(name="--target-attainment", group=PLAN_GROUP, help="Share of requests that must meet both targets."),
    ] = 0.9

    output: Annotated[
        Path | None,
        Parameter(name="--output", group=PLAN_GROUP, help="Cluster file (YAML) to write, for tandem serve --config."),
    ] = None

    force: Annotated[
        bool,
        Parameter(
            name="--force", group=PLAN_GROUP, negative="", show_default=False, help="Replace the file --output names."
        ),
    ] = False
