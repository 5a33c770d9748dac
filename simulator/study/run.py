"""One capacity study from its flags to its files: the body of `tandem simulate`."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from simulator.study.metrics import StudyMetrics, measure
from simulator.study.progress import StudyProgress
from simulator.study.report import Report, RunFigures, report_json, report_text, unserved_warnings
from simulator.study.setup import build_setup
from workload.goodput import search
from workload.reuse import prefix_reuse
from workload.traffic import build_traffic

if TYPE_CHECKING:
    from simulator.heap.results import StudyResult
    from simulator.heap.spec import StudySpec
    from simulator.study.flags import ClusterFlags, LatencyFlags, PolicyFlags, ReportFlags
    from simulator.study.setup import ClusterSetup
    from workload.flags import WorkloadFlags
    from workload.goodput import GoodputSearch
    from workload.traffic import Traffic

REPORT_FILE = "report.json"
PLOT_FILES = ("latency_cdf.png", "timeline.png", "attainment.png", "ttft_by_prompt.png")

#: A goodput search stays within so many times the workload's own rate, up and down.
_SEARCH_FACTOR = 64.0
#: Steady load takes a while to show: a search that squeezed the workload into less than this says so.
_SHORT_S = 120.0
#: Samples of the time lines over the time in which requests arrive, and the shortest pause between two.
_NUM_SAMPLES = 1000
_MIN_SAMPLE_S = 0.05


def run_study(
    cluster: ClusterFlags,
    latency: LatencyFlags,
    policy: PolicyFlags,
    workload: WorkloadFlags,
    report: ReportFlags,
    *,
    command: str,
) -> int:
    """Simulates, prints the report and writes the files; returns the exit code. Raises ConfigError before it starts."""
    if not 0 < report.target_attainment <= 1:
        raise ConfigError(f"--target-attainment {report.target_attainment:g}: must be above 0, at most 1")
    traffic = build_traffic(workload)
    setup = build_setup(cluster, latency, policy, traffic.slos)
    if report.find_goodput and traffic.totals.rate_rps is None:
        raise ConfigError("--find-goodput: all requests of the workload come at once, it has no rate to scale")
    _check_text(command)
    folder = _make_folder(report)
    result, figures = _simulate(setup, traffic, what="simulating")
    metrics = measure(result, traffic.slos)
    searched = _search(setup, traffic, metrics, report.target_attainment) if report.find_goodput else None
    document = Report(
        study=_facts(setup, traffic, command),
        workload=traffic.text,
        cluster=setup.text,
        latency=setup.costs.text,
        metrics=metrics,
        run=figures,
        goodput_search=searched,
        warnings=(
            *setup.warnings,
            *traffic.warnings,
            *unmodelled(traffic, setup.spec),
            *unserved_warnings(metrics),
            *_too_long(result),
            *_search_warnings(searched, traffic),
        ),
    )
    print(report_text(document))
    try:
        written = _write(document, result, traffic, folder, plots=report.plots)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from error
    print(f"wrote {folder / written[0]}{''.join(f', {name}' for name in written[1:])}")
    return 0


def _check_text(command: str) -> None:
    """File names may be any bytes, a report is text: better told before the study than after it."""
    try:
        command.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"file names must be UTF-8, for the report tells them: {command!a}") from error


def _write(document: Report, result: StudyResult, traffic: Traffic, folder: Path, *, plots: bool) -> tuple[str, ...]:
    """Replaces what an earlier study left; the report comes last, and whole. Returns the names of the files."""
    for name in (REPORT_FILE, *PLOT_FILES):
        (folder / name).unlink(missing_ok=True)
    written: tuple[str, ...] = ()
    if plots:
        from simulator.study.plots import write_plots

        written = tuple(path.name for path in write_plots(result, traffic.slos, folder))
    unfinished = folder / f"{REPORT_FILE}.new"
    unfinished.write_bytes(report_json(document))
    unfinished.replace(folder / REPORT_FILE)
    return (REPORT_FILE, *written)


def _make_folder(report: ReportFlags) -> Path:
    """A folder without a study, or with one that may be replaced, in which files can be made."""
    folder = report.output or Path(f"study-{datetime.now():%Y%m%d-%H%M%S}")
    if (folder / REPORT_FILE).exists() and not report.force:
        raise ConfigError(f"--output {folder}: holds a study already; --force replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from error
    return folder


def _simulate(
    setup: ClusterSetup, traffic: Traffic, *, what: str, factor: float = 1.0
) -> tuple[StudyResult, RunFigures]:
    """At `factor` times the workload's rate."""
    sample_s = max(_MIN_SAMPLE_S, traffic.totals.span_s / factor / _NUM_SAMPLES)
    spec = replace(setup.spec, sample_interval_s=sample_s)
    started_s = time.perf_counter()
    with StudyProgress(what, traffic.totals.num_requests) as progress:
        result = simulate(spec, traffic.requests(factor), progress=progress.update)
    wall_s = time.perf_counter() - started_s
    figures = RunFigures(
        wall_s=wall_s,
        num_events=result.num_events,
        num_steps=result.num_steps,
        events_per_s=result.num_events / wall_s,
    )
    return result, figures


def _search(setup: ClusterSetup, traffic: Traffic, metrics: StudyMetrics, target: float) -> GoodputSearch:
    base_rps = traffic.totals.rate_rps
    assert base_rps is not None, "checked before anything was simulated"

    def attainment_at(rate_rps: float) -> float:
        if rate_rps == base_rps:
            return metrics.attainment.joint
        what = f"at {rate_rps:,.3f} requests/s"
        result, _ = _simulate(setup, traffic, what=what, factor=rate_rps / base_rps)
        return measure(result, traffic.slos).attainment.joint

    return search(
        attainment_at,
        start_rps=base_rps,
        low_rps=base_rps / _SEARCH_FACTOR,
        high_rps=base_rps * _SEARCH_FACTOR,
        target=target,
    )


def unmodelled(traffic: Traffic, spec: StudySpec) -> tuple[str, ...]:
    """What the workload asks for, and the study leaves out or assumes."""
    warnings: list[str] = []
    if traffic.cancel is not None:
        warnings.append("cancellations are not simulated: every answer is written whole")
    if traffic.totals.num_chats:
        warnings.append("a chat's next turn comes when its SLO class allows: answers are taken to last just so long")
    has_cache = any(group.prefix_cache_tokens for group in spec.groups)
    share = 0.0 if has_cache else _repeated_share(traffic)
    if share > 0:
        warnings.append(
            f"no prefix cache is modelled: every prompt is computed whole, though {share:.1%} of the prompt tokens "
            f"repeat an earlier request's; --prefix-cache gives the workers one"
        )
    return tuple(warnings)


def _repeated_share(traffic: Traffic) -> float:
    """Of the prompt tokens. Requests have hash ids all or none."""
    first = next(iter(traffic.requests()))
    return prefix_reuse(traffic.requests()).token_hit_rate if first.hash_ids else 0.0


def _too_long(result: StudyResult) -> tuple[str, ...]:
    """More workers would not help these."""
    spec, requests = result.spec, result.requests
    most_tokens = max(min(group.num_blocks * spec.block_tokens, spec.max_context_tokens) for group in spec.groups)
    too_long = (requests.outcome == Outcome.REJECTED) & (requests.prompt_tokens >= most_tokens)
    if not too_long.any():
        return ()
    return (
        f"{too_long.sum():,} requests were refused for their length alone: no worker holds more than {most_tokens:,} "
        f"tokens of one request",
    )


def _search_warnings(searched: GoodputSearch | None, traffic: Traffic) -> tuple[str, ...]:
    if searched is None or searched.goodput_rps == 0:
        return ()
    span_s = traffic.totals.num_requests / searched.goodput_rps
    if span_s >= _SHORT_S:
        return ()
    return (
        f"at {searched.goodput_rps:,.3f} requests/s the workload lasts {span_s:,.0f} s: queues may not have had the "
        f"time to grow. Simulate more requests",
    )


def _facts(setup: ClusterSetup, traffic: Traffic, command: str) -> dict[str, object]:
    return {
        "command": command,
        "cluster": setup.facts,
        "workload": traffic.facts,
        "versions": {
            "tandem-serve": version("tandem-serve"),
            "python": platform.python_version(),
            "numpy": version("numpy"),
        },
    }
