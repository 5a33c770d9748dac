"""The flags of `tandem loadtest` besides those of the workload, by what they are about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated, Literal

from cyclopts import Group, Parameter

SERVER_GROUP = Group("Server", sort_key=1)
RUN_GROUP = Group("Run", sort_key=4)
REPORT_GROUP = Group("Report", sort_key=5)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """Whom to ask, and how."""

    servers: Annotated[
        str | None,
        Parameter(
            name="--servers",
            group=SERVER_GROUP,
            help="Several servers, NAME=URL,NAME=URL: the same workload against each, in turns, for paired comparison.",
        ),
    ] = None

    model: Annotated[
        str | None, Parameter(name="--model", group=SERVER_GROUP, help="Default: the first that the server lists.")
    ] = None

    endpoint: Annotated[
        Literal["completions", "chat"],
        Parameter(name="--endpoint", group=SERVER_GROUP, help="/v1/completions or /v1/chat/completions."),
    ] = "completions"

    prompts_as: Annotated[
        Literal["ids", "text"] | None,
        Parameter(
            name="--prompts-as",
            group=SERVER_GROUP,
            help="Token ids (completions only) or text. Default: ids where the server takes them.",
        ),
    ] = None

    tokenizer: Annotated[
        Path | None,
        Parameter(
            name="--tokenizer",
            group=SERVER_GROUP,
            help="tokenizer.json, or a folder with one, for prompts of exact lengths. Default: the server's /tokenize.",
        ),
    ] = None

    api_key_env: Annotated[
        str, Parameter(name="--api-key-env", group=SERVER_GROUP, help="Variable that holds the API key, if it is set.")
    ] = "OPENAI_API_KEY"

    header: Annotated[
        tuple[str, ...],
        Parameter(
            name="--header", group=SERVER_GROUP, negative="", show_default=False, help="NAME: VALUE, of every request."
        ),
    ] = ()

    extra_body: Annotated[
        str | None,
        Parameter(name="--extra-body", group=SERVER_GROUP, help="JSON object, merged into every request's body."),
    ] = None

    ignore_eos: Annotated[
        bool,
        Parameter(
            name="--ignore-eos",
            group=SERVER_GROUP,
            negative="--no-ignore-eos",
            show_default=False,
            help="Ask for answers of exactly the planned length (default, where the server can).",
        ),
    ] = True

    server_timeline: Annotated[
        bool,
        Parameter(
            name="--server-timeline",
            group=SERVER_GROUP,
            negative="",
            show_default=False,
            help="Ask for the server's own phases of each request (include_timeline), for the phase breakdown.",
        ),
    ] = False

    insecure: Annotated[
        bool,
        Parameter(
            name="--insecure",
            group=SERVER_GROUP,
            negative="",
            show_default=False,
            help="Do not check certificates of https servers.",
        ),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunFlags:
    """How the workload is sent."""

    concurrency: Annotated[
        int | None,
        Parameter(
            name="--concurrency",
            group=RUN_GROUP,
            help="Closed loop: so many clients, each sends its next request when its last has ended. Arrival times "
            "are not heeded, and an overloaded server slows its own load down.",
        ),
    ] = None

    warmup: Annotated[
        str | None,
        Parameter(
            name="--warmup",
            group=RUN_GROUP,
            help="Leave out of every figure the first so many requests or chats (20), or what arrives in the first "
            "so long (30s).",
        ),
    ] = None

    timeout: Annotated[
        str, Parameter(name="--timeout", group=RUN_GROUP, help="From sending to the end of the answer.")
    ] = "10min"

    first_token_timeout: Annotated[
        str | None, Parameter(name="--first-token-timeout", group=RUN_GROUP, help="Default: --timeout alone.")
    ] = None

    connect_timeout: Annotated[str, Parameter(name="--connect-timeout", group=RUN_GROUP, help="Of a connection.")] = (
        "10s"
    )

    retries: Annotated[
        int,
        Parameter(
            name="--retries",
            group=RUN_GROUP,
            help="How often a 429 or 503 with Retry-After is asked again; latencies count from the first time.",
        ),
    ] = 0

    rounds: Annotated[
        int | None,
        Parameter(name="--rounds", group=RUN_GROUP, help="Turns that each of --servers gets. Default: 4, ABBA."),
    ] = None

    find_goodput: Annotated[
        bool,
        Parameter(
            name="--find-goodput",
            group=RUN_GROUP,
            negative="",
            show_default=False,
            help="Search for the highest rate with enough attainment: the workload is sent at several rates.",
        ),
    ] = False

    rates: Annotated[
        str | None,
        Parameter(
            name="--rates", group=RUN_GROUP, help="Send the workload at each of these rates: 1,2,4 (requests/s)."
        ),
    ] = None

    target_attainment: Annotated[
        float,
        Parameter(name="--target-attainment", group=RUN_GROUP, help="Enough for --find-goodput; both targets met."),
    ] = 0.9

    tolerance: Annotated[
        float,
        Parameter(
            name="--tolerance",
            group=RUN_GROUP,
            help="--find-goodput ends when met and missed rate are so close, relative.",
        ),
    ] = 0.05

    max_send_lag_ms: Annotated[
        float,
        Parameter(
            name="--max-send-lag-ms",
            group=RUN_GROUP,
            help="A run whose client is later than this, at the 99th percentile, is marked invalid.",
        ),
    ] = 10.0


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFlags:
    """Where the answer goes."""

    output: Annotated[
        Path | None,
        Parameter(
            name="--output",
            group=REPORT_GROUP,
            help="Folder for report.json, requests.csv and report.html; made if need be. Default: loadtest-DATE-TIME.",
        ),
    ] = None

    force: Annotated[
        bool,
        Parameter(
            name="--force",
            group=REPORT_GROUP,
            negative="",
            show_default=False,
            help="Replace the report that --output holds.",
        ),
    ] = False

    html: Annotated[
        bool,
        Parameter(
            name="--html",
            group=REPORT_GROUP,
            negative="--no-html",
            show_default=False,
            help="Write the page with plots (default), or the data files alone.",
        ),
    ] = True

    beside: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--beside",
            group=REPORT_GROUP,
            negative="",
            show_default=False,
            help="report.json of tandem simulate or of another load test, shown beside this one.",
        ),
    ] = ()

    compare: Annotated[
        tuple[Path, Path] | None,
        Parameter(
            name="--compare",
            group=REPORT_GROUP,
            show_default=False,
            help="No run: compare two reports, A.json B.json, request by request.",
        ),
    ] = None
