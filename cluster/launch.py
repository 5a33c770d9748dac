"""What a worker process is told at its start, and what it tells back: JSON lines on its stdin and stdout.

The parent writes one `WorkerLaunch` line to the child's stdin and keeps the pipe open: its end of file is
the sign that the parent is gone (a life-line that even `kill -9` of the parent cuts). The cluster token
travels here and never on a command line or in the environment. The child answers with status lines on
stdout; its log goes to stderr.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from coldstart.compressing import CodecRates
from coldstart.handing import WeightsDoor
from coldstart.residence import WeightsKey
from contracts.errors import ConfigError
from contracts.ids import Incarnation, WorkerId
from contracts.messages import Role

LaunchT = TypeVar("LaunchT", bound=msgspec.Struct)

#: A launch line; also what a pipe takes without blocking on Linux.
MAX_LAUNCH_BYTES = 64 * 1024

#: How often a ready worker tells that its event loop runs.
SIGN_OF_LIFE_S = 0.5


class TransferOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The `transfer` section of the configuration."""

    #: None: loopback.
    interface: str | None = None
    checksum: bool = False
    lease_ttl_s: float = 10.0
    probe: bool = True
    #: None: what the transport's class ordinarily does.
    expect_bytes_per_s: int | None = None
    allow_slow: bool = False


class QueueOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The `engine.queue` section of the configuration, and the tenants' weights."""

    order: Literal["fcfs", "shortest", "edf"] = "fcfs"
    ageing_s: float = 10.0
    fair: bool = True
    #: Of tenants whose weight is not 1.
    tenant_weights: dict[str, float] = {}
    #: None: the whole step.
    saturation_tokens: int | None = None
    tpot_chunks: bool = True


class SnapshotOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where workers keep what they warmed up, and what all of it may take."""

    folder: str
    size_bytes: int


class WorkerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one life of a worker needs to know."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    coordinator_address: str
    cluster_token: str
    #: Local folder of the checkpoint.
    model_dir: str
    #: The name clients use.
    model_name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
    #: None: the checkpoint's.
    max_model_len: int | None
    block_tokens: int
    kv_memory_bytes: int
    #: Exact size of the KV pool; None: as many as `kv_memory_bytes` holds.
    num_blocks: int | None
    threads: int
    #: Cores to run on; empty: leave the affinity as it is.
    cores: tuple[int, ...]
    max_batch_tokens: int
    max_sequences: int
    #: Whether it keeps the KV of prompts for others that begin alike.
    prefix_cache: bool = True
    queue: QueueOptions = QueueOptions()
    #: Where its rpc server listens, "host:port"; port 0 takes a free one.
    bind: str
    transport: Literal["auto", "shm", "ucx", "collective"]
    transfer: TransferOptions
    #: Private folder (mode 0700) of this cluster for unix sockets.
    runtime_dir: str
    #: Process whose death ends this one at once; None: nobody's.
    parent_pid: int | None
    #: Names the machine.
    node: str = ""
    #: Where the node agent hands out weights; None: the worker reads them itself.
    weights: WeightsDoor | None = None
    #: None: it begins cold.
    snapshot: SnapshotOptions | None = None


class SsdOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The `store.ssd` section of the configuration."""

    path: str
    size_bytes: int
    codec: Literal["raw", "int8", "int4", "auto"]
    direct: bool


class StoreLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one life of a machine's store needs to know. Which KV it keeps, it learns from the first worker that
    serves the same model."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: Literal["store"] = "store"
    coordinator_address: str
    cluster_token: str
    model_name: str
    dram_bytes: int
    ssd: SsdOptions | None
    policy: Literal["lru", "lfu_aged", "s3_fifo", "cost_aware", "scheduler_aware"]
    bind: str
    transport: Literal["auto", "shm", "ucx", "collective"]
    transfer: TransferOptions
    runtime_dir: str
    parent_pid: int | None
    node: str
    #: It floats over all cores: what it does is copying, and waiting for disks.
    cores: tuple[int, ...] = ()


Launch = WorkerLaunch | StoreLaunch


class StandbyLaunch(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="standby"):
    """Be ready to become a worker; what it is to be comes on a second line."""

    parent_pid: int | None
    #: As `WorkerLaunch.device`: what is to be warm.
    device: Literal["auto", "cpu", "cuda"]


class TemplateLaunch(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="template"):
    """Be what workers are forked of."""

    parent_pid: int
    #: As `WorkerLaunch.device`: what is to be warm.
    device: Literal["auto", "cpu"]
    #: A socket that the process inherited: wishes come on it, and answers go.
    descriptor: int = -1


class ForkWish(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="fork"):
    """Make a worker, with the pipes that come along: stdin, stdout, stderr."""

    #: What it is to have beside, or instead of, the template's environment.
    environ: dict[str, str]


class WeightTierOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The `weights.ssd` section of the configuration."""

    path: str
    size_bytes: int


class LoaderLaunch(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="loader"):
    """Fill memory with one model's weights."""

    key: WeightsKey
    #: A memfd that the process inherited; empty until `Go`.
    descriptor: int
    #: Another one, read-only, with the weights compressed: nothing else is read then.
    compressed: int | None = None
    ssd: WeightTierOptions | None
    parent_pid: int


class CompressorLaunch(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="compressor"):
    """Compress a copy in memory: tell what that brings, then wait for `Go`."""

    key: WeightsKey
    #: A memfd that the process inherited; empty until `Go`.
    descriptor: int
    #: Another one, read-only: the weights and, behind them, their index.
    source: int
    weight_bytes: int
    index_bytes: int
    parent_pid: int


class Go(msgspec.Struct, frozen=True, kw_only=True, tag_field="launch", tag="go"):
    """A loader's or compressor's memory has its size now."""

    num_bytes: int


#: Whatever is said to a child on its stdin.
Message = Launch | StandbyLaunch | TemplateLaunch | ForkWish | LoaderLaunch | CompressorLaunch | Go


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="loading"):
    """Start-up goes on. `what` is for people ("weights", "kernels")."""

    what: str
    #: 0 to 1; None where there is no telling.
    fraction: float | None = None
    #: It cannot go on before that is there.
    is_waiting: bool = False


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="ready"):
    """Registered and serving on this rpc address."""

    address: str
    #: For so long the start stood still until the node agent handed out its weights; None: it read them itself.
    weights_wait_s: float | None = None
    #: From then until now.
    after_weights_s: float = 0.0


class Warm(msgspec.Struct, frozen=True, tag_field="event", tag="warm"):
    """All is imported; it waits for its launch."""


class Forked(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="forked"):
    """A template made a process."""

    pid: int


class NotForked(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="not-forked"):
    """A template could not, or must not."""

    why: str


class Sized(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="sized"):
    """A loader knows how much memory it needs, and waits for `Go`."""

    num_bytes: int


class Filled(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="filled"):
    """A loader's memory holds verified weights and, behind them, their index. Its last line."""

    weight_bytes: int
    index_bytes: int
    #: Where they came from: "original" (fused on the way), "ssd", "remote", "compressed".
    tier: str
    #: The loader goes on, over memory that it can only read, to complete the disk tier's copy.
    goes_on: bool = False
    #: From the first read until the last byte was in place.
    seconds: float = 0.0
    #: Whether the reads went past the page cache.
    is_direct: bool = False
    #: Before that the original was converted, which took so long; 0: it was not.
    converted_s: float = 0.0


class Tried(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="tried"):
    """A compressor knows what its codec does with some of its chunks, and waits for `Go`."""

    rates: CodecRates
    #: Memory that the result has at most.
    bound_bytes: int


class Shrunk(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="shrunk"):
    """A compressor's memory holds the result. Its last line."""

    num_bytes: int


class Alive(msgspec.Struct, frozen=True, tag_field="event", tag="alive"):
    """The event loop of a ready worker runs. Told every `SIGN_OF_LIFE_S`."""


class Serves(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="serves"):
    """The worker has another role than it was started with, and would begin its next life with."""

    role: Role


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="failed"):
    """The last line of a worker that cannot go on. `error` is a code of contracts.errors."""

    error: str
    message: str


#: What a template says on its socket.
TemplateAnswer = Warm | Forked | NotForked

Status = Loading | Ready | Warm | Sized | Filled | Tried | Shrunk | Alive | Serves | Failed

_LAUNCH_DECODER = msgspec.json.Decoder(WorkerLaunch)
_STORE_DECODER = msgspec.json.Decoder(StoreLaunch)
_STANDBY_DECODER = msgspec.json.Decoder(StandbyLaunch)
_TEMPLATE_DECODER = msgspec.json.Decoder(TemplateLaunch)
_FORK_DECODER = msgspec.json.Decoder(ForkWish)
_LOADER_DECODER = msgspec.json.Decoder(LoaderLaunch)
_COMPRESSOR_DECODER = msgspec.json.Decoder(CompressorLaunch)
_GO_DECODER = msgspec.json.Decoder(Go)
_STATUS_DECODER: msgspec.json.Decoder[Status] = msgspec.json.Decoder(Status)
_ANSWER_DECODER: msgspec.json.Decoder[TemplateAnswer] = msgspec.json.Decoder(TemplateAnswer)


def encode_line(message: Message | Status | TemplateAnswer) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def decode_launch(line: bytes) -> WorkerLaunch:
    """Raises ConfigError, without the line's content: it holds the token."""
    return _decode(_LAUNCH_DECODER, line)


def decode_store_launch(line: bytes) -> StoreLaunch:
    """As `decode_launch`."""
    return _decode(_STORE_DECODER, line)


def decode_standby_launch(line: bytes) -> StandbyLaunch:
    """As `decode_launch`."""
    return _decode(_STANDBY_DECODER, line)


def decode_template_launch(line: bytes) -> TemplateLaunch:
    """As `decode_launch`."""
    return _decode(_TEMPLATE_DECODER, line)


def decode_fork_wish(line: bytes) -> ForkWish:
    """As `decode_launch`."""
    return _decode(_FORK_DECODER, line)


def decode_template_answer(line: bytes) -> TemplateAnswer | None:
    """None for what is none."""
    try:
        return _ANSWER_DECODER.decode(line)
    except msgspec.MsgspecError:
        return None


def decode_loader_launch(line: bytes) -> LoaderLaunch:
    """As `decode_launch`."""
    return _decode(_LOADER_DECODER, line)


def decode_compressor_launch(line: bytes) -> CompressorLaunch:
    """As `decode_launch`."""
    return _decode(_COMPRESSOR_DECODER, line)


def decode_go(line: bytes) -> Go:
    """As `decode_launch`."""
    return _decode(_GO_DECODER, line)


def _decode(decoder: msgspec.json.Decoder[LaunchT], line: bytes) -> LaunchT:
    try:
        return decoder.decode(line)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the launch document on stdin is not usable: {error}") from error


def decode_status(line: bytes) -> Status | None:
    """None for a line that is no status (a library that prints)."""
    try:
        return _STATUS_DECODER.decode(line)
    except msgspec.MsgspecError:
        return None
