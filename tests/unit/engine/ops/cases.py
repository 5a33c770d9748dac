"""Inputs for the operator tests: batches, pools and dense attention computed the long way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from engine.ops import AttentionBatch

if TYPE_CHECKING:
    from torch import Tensor

NUM_LAYERS, LAYER = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One step: sequences of (new tokens, context length), and the geometry of pool and heads."""

    sequences: tuple[tuple[int, int], ...]
    block_tokens: int
    num_kv_heads: int
    group: int
    head_dim: int
    window: int | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def num_tokens(self) -> int:
        return sum(new for new, _ in self.sequences)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def batch(self) -> tuple[AttentionBatch, int]:
        """The batch, with blocks in random order and ids of -1 beyond the contexts; the blocks it needs."""
        blocks_per_sequence = [-(-context // self.block_tokens) for _, context in self.sequences]
        num_blocks = sum(blocks_per_sequence) + 2
        free = [int(block) for block in torch.randperm(num_blocks, generator=self.generator())]
        tables = torch.full((len(self.sequences), max(blocks_per_sequence) + 1), -1, dtype=torch.int32)
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for s, (new, context) in enumerate(self.sequences):
            blocks = [free.pop() for _ in range(blocks_per_sequence[s])]
            tables[s, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            for position in range(context - new, context):
                positions.append(position)
                slots.append(blocks[position // self.block_tokens] * self.block_tokens + position % self.block_tokens)
            starts.append(len(positions))
        batch = AttentionBatch(
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([context for _, context in self.sequences], dtype=torch.int32),
            block_tables_SM=tables,
            max_query_len=max(new for new, _ in self.sequences),
            max_context_len=max(context for _, context in self.sequences),
        )
        return batch, num_blocks

    def empty_pool(self, num_blocks: int) -> Tensor:
        """A pool of NaN, so that reading what was never written shows."""
        shape = (num_blocks, self.num_kv_heads, NUM_LAYERS, 2, self.block_tokens, self.head_dim)
        return torch.full(shape, float("nan"), dtype=self.dtype)

    def written_pool(self, batch: AttentionBatch, num_blocks: int) -> tuple[Tensor, list[Tensor]]:
        """A pool that holds random keys and values of the contexts, and these as `[2, K, context, E]`."""
        pool_NKL2BE = self.empty_pool(num_blocks)
        generator = self.generator()
        contexts: list[Tensor] = []
        for s, (_, context) in enumerate(self.sequences):
            shape = (2, self.num_kv_heads, context, self.head_dim)
            kv_2KCE = torch.randn(shape, generator=generator).to(self.dtype)
            for first in range(0, context, self.block_tokens):
                piece_2KBE = kv_2KCE[:, :, first : first + self.block_tokens]
                block = int(batch.block_tables_SM[s, first // self.block_tokens])
                pool_NKL2BE[block, :, LAYER, :, : piece_2KBE.shape[2]] = piece_2KBE.transpose(0, 1)
            contexts.append(kv_2KCE)
        return pool_NKL2BE, contexts

    def queries(self) -> Tensor:
        shape = (self.num_tokens, self.num_heads, self.head_dim)
        return torch.randn(shape, generator=self.generator()).to(self.dtype)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def dense_attention(case: Case, q_THE: Tensor, contexts: list[Tensor]) -> Tensor:
    """Attention in fp64 with the whole matrix of scores. Returns `[T, H, E]`."""
    outputs: list[Tensor] = []
    first_row = 0
    for (new, context), kv_2KCE in zip(case.sequences, contexts, strict=True):
        keys_HCE, values_HCE = kv_2KCE.double().repeat_interleave(case.group, dim=1)
        q_HQE = q_THE[first_row : first_row + new].double().transpose(0, 1)
        scores_HQC = q_HQE @ keys_HCE.transpose(1, 2) * case.scale
        last_visible_Q1 = torch.arange(context - new, context)[:, None]
        visible_QC = torch.arange(context) <= last_visible_Q1
        if case.window is not None:
            visible_QC &= torch.arange(context) > last_visible_Q1 - case.window
        weights_HQC = scores_HQC.masked_fill(~visible_QC, float("-inf")).softmax(-1)
        outputs.append((weights_HQC @ values_HCE).transpose(0, 1))
        first_row += new
    return torch.cat(outputs)


def assert_close(actual: Tensor, expected: Tensor, *, scale: float = 1.0) -> None:
    """Within 1e-5 for fp32, and within two units in the last place for bf16, of results about as large as `scale`."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mixed batches of decodes and chunks."""
    head_dim = draw(st.sampled_from([32, 64, 128, 2, 6, 80, 256]))
    new_tokens = st.sampled_from([1, 1, 2, 3, 9, 40])
    before = st.one_of(st.integers(0, 70), st.integers(0, 660))
    return Case(
        sequences=tuple(
            (new, new + earlier)
            for new, earlier in draw(st.lists(st.tuples(new_tokens, before), min_size=1, max_size=4))
        ),
        block_tokens=draw(st.sampled_from([8, 16, 32, 256, 12])),
        num_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        head_dim=head_dim,
        window=draw(st.one_of(st.none(), st.integers(1, 200))),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 1000)),
    )
