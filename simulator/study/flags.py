"""The flags of `tandem simulate` beside those of the workload, by what they are about. None says: not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated

from cyclopts import Group, Parameter

from contracts.config import AdmissionForm, DispatchPolicyName  # noqa: TC001 (read at run time as well)

CLUSTER_GROUP = Group("Cluster", sort_key=1)
LATENCY_GROUP = Group("Latency (one of --profile, --model, --latency)", sort_key=2)
POLICY_GROUP = Group("Policies", sort_key=3)
REPORT_GROUP = Group("Report", sort_key=4)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFlags:
    """Workers, and what lies between them."""

    config: Annotated[
        Path | None,
        Parameter(
            name="--config",
            group=CLUSTER_GROUP,
            help="Cluster file (YAML) as for tandem serve: pools, KV memory, budgets. TANDEM_ variables are not read.",
        ),
    ] = None

    workers: Annotated[
        str | None,
        Parameter(
            name="--workers",
            group=CLUSTER_GROUP,
            help="Workers by role, such as 8P8D or 4P4D2M (prefill, decode, mixed). Default: the file's, else 1P1D.",
        ),
    ] = None

    kv_blocks: Annotated[
        int | None,
        Parameter(
            name="--kv-blocks",
            group=CLUSTER_GROUP,
            help="KV blocks of each worker. Default: the file's, else what the profile had or the device can hold.",
        ),
    ] = None

    max_batch_tokens: Annotated[
        int | None, Parameter(name="--max-batch-tokens", group=CLUSTER_GROUP, help="Token budget of one step.")
    ] = None

    max_sequences: Annotated[
        int | None, Parameter(name="--max-sequences", group=CLUSTER_GROUP, help="Running sequences of each worker.")
    ] = None

    link_bandwidth: Annotated[
        str | None,
        Parameter(
            name="--link-bandwidth",
            group=CLUSTER_GROUP,
            help="Bytes a second into or out of a worker, such as 25GB. Default: the profile's, else 50GB.",
        ),
    ] = None

    link_latency_ms: Annotated[
        float | None,
        Parameter(
            name="--link-latency-ms",
            group=CLUSTER_GROUP,
            help="Of one transfer, whatever its size. Default: the profile's, else 0.1.",
        ),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyFlags:
    """How long steps take."""

    profile: Annotated[
        Path | None,
        Parameter(name="--profile", group=LATENCY_GROUP, help="File that tandem profile wrote: measured and fitted."),
    ] = None

    model: Annotated[
        str | None,
        Parameter(
            name="--model",
            group=LATENCY_GROUP,
            help="Roofline of a known model (llama-3-70b), or of a checkpoint folder. Default: the file's model, "
            "else llama-3-8b.",
        ),
    ] = None

    device: Annotated[
        str | None, Parameter(name="--device", group=LATENCY_GROUP, help="Of the roofline. Default: h100-sxm.")
    ] = None

    tensor_parallel: Annotated[
        int | None,
        Parameter(
            name="--tensor-parallel",
            group=LATENCY_GROUP,
            help="Devices that share each layer of one worker. Default: 1; tandem plan tries all.",
        ),
    ] = None

    compute_efficiency: Annotated[
        float | None,
        Parameter(
            name="--compute-efficiency",
            group=LATENCY_GROUP,
            help="Share of the device's peak operations that the roofline reaches. Default: 0.6.",
        ),
    ] = None

    memory_efficiency: Annotated[
        float | None,
        Parameter(
            name="--memory-efficiency",
            group=LATENCY_GROUP,
            help="Share of the device's memory bandwidth that the roofline reaches. Default: 0.5.",
        ),
    ] = None

    step_overhead_ms: Annotated[
        float | None,
        Parameter(
            name="--step-overhead-ms", group=LATENCY_GROUP, help="Of every step of the roofline besides. Default: 0."
        ),
    ] = None

    latency: Annotated[
        str | None,
        Parameter(name="--latency", group=LATENCY_GROUP, help="A published fit, such as distserve:opt-13b-tp1."),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyFlags:
    """How requests are placed and admitted, and what prompts share."""

    dispatch: Annotated[
        DispatchPolicyName | None,
        Parameter(name="--dispatch", group=POLICY_GROUP, help="Dispatch policy. Default: the file's, else ttft_min."),
    ] = None

    admission: Annotated[
        AdmissionForm | None,
        Parameter(
            name="--admission",
            group=POLICY_GROUP,
            help="Refuse requests that are predicted to miss the workload's targets. Default: the file's, if it says "
            "one, else none.",
        ),
    ] = None

    prefix_cache: Annotated[
        int | None,
        Parameter(
            name="--prefix-cache",
            group=POLICY_GROUP,
            help="Tokens of earlier prompts that each prefill or mixed worker keeps in host memory. Default: 0.",
        ),
    ] = None

    max_output: Annotated[
        int | None,
        Parameter(
            name="--max-output",
            group=POLICY_GROUP,
            help="Answer that every client allows, in tokens. Default: each as long as its answer will be, so that "
            "the coordinator knows.",
        ),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFlags:
    """What is asked, and where the answer goes."""

    find_goodput: Annotated[
        bool,
        Parameter(
            name="--find-goodput",
            group=REPORT_GROUP,
            negative="",
            show_default=False,
            help="Also search for the highest rate with enough attainment, scaling the workload's time.",
        ),
    ] = False

    target_attainment: Annotated[
        float,
        Parameter(name="--target-attainment", group=REPORT_GROUP, help="Enough for --find-goodput; both targets met."),
    ] = 0.9

    output: Annotated[
        Path | None,
        Parameter(
            name="--output",
            group=REPORT_GROUP,
            help="Folder for report.json and the plots; made if need be. Default: study-DATE-TIME.",
        ),
    ] = None

    plots: Annotated[
        bool,
        Parameter(
            name="--plots",
            group=REPORT_GROUP,
            negative="--no-plots",
            show_default=False,
            help="Write plots (default), or report.json alone.",
        ),
    ] = True

    force: Annotated[
        bool,
        Parameter(
            name="--force",
            group=REPORT_GROUP,
            negative="",
            show_default=False,
            help="Replace the study that --output holds.",
        ),
    ] = False
