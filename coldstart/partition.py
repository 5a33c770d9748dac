"""Which bytes of a checkpoint each tensor-parallel rank holds, and where. Pure.

Shares follow Megatron-LM, section 3, as `engine.fused.Split` says it: of a tensor split by rows each of its parts is
shared out by itself, so that q, k and v stay fused within a rank. Key-value heads fewer than ranks are replicated.
A vocabulary need not divide: the last ranks then have fewer rows.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from coldstart.format import TensorEntry, aligned
from contracts.errors import ConfigError
from engine.fused import EMBEDDING, LM_HEAD, Split, expected_tensors, fused_tensors
from engine.safetensors_files import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.model_config import ModelConfig
    from engine.safetensors_files import StoredDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one tensor of the original: rows `[row, row + num_rows)`, columns likewise.

    A tensor of one axis has rows of one column.
    """

    source: str
    row: int
    num_rows: int
    column: int
    num_columns: int
    #: Of the whole tensor of the original.
    row_length: int

    @property
    def num_items(self) -> int:
        return self.num_rows * self.num_columns


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A rank's fused tensor: its pieces one behind the other."""

    entry: TensorEntry
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive items of one piece: `num_items` from its `first_item` on, for bytes from `start` of a chunk on."""

    piece: Piece
    first_item: int
    num_items: int
    start: int


class PartitionPlan:
    """One weight file: what it holds, and what each range of its bytes is made of."""

    def __init__(self, config: ModelConfig, dtype: StoredDtype, *, rank: int, tensor_parallel: int) -> None:
        """Raises ConfigError when the model cannot be shared out so."""
        self.item_bytes = ITEM_BYTES[dtype]
        shapes = expected_tensors(config)
        tensors: list[PlannedTensor] = []
        end = 0
        for tensor in fused_tensors(config):
            pieces = tuple(
                _piece(config, part, shapes[part], tensor.split, rank, tensor_parallel) for part in tensor.parts
            )
            rows = sum(piece.num_rows for piece in pieces)
            shape = (rows,) if len(tensor.shape) == 1 else (rows, pieces[0].num_columns)
            entry = TensorEntry(name=tensor.name, offset=aligned(end), shape=shape, dtype=dtype)
            end = entry.offset + entry.num_bytes
            tensors.append(PlannedTensor(entry=entry, pieces=pieces))
        self.tensors = tuple(tensors)
        self.num_bytes = aligned(end)
        self._offsets = [tensor.entry.offset for tensor in tensors]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(tensor.entry for tensor in self.tensors)

    def spans(self, start: int, stop: int) -> Iterator[Span]:
        """What the bytes `[start, stop)`, whole items both, are made of; between the spans are zeros."""
        for tensor in self.tensors[max(0, bisect_right(self._offsets, start) - 1) :]:
            piece_start = tensor.entry.offset
            if piece_start >= stop:
                return
            for piece in tensor.pieces:
                piece_stop = piece_start + piece.num_items * self.item_bytes
                low, high = max(start, piece_start), min(stop, piece_stop)
                if low < high:
                    yield Span(
                        piece=piece,
                        first_item=(low - piece_start) // self.item_bytes,
                        num_items=(high - low) // self.item_bytes,
                        start=low - start,
                    )
                piece_start = piece_stop


def check_shares(config: ModelConfig, tensor_parallel: int) -> None:
    """Raises ConfigError naming the size that so many ranks cannot share."""
    if tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel is {tensor_parallel}, must be at least 1")
    sizes = [("attention heads", config.num_heads), ("feed-forward features", config.intermediate_size)]
    for what, size in sizes:
        if size % tensor_parallel:
            raise ConfigError(f"{size} {what} cannot be shared out to {tensor_parallel} ranks")
    heads = config.num_kv_heads
    if heads % tensor_parallel and tensor_parallel % heads:
        raise ConfigError(
            f"{heads} key-value heads can neither be shared out to {tensor_parallel} ranks nor replicated"
        )
    share = -(-config.vocab_size // tensor_parallel)
    if share * (tensor_parallel - 1) >= config.vocab_size:
        raise ConfigError(f"a vocabulary of {config.vocab_size} leaves nothing to the last of {tensor_parallel} ranks")


def _piece(
    config: ModelConfig, part: str, shape: tuple[int, ...], split: Split, rank: int, tensor_parallel: int
) -> Piece:
    check_shares(config, tensor_parallel)
    rows, columns = shape[0], prod(shape[1:])
    row, num_rows, column, num_columns = 0, rows, 0, columns
    if split is Split.ROWS:
        row, num_rows = _row_share(config, part, rows, rank, tensor_parallel)
    elif split is Split.COLUMNS:
        num_columns = columns // tensor_parallel
        column = rank * num_columns
    return Piece(source=part, row=row, num_rows=num_rows, column=column, num_columns=num_columns, row_length=columns)


def _row_share(config: ModelConfig, part: str, rows: int, rank: int, tensor_parallel: int) -> tuple[int, int]:
    """(first row, number of rows)."""
    if part in (EMBEDDING, LM_HEAD):
        share = -(-rows // tensor_parallel)
        return rank * share, min(share, rows - rank * share)
    if ".k_proj." in part or ".v_proj." in part:
        heads = config.num_kv_heads
        # Several ranks in a row have the same head where there are fewer heads than ranks.
        return rank * heads // tensor_parallel * config.head_dim, max(1, heads // tensor_parallel) * config.head_dim
    return rank * (rows // tensor_parallel), rows // tensor_parallel
