"""The public trace formats: how each says when a request came, and how long its prompt and answer were."""

from __future__ import annotations

import csv
import io
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple

import msgspec

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TraceKind = Literal["mooncake", "azure", "burstgpt"]
#: Of a file of conversations, which say nothing of when: `workload.sharegpt` reads them.
CONVERSATIONS: Final = "sharegpt"

#: Prompt tokens that one of a Mooncake trace's hash ids stands for.
MOONCAKE_BLOCK_TOKENS = 512


#: The format stands in these.
_FIRST_LINE_BYTES = 1 << 20


class TraceRow(NamedTuple):
    """One row of a trace file, checked by itself. Token counts are >= 0: failed requests have no output."""

    line: int
    #: On the trace's own clock, whose zero is anywhere.
    time_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _MooncakeRow(msgspec.Struct, frozen=True):
    #: Milliseconds.
    timestamp: float
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[_Count, ...]


def detect(name: str, text: bytes) -> TraceKind | Literal["sharegpt"]:
    """The format of a file, told by its first line. Raises ConfigError where it is none of them."""
    first = text[:_FIRST_LINE_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].strip()
    if first.startswith(b"[") or (first.startswith(b"{") and b'"conversations"' in first):
        return CONVERSATIONS
    if first.startswith(b"{"):
        return "mooncake"
    columns = set(first.decode("utf-8", "replace").split(","))
    if columns.issuperset(_AZURE_COLUMNS):
        return "azure"
    if columns.issuperset(_BURSTGPT_COLUMNS):
        return "burstgpt"
    raise ConfigError(
        f"{name}:1: no known trace: it is neither Mooncake JSON lines, nor ShareGPT JSON, nor a CSV file with the "
        f"columns {', '.join(_AZURE_COLUMNS)} (Azure) or {', '.join(_BURSTGPT_COLUMNS)} (BurstGPT)"
    )


def rows(name: str, text: bytes, kind: TraceKind) -> Iterator[TraceRow]:
    """The rows of a file called `name`, as they stand. Raises ConfigError `name:line: what` at the first bad one."""
    return _READERS[kind](name, text.removeprefix(b"\xef\xbb\xbf"))


def _mooncake_rows(name: str, text: bytes) -> Iterator[TraceRow]:
    """FAST'25 release: JSON lines with milliseconds, and one hash id for each started block of 512 prompt tokens."""
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    for line, encoded in enumerate(text.splitlines(), start=1):
        if not encoded.strip():
            continue
        try:
            row = decode(encoded)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{name}:{line}: {error}") from error
        blocks = -(-row.input_length // MOONCAKE_BLOCK_TOKENS)
        if len(row.hash_ids) != blocks:
            raise ConfigError(
                f"{name}:{line}: {len(row.hash_ids)} hash_ids for an input_length of {row.input_length}, "
                f"which has {blocks} blocks of {MOONCAKE_BLOCK_TOKENS} tokens"
            )
        yield TraceRow(line, row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids)


_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def _azure_rows(name: str, text: bytes) -> Iterator[TraceRow]:
    """2023 and 2024 releases: date and time, the later ones with an offset from UTC; read to the microsecond."""
    return _csv_rows(name, text, _AZURE_COLUMNS, _utc_s)


def _burstgpt_rows(name: str, text: bytes) -> Iterator[TraceRow]:
    """Seconds since the trace began. Columns that later releases add (session, elapsed time) are not read."""
    return _csv_rows(name, text, _BURSTGPT_COLUMNS, float)


_READERS: dict[TraceKind, Callable[[str, bytes], Iterator[TraceRow]]] = {
    "mooncake": _mooncake_rows,
    "azure": _azure_rows,
    "burstgpt": _burstgpt_rows,
}


def _csv_rows(
    name: str, text: bytes, columns: tuple[str, str, str], seconds: Callable[[str], float]
) -> Iterator[TraceRow]:
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(text), "utf-8", errors="replace", newline=""), strict=True)
    try:
        header = next(reader, list[str]())
        missing = [column for column in columns if column not in header]
        if missing:
            raise ConfigError(f"{name}:1: no column {', '.join(missing)} in {', '.join(header)}")
        time_at, prompt_at, output_at = (header.index(column) for column in columns)
        for cells in reader:
            if not cells:
                continue
            line = reader.line_num
            if len(cells) != len(header):
                raise ConfigError(f"{name}:{line}: {len(cells)} cells, where the header names {len(header)}")
            try:
                yield TraceRow(line, seconds(cells[time_at]), _count(cells[prompt_at]), _count(cells[output_at]))
            except ValueError as error:
                read = ", ".join(f"{column} {cells[header.index(column)]!r}" for column in columns)
                raise ConfigError(f"{name}:{line}: {error} (of {read})") from error
    except csv.Error as error:
        raise ConfigError(f"{name}:{reader.line_num}: {error}") from error


def _count(cell: str) -> int:
    tokens = int(cell)
    if tokens < 0:
        raise ValueError(f"tokens must be >= 0, got {tokens}")
    return tokens


def _utc_s(cell: str) -> float:
    """Seconds since 1970; a time without an offset counts as UTC."""
    moment = datetime.fromisoformat(cell)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
