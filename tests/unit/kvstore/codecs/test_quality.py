"""What a trained model still knows after its KV went through a codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.kv_codecs import BATCH, TEXT_TOKENS, Codec, Quality, Stored, demo_bench, measure_recall
from engine.demo.evaluate import held_out_probes
from kvstore.codecs import DEFAULT_WINDOW_TOKENS, make_codec

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Blank:
    """Loses everything."""

    def encode(self, block: memoryview) -> bytes:
        return b"\0"

    def decode(self, data: bytes, into: memoryview) -> None:
        into[:] = bytes(len(into))


def test_int4_recalls_what_exact_kv_does_at_a_third_of_the_size() -> None:
    """Facts that stand in the stored blocks: with these lost nothing is recalled."""
    bench, demo = demo_bench(BATCH, TEXT_TOKENS)
    codecs: dict[str, Codec] = {
        "raw": make_codec("raw", bench.layout),
        "int4": make_codec("int4", bench.layout),
        "blank": Blank(),
    }
    found = {name: Quality() for name in codecs}
    stored = {name: Stored() for name in codecs}
    probes = held_out_probes(demo, (100, 200), BATCH)
    measure_recall(bench, demo, probes, codecs, found, stored, DEFAULT_WINDOW_TOKENS)
    assert found["raw"].right >= 0.96 * BATCH
    assert found["int4"].right >= found["raw"].right - 1
    assert found["int4"].same >= 0.9 * BATCH
    assert found["blank"].right <= 0.3 * BATCH, "the stored blocks do not matter here: nothing was shown"
    assert stored["int4"].ratio(bench.layout) >= 3
