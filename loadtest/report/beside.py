"""Reports that are shown beside the measured runs: what `tandem simulate` predicted, or what another run measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from contracts.errors import ConfigError
from loadtest.report.document import FORMAT, Beside, RateResult, read_json, read_report, with_nan

# Read at run time: the types of a document's fields.
from workload.figures import Attainment, LatencySummary
from workload.goodput import GoodputSearch

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.report.document import ServerRun

#: Of `tandem simulate`, whose code is not imported here.
STUDY_FORMAT = "tandem-study-1"


class _StudyMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a study's figures that a load test has as well."""

    num_requests: int
    num_finished: int
    offered_rps: float
    goodput_rps: float
    attainment: Attainment
    ttft: LatencySummary
    tpot: LatencySummary
    itl: LatencySummary
    second_token: LatencySummary
    e2e: LatencySummary
    prompt_tokens_per_s: float
    output_tokens_per_s: float


class _Study(msgspec.Struct, frozen=True, kw_only=True):
    workload: str
    metrics: _StudyMetrics
    goodput_search: GoodputSearch | None


def read_beside(path: Path) -> tuple[Beside, ...]:
    """Of report.json; named after its folder. Raises ConfigError with the file's name."""
    document = read_json(path)
    name = path.resolve().parent.name
    match document.get("format"):
        case str(found) if found == STUDY_FORMAT:
            return (_simulated(document, name, path),)
        case str(found) if found == FORMAT:
            report = read_report(path)
            return tuple(_measured(run, f"{name} ({run.name})", report.workload) for run in report.runs)
        case found:
            raise ConfigError(
                f"{path}: the report of neither a load test nor a simulation: its format is {found!r}, not {FORMAT!r} "
                f"or {STUDY_FORMAT!r}"
            )


def _simulated(document: dict[str, Any], name: str, path: Path) -> Beside:
    search = document.get("goodput_search")
    try:
        study = msgspec.convert({**with_nan(document), "goodput_search": search and with_nan(search)}, _Study)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    metrics = study.metrics
    points = () if study.goodput_search is None else study.goodput_search.points
    return Beside(
        name=name,
        is_simulated=True,
        workload=study.workload,
        num_requests=metrics.num_requests,
        num_finished=metrics.num_finished,
        attainment=metrics.attainment.joint,
        offered_rps=metrics.offered_rps,
        goodput_rps=metrics.goodput_rps,
        ttft=metrics.ttft,
        tpot=metrics.tpot,
        itl=metrics.itl,
        second_token=metrics.second_token,
        e2e=metrics.e2e,
        prompt_tokens_per_s=metrics.prompt_tokens_per_s,
        output_tokens_per_s=metrics.output_tokens_per_s,
        search=study.goodput_search,
        rates=tuple(RateResult.simulated(point.rate_rps, point.attainment, metrics.num_requests) for point in points),
    )


def _measured(run: ServerRun, name: str, workload: str) -> Beside:
    metrics = run.metrics
    return Beside(
        name=name,
        is_simulated=False,
        workload=workload,
        num_requests=metrics.num_requests,
        num_finished=metrics.num_finished,
        attainment=metrics.attainment.joint,
        offered_rps=metrics.offered_rps,
        goodput_rps=metrics.goodput_rps,
        ttft=metrics.ttft,
        tpot=metrics.tpot,
        itl=metrics.itl,
        second_token=metrics.second_token,
        e2e=metrics.e2e,
        prompt_tokens_per_s=metrics.prompt_tokens_per_s,
        output_tokens_per_s=metrics.output_tokens_per_s,
        search=run.search,
        rates=run.rates,
    )
