"""The report of a load test as one JSON document: every figure, and every request as a row of columns.

A figure that is not known (NaN), or a time that did not come, is null. Reading gives back what was written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast, get_args

import msgspec
import numpy as np

from contracts.errors import ConfigError
from loadtest.columns import UNKNOWN, Floats, RequestColumns, TextColumn, columns_of, token_gaps_s
from loadtest.metrics import Interval, LoadMetrics, is_counted, measure_columns, wilson
from loadtest.report.compare import Comparison
from loadtest.validity import ClientUsage, Validity, judge
from workload.figures import LatencySummary
from workload.goodput import GoodputSearch
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from loadtest.record import RequestRecord
    from loadtest.settings import Target

FORMAT = "tandem-loadtest-1"

#: Of a file that is read: some five million requests.
MAX_REPORT_BYTES = 1 << 30

#: A rate that is further from the planned one, relative, is another.
_SAME_RATE = 0.05

#: Columns that reports of earlier versions lack.
_NEW_COLUMNS = ("num_moves", "num_replays")

#: Points of a distribution that is kept as a curve.
_QUANTILES = 401

#: Where null says "there is none", and not a number that is not known.
_OPTIONAL = frozenset({"ttft_target_ms", "tpot_target_ms", "gauges", "search"})
_INFINITE = frozenset({"missed_rps"})


class ServerGauges(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What the server says of itself, on the run's clock."""

    at_s: Floats
    running: Floats
    waiting: Floats


class RateResult(msgspec.Struct, frozen=True, kw_only=True):
    """The same workload at one rate."""

    #: That the workload was scaled to.
    rate_rps: float
    #: As measured; NaN: not told. Chats that wait for answers offer less than was planned.
    offered_rps: float
    num_requests: int
    #: Where there are some, the TTFT is a lower bound.
    num_given_up: int
    #: Joint, with its 95 % interval.
    attainment: float
    interval: Interval
    ttft_p99_ms: float
    tpot_p99_ms: float
    output_tokens_per_s: float
    #: False: the client was the bottleneck.
    valid: bool

    @property
    def is_as_planned(self) -> bool:
        """Whether that rate was offered, as far as that is known."""
        return not abs(self.offered_rps / self.rate_rps - 1) > _SAME_RATE

    @property
    def goodput_rps(self) -> float:
        return self.attainment * (self.rate_rps if math.isnan(self.offered_rps) else self.offered_rps)

    @classmethod
    def of(cls, rate_rps: float, metrics: LoadMetrics, validity: Validity) -> RateResult:
        return cls(
            rate_rps=rate_rps,
            offered_rps=metrics.offered_rps,
            num_requests=metrics.attainment.num_requests,
            num_given_up=metrics.num_given_up,
            attainment=metrics.attainment.joint,
            interval=metrics.attainment_interval,
            ttft_p99_ms=metrics.ttft.p99_ms,
            tpot_p99_ms=metrics.tpot.p99_ms,
            output_tokens_per_s=metrics.output_tokens_per_s,
            valid=validity.valid,
        )

    @classmethod
    def simulated(cls, rate_rps: float, attainment: float, num_requests: int) -> RateResult:
        return cls(
            rate_rps=rate_rps,
            offered_rps=math.nan,
            num_requests=num_requests,
            num_given_up=0,
            attainment=attainment,
            interval=wilson(attainment, num_requests),
            ttft_p99_ms=math.nan,
            tpot_p99_ms=math.nan,
            output_tokens_per_s=math.nan,
            valid=True,
        )


class Beside(msgspec.Struct, frozen=True, kw_only=True):
    """Another report's figures, shown beside the measured ones: those that simulator and load test both have."""

    name: str
    is_simulated: bool
    workload: str
    num_requests: int
    num_finished: int
    attainment: float
    offered_rps: float
    goodput_rps: float
    ttft: LatencySummary
    tpot: LatencySummary
    itl: LatencySummary
    second_token: LatencySummary
    e2e: LatencySummary
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    search: GoodputSearch | None = None
    rates: tuple[RateResult, ...] = ()


class ServerRun(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One server's part."""

    name: str
    base_url: str
    model: str
    endpoint: str
    metrics: LoadMetrics
    client: ClientUsage
    validity: Validity
    requests: RequestColumns
    #: Of the waits between chunks, at equal steps from the shortest to the longest; empty without any.
    itl_quantiles_ms: Floats
    gauges: ServerGauges | None = None
    search: GoodputSearch | None = None
    #: Of a search or a sweep, in the order tried.
    rates: tuple[RateResult, ...] = ()
    #: What the server was found to do, or not to do, before the run.
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        target: Target,
        records: Sequence[RequestRecord],
        slos: Sequence[SloClass],
        *,
        client: ClientUsage,
        max_lag_ms: float,
        num_planned: int | None = None,
        gauges: ServerGauges | None = None,
        search: GoodputSearch | None = None,
        rates: tuple[RateResult, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> ServerRun:
        """All figures of what was recorded. Raises ConfigError as `metrics.measure`."""
        columns, gaps_s = columns_of(records), token_gaps_s(filter(is_counted, records))
        metrics = measure_columns(columns, gaps_s, slos, num_planned=num_planned)
        shares = np.linspace(0.0, 1.0, _QUANTILES)
        return cls(
            name=target.name,
            base_url=target.base_url,
            model=target.model,
            endpoint=target.endpoint,
            metrics=metrics,
            client=client,
            validity=judge(metrics, client, max_lag_ms=max_lag_ms),
            requests=columns,
            itl_quantiles_ms=(np.quantile(gaps_s, shares) * 1e3).round(4) if len(gaps_s) else np.empty(0),
            gauges=gauges,
            search=search,
            rates=rates,
            notes=notes,
        )


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Field names are the keys of the document; units are in the names."""

    #: What repeats the run: command, settings, machine, versions. Plain data.
    loadtest: dict[str, Any]
    workload: str
    #: Runs of equal digests asked the same requests: row by row they can be compared.
    workload_digest: str
    slos: tuple[SloClass, ...]
    runs: tuple[ServerRun, ...]
    #: The first run against each other one.
    comparisons: tuple[Comparison, ...] = ()
    beside: tuple[Beside, ...] = ()
    #: What a reader must know before trusting a figure.
    warnings: tuple[str, ...] = ()


def report_json(report: LoadReport) -> bytes:
    """UTF-8, on one line."""
    document = {"format": FORMAT, **{name: getattr(report, name) for name in report.__struct_fields__}}
    return msgspec.json.encode(document, enc_hook=_encode_array) + b"\n"


def read_report(path: Path) -> LoadReport:
    """Raises ConfigError with the file's name for what cannot be read or is no report."""
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise ConfigError(f"{path}: no load test report: its format is {document.get('format')!r}, not {FORMAT!r}")
    _add_new_columns(document)
    try:
        report = msgspec.convert(with_nan(document), LoadReport, dec_hook=_decode_array)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for run in report.runs:
        _check_columns(run, path)
    return report


def _add_new_columns(document: dict[str, Any]) -> None:
    """To a report of an earlier version: nothing is known of what it does not tell."""
    try:
        for run in document["runs"]:
            for name in _NEW_COLUMNS:
                run["requests"].setdefault(name, [None] * len(run["requests"]["index"]))
    except (KeyError, TypeError, AttributeError):
        # It is no report: what is wrong with it is said where it is converted.
        return


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ConfigError with the file's name."""
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_REPORT_BYTES:,} bytes")
        document = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: no JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: no JSON object")
    return cast("dict[str, Any]", document)


def with_nan(node: Any) -> Any:
    """Of a report: null numbers as NaN again; arrays of numbers, and what repeats a run, stay as they are."""
    if isinstance(node, dict):
        return {name: _known(name, value) for name, value in cast("dict[str, Any]", node).items()}
    if isinstance(node, list) and node and isinstance(node[0], dict):
        return [with_nan(child) for child in cast("list[object]", node)]
    return cast("object", node)


def _known(name: str, value: Any) -> Any:
    if value is None and name not in _OPTIONAL:
        return math.inf if name in _INFINITE else math.nan
    return value if name == "loadtest" else with_nan(value)


def _encode_array(values: object) -> list[object]:
    if not isinstance(values, np.ndarray):
        raise NotImplementedError(f"no JSON form of {type(values).__name__}")
    array = cast("NDArray[Any]", values)
    plain = array.astype(object)
    if array.dtype != np.bool_:
        plain[~np.isfinite(array) if array.dtype == np.float64 else array == UNKNOWN] = None
    return cast("list[object]", plain.tolist())


def _decode_array(type_: Any, values: Any) -> NDArray[Any]:
    (kind,) = get_args(get_args(type_)[1])
    missing = UNKNOWN if kind is np.int64 else math.nan
    if not isinstance(values, list):
        raise ValueError("a column must be an array")
    plain = [missing if value is None else value for value in cast("list[object]", values)]
    wanted = {np.bool_: (bool,), np.int64: (int,), np.float64: (int, float)}[kind]
    if not all(type(value) in wanted for value in plain):
        raise ValueError(f"a column of {wanted[-1].__name__} holds something else")
    return np.array(plain, kind)


def _check_columns(run: ServerRun, path: Path) -> None:
    columns = run.requests
    for name in columns.__struct_fields__:
        values: TextColumn | NDArray[Any] | dict[str, Floats] = getattr(columns, name)
        for array in values.values() if isinstance(values, dict) else (values,):
            codes = array.codes if isinstance(array, TextColumn) else array
            if len(codes) != len(columns):
                raise ConfigError(f"{path}: run {run.name!r}: {name} has {len(codes)} rows, index {len(columns)}")
            if isinstance(array, TextColumn) and not ((codes >= UNKNOWN) & (codes < len(array.values))).all():
                raise ConfigError(f"{path}: run {run.name!r}: {name} has codes without a value")
