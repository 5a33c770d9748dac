"""A step plan as tensors: tokens, positions, slots and block tables, flattened without padding.

Checks what a kernel cannot: a block id outside the pool would let it write into other memory.

Shape legend as in `engine.ops.api`: T new tokens, S sequences, M blocks in the longest table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from contracts.errors import BadRequest, InvariantBroken
from engine.ops.api import AttentionBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from engine.plan import SampleSpec, SequenceStep, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What a plan is checked against."""

    block_tokens: int
    num_blocks: int
    max_context_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    token_ids_T: Tensor
    attention: AttentionBatch
    #: int64, rows of the sequences that ask for a token, in plan order; None when none does.
    sample_rows: Tensor | None
    #: Parallel to `sample_rows`.
    sequence_ids: list[int]
    specs: list[SampleSpec]


def build_batch(plan: StepPlan, limits: BatchLimits, device: torch.device) -> Batch:
    """Tensors of a non-empty plan, on `device`.

    Raises BadRequest for a token outside the vocabulary, InvariantBroken for impossible blocks or positions.
    """
    steps = plan.sequences
    lengths = [len(step.token_ids) for step in steps]
    contexts = [step.start + length for step, length in zip(steps, lengths, strict=True)]
    max_context = max(contexts)
    tables = _block_tables(steps, contexts, limits)
    rows = np.empty((3, sum(lengths)), dtype=np.int64)
    starts = [0]
    for index, step in enumerate(steps):
        start, stop = starts[-1], starts[-1] + lengths[index]
        _fill_rows(rows[:, start:stop], step, tables[index], limits.block_tokens)
        starts.append(stop)
    _check_tokens(rows[0], limits.vocab_size)
    token_ids_T, positions_T, slots_T = torch.as_tensor(rows, device=device)
    sampling = [index for index, step in enumerate(steps) if step.sample is not None]
    attention = AttentionBatch(
        positions_T=positions_T,
        slots_T=slots_T,
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables_SM=torch.as_tensor(tables, device=device),
        max_query_len=max(lengths),
        max_context_len=max_context,
    )
    return Batch(
        token_ids_T=token_ids_T,
        attention=attention,
        sample_rows=_sample_rows(starts, sampling, device),
        sequence_ids=[steps[index].sequence_id for index in sampling],
        specs=[step.sample for step in steps if step.sample is not None],
    )


def _sample_rows(starts: list[int], sampling: list[int], device: torch.device) -> Tensor | None:
    if not sampling:
        return None
    return torch.tensor([starts[index + 1] - 1 for index in sampling], dtype=torch.int64, device=device)


def _block_tables(steps: tuple[SequenceStep, ...], contexts: list[int], limits: BatchLimits) -> NDArray[np.int32]:
    """int32 `[S, M]`, zero beyond each context. Raises InvariantBroken."""
    used = [-(-context // limits.block_tokens) for context in contexts]
    tables = np.zeros((len(steps), max(used)), dtype=np.int32)
    for index, step in enumerate(steps):
        _check_step(step, contexts[index], used[index], limits)
        tables[index, : used[index]] = step.block_ids[: used[index]]
    if tables.min() < 0 or tables.max() >= limits.num_blocks:
        raise InvariantBroken(f"a step names blocks {tables.min()} to {tables.max()} of a pool of {limits.num_blocks}")
    return tables


def _check_step(step: SequenceStep, context: int, used_blocks: int, limits: BatchLimits) -> None:
    if step.start < 0 or context == step.start or len(step.block_ids) < used_blocks:
        raise InvariantBroken(
            f"sequence {step.sequence_id}: tokens [{step.start}, {context}) in {len(step.block_ids)} blocks "
            f"of {limits.block_tokens} tokens"
        )
    if context > limits.max_context_tokens:
        raise InvariantBroken(
            f"sequence {step.sequence_id}: {context} tokens, the context holds {limits.max_context_tokens}"
        )


def _fill_rows(rows_3T: NDArray[np.int64], step: SequenceStep, table: NDArray[np.int32], block_tokens: int) -> None:
    """Token ids, positions and slots of one sequence's new tokens."""
    length = rows_3T.shape[1]
    if length == 1:
        block, offset = divmod(step.start, block_tokens)
        rows_3T[:, 0] = step.token_ids[0], step.start, int(table[block]) * block_tokens + offset
        return
    positions = np.arange(step.start, step.start + length, dtype=np.int64)
    rows_3T[0] = step.token_ids
    rows_3T[1] = positions
    rows_3T[2] = table[positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens


def _check_tokens(token_ids_T: NDArray[np.int64], vocab_size: int) -> None:
    lowest, highest = int(token_ids_T.min()), int(token_ids_T.max())
    if lowest < 0 or highest >= vocab_size:
        worst = lowest if lowest < 0 else highest
        raise BadRequest(f"token id {worst} is outside the vocabulary of {vocab_size}")
