"""Shares of tensor-parallel ranks, and what each range of bytes is made of."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.partition import PartitionPlan, check_shares
from contracts.errors import ConfigError
from engine.fused import Split, expected_tensors, fused_tensors
from engine.model_config import parse_model_config

if TYPE_CHECKING:
    from engine.model_config import ModelConfig
    from engine.safetensors_files import StoredDtype


def _config(*, heads: int = 8, kv_heads: int = 2, inner: int = 48, vocab: int = 101) -> ModelConfig:
    text = (
        '{"architectures": ["Qwen2ForCausalLM"], "vocab_size": %d, "hidden_size": 32, "intermediate_size": %d, '
        '"num_hidden_layers": 2, "num_attention_heads": %d, "num_key_value_heads": %d, "tie_word_embeddings": false}'
    )
    return parse_model_config((text % (vocab, inner, heads, kv_heads)).encode(), where="config")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_together_have_every_item_and_split_ones_once(ranks: int) -> None:
    config = _config()
    split = {part: tensor.split for tensor in fused_tensors(config) for part in tensor.parts}
    seen: dict[str, list[tuple[int, int]]] = {}
    for rank in range(ranks):
        for tensor in PartitionPlan(config, "float32", rank=rank, tensor_parallel=ranks).tensors:
            for piece in tensor.pieces:
                places = seen.setdefault(piece.source, [])
                rows = range(piece.row, piece.row + piece.num_rows)
                places += [(row, column + piece.column) for row in rows for column in range(piece.num_columns)]
    for name, shape in expected_tensors(config).items():
        every = {(row, column) for row in range(shape[0]) for column in range(shape[1] if len(shape) > 1 else 1)}
        assert set(seen[name]) == every, name
        is_replicated = split[name] is Split.NONE or (ranks > 2 and (".k_proj." in name or ".v_proj." in name))
        assert (len(seen[name]) == len(every)) == (not is_replicated or ranks == 1), name


@given(st.data(), st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]), st.sampled_from([1, 2, 4]))
def test_spans_of_any_ranges_are_the_whole_file(data: st.DataObject, dtype: StoredDtype, ranks: int) -> None:
    plan = PartitionPlan(_config(), dtype, rank=data.draw(st.integers(0, ranks - 1)), tensor_parallel=ranks)
    cuts = sorted(data.draw(st.sets(st.integers(1, plan.num_bytes // 4 - 1), max_size=20)))
    bounds = [0, *(4 * cut for cut in cuts), plan.num_bytes]
    items: dict[str, list[int]] = {}
    end = 0
    for start, stop in pairwise(bounds):
        for span in plan.spans(start, stop):
            assert start + span.start >= end
            end = start + span.start + span.num_items * plan.item_bytes
            assert end <= stop
            found = items.setdefault(span.piece.source, [])
            found += range(span.first_item, span.first_item + span.num_items)
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            assert items[piece.source] == list(range(piece.num_items)), piece.source


def test_tensors_lie_at_pages_in_forward_order() -> None:
    config = _config()
    plan = PartitionPlan(config, "bfloat16", rank=1, tensor_parallel=2)
    assert [entry.name for entry in plan.entries] == [tensor.name for tensor in fused_tensors(config)]
    assert all(entry.offset % 4096 == 0 for entry in plan.entries)
    assert plan.num_bytes % 4096 == 0
    shapes = {entry.name: entry.shape for entry in plan.entries}
    # Heads of 4: four of eight for queries, one of two for keys and values.
    assert shapes["layers.0.qkv.weight"] == (24, 32)
    assert shapes["layers.0.qkv.bias"] == (24,)
    assert shapes["layers.0.attention_output.weight"] == (32, 16)
    assert shapes["layers.0.gate_up.weight"] == (48, 32)
    assert shapes["layers.0.down.weight"] == (32, 24)
    # The first rank has one row more.
    assert shapes["embedding"] == (50, 32)


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (_config(), 0, "tensor_parallel is 0"),
        (_config(), 3, "8 attention heads cannot be shared out to 3 ranks"),
        (_config(inner=50), 4, "50 feed-forward features cannot be shared out to 4 ranks"),
        (_config(heads=12, kv_heads=3), 2, "3 key-value heads can neither be shared out to 2 ranks nor replicated"),
        (_config(vocab=9), 8, "a vocabulary of 9 leaves nothing to the last of 8 ranks"),
    ],
)
def test_sizes_that_cannot_be_shared_are_refused(config: ModelConfig, ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shares(config, ranks)
