"""What a decision log holds: one JSON object a line, each with its `kind`.

A file begins with a `header`, from which everything later in it can be understood; another one follows after a rest,
a loss or a restart. Times are seconds since the header's `started_at`. Keys that a line lacks have their defaults, keys
that a reader does not know are ignored: the format's number grows when a key changes its meaning.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from contracts.errors import ConfigError
from contracts.latency_models import FittedLatency
from contracts.messages import MemberRole, Predicted
from coordinator.policy.settings import ConductorSettings

FORMAT: Final = "tandem-decisions-1"
_FORMAT_FAMILY = "tandem-decisions-"

#: How a file begins, whatever its format's number.
FIRST_BYTES: Final = b'{"kind":"header","format":"' + _FORMAT_FAMILY.encode()


#: The default of what may be 0: by its identity a field is known to be left out.
ZERO: Final = 0.0


class Targets(msgspec.Struct, frozen=True):
    """Of an SLO class."""

    ttft_ms: float
    tpot_ms: float


class Surroundings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a replay needs and the conductor does not know."""

    heartbeat_interval_s: float = 0.5
    #: Running sequences of one worker that does not say it, by role.
    max_sequences: dict[str, int] = {}
    #: Of the order in which prompts are read.
    queue_ageing_s: float = 10.0
    queue_fair: bool = True
    #: Whether targets of answers cut the prompts beside them.
    tpot_chunks: bool = True


class CostKind(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="costs"):
    """What steps of some workers take, which name it by its number."""

    number: int
    #: None: a form that has no coefficients to write down.
    latency: FittedLatency | None
    max_batch_tokens: int
    between_steps_s: float


class LinkCosts(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="link"):
    """Between two workers, from here on."""

    latency_s: float
    bandwidth_bytes_s: float
    efficiency: float
    kv_token_bytes: int


class WorkerUp(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="worker"):
    """A worker, or a store, is there from the next decision on; or costs something else from then on."""

    at_s: float
    worker_id: str
    incarnation: int
    role: MemberRole
    total_blocks: int
    block_tokens: int
    max_context_tokens: int
    #: See `contracts.messages.WorkerInfo`; 0: not told.
    max_batch_tokens: int = 0
    max_sequences: int = 0
    handoff_blocks: int = 0
    device: str = ""
    #: Of a `CostKind`; None: nothing is known of what its steps take.
    costs: int | None = None

    def same_worker(self, other: WorkerUp | None) -> bool:
        """Whether they differ at most in what its steps are known to take."""
        return other is not None and msgspec.structs.replace(self, at_s=other.at_s, costs=other.costs) == other


class WorkerGone(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="gone"):
    """From the next decision on."""

    at_s: float
    worker_id: str


class AnswerMeans(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="answers"):
    """How long answers get, as believed by now: mean tokens by `prompt_tokens.bit_length()`."""

    at_s: float
    tokens: dict[int, float]


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="lost"):
    """So many decisions before this line are not in the log."""

    decisions: int


class Header(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="header"):
    """Everything that is known at `at_s`."""

    format: str
    version: str
    #: Unix time of second 0.
    started_at: float
    at_s: float
    settings: ConductorSettings
    slos: dict[str, Targets]
    default_slo: str | None
    surroundings: Surroundings
    link: LinkCosts
    costs: tuple[CostKind, ...] = ()
    workers: tuple[WorkerUp, ...] = ()
    answers: dict[int, float] = {}


class Decision(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="kind", tag="decision", gc=False
):
    """One decision with its inputs. Repeats of one request (after a worker failed) have its id."""

    at_s: float
    request: str
    prompt_tokens: int
    max_tokens: int
    #: "placement", or why it was refused: a `coordinator.decision.RefusedWhy`.
    outcome: str
    #: That it was judged by; empty: it has no targets.
    slo_class: str = ""
    priority: int = 0
    tenant: str = ""
    #: Since its client asked.
    waited_s: float = ZERO
    was_accepted: bool = False
    avoid: tuple[str, ...] = ()
    #: Of the prompt's beginning: of the chained key of each `hint_blocks`th block the first four bytes, in hex.
    hints: str = ""
    hint_blocks: int = 1
    retry_after_s: float = ZERO
    #: Of the placement; of a refusal for its targets: the best place that there was.
    prefill: str = ""
    decode: str = ""
    #: Where a prefix is fetched from.
    source: str = ""
    local_blocks: int = 0
    source_blocks: int = 0
    #: Of the worker that holds most.
    best_held_blocks: int = 0
    predicted: Predicted | None = None
    #: What predictions could be at most; 0 without targets. `was_refusing`: smaller, for the class was being refused.
    ttft_limit_s: float = ZERO
    tpot_limit_s: float = ZERO
    was_refusing: bool = False
    #: Expected of the answer.
    answer_tokens: float = ZERO
    #: Without this request. Of the prefill worker: prompt tokens not yet computed, requests not yet computing.
    pending_tokens: int = 0
    waiting_requests: int = 0
    #: Of the decode worker: answers being written and their context; and both when this one would begin.
    num_decodes: float = ZERO
    context_tokens: float = ZERO
    num_decodes_then: float = ZERO
    context_tokens_then: float = ZERO

    @property
    def is_placed(self) -> bool:
        return self.outcome == "placement"


Record: TypeAlias = Header | CostKind | LinkCosts | WorkerUp | WorkerGone | AnswerMeans | Lost | Decision


class _Beginning(msgspec.Struct):
    kind: str
    format: str


_beginning = msgspec.json.Decoder(_Beginning)
_record: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_encoder = msgspec.json.Encoder()


def line_of(record: Record) -> bytes:
    """With its end."""
    return _encoder.encode(record) + b"\n"


def record_of(line: bytes) -> Record | None:
    """None for what is no line of this format."""
    try:
        return _record.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def check_beginning(line: bytes, where: str) -> None:
    """Raises ConfigError that begins with `where`, unless this is how a log that can be read begins."""
    try:
        beginning = _beginning.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        beginning = None
    if beginning is None or beginning.kind != "header" or not beginning.format.startswith(_FORMAT_FAMILY):
        raise ConfigError(f"{where}: not a decision log (coordinator.decision_log writes them)")
    if beginning.format != FORMAT:
        raise ConfigError(f"{where}: its format is {beginning.format}; this version reads {FORMAT}")
