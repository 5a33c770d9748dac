"""Which codec a tier or a wire gets: the one with which a byte of KV is there the soonest.

What compresses better moves faster and is taken apart slower; which of them counts depends on the bandwidth (CacheGen,
Liu et al. 2024, section 5.3, in its simplest form: one level for all that passes).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import ConfigError
from kvstore.codecs.registry import RAW, make_codec
from kvstore.codecs.values import narrow_into

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.layout import BlockLayout

#: What a codec must at least save of the time without one: figures of a few milliseconds err by about as much.
LEAST_SAVING = 0.1

_SAMPLE_BLOCKS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecCosts:
    """Of one codec on this machine, one thread; seconds for each byte of a block as it is in memory."""

    name: str
    #: Size in memory over size encoded.
    ratio: float
    encode_s_per_byte: float
    decode_s_per_byte: float


@dataclass(frozen=True, slots=True)
class CodecChoice:
    name: str
    #: With the figures that decided, for people.
    reason: str
    #: How long a byte of KV takes with it, and whether that is sooner than to compute it again.
    read_s_per_byte: float
    beats_recompute: bool = True


def choose_codec(
    candidates: Sequence[CodecCosts],
    bandwidth_bytes_per_s: float,
    *,
    encodes_on_path: bool = False,
    recompute_s_per_byte: float | None = None,
) -> CodecChoice:
    """The candidate that is read the soonest; `raw` where none saves a tenth of its time.

    A read takes its bytes through the bandwidth, and then the decoder's time for them: on few cores the two do not
    overlap, as what decodes would otherwise compute. `encodes_on_path`: the reader waits for the encoder too (a wire; a
    disk is written behind). `recompute_s_per_byte`: what computing a byte of KV takes; only told in the answer. Raises
    ConfigError without `raw` among the candidates, or a bandwidth.
    """
    if not bandwidth_bytes_per_s > 0:
        raise ConfigError(f"a codec cannot be chosen for a bandwidth of {bandwidth_bytes_per_s} bytes/s")
    times_s = {
        costs.name: 1 / (costs.ratio * bandwidth_bytes_per_s)
        + costs.decode_s_per_byte
        + (costs.encode_s_per_byte if encodes_on_path else 0.0)
        for costs in candidates
    }
    if RAW.name not in times_s:
        raise ConfigError(f"a codec is chosen beside {RAW.name!r}; given are: {', '.join(times_s) or 'none'}")
    best = min(times_s, key=lambda name: (times_s[name], name != RAW.name))
    name = best if times_s[best] <= (1 - LEAST_SAVING) * times_s[RAW.name] else RAW.name
    beats = recompute_s_per_byte is None or times_s[name] < recompute_s_per_byte
    told = ", ".join(f"{each} {_ms_per_mib(time_s)}" for each, time_s in times_s.items())
    reason = f"{name}: at {bandwidth_bytes_per_s / 1e6:,.0f} MB/s 1 MiB of KV takes {told} ms"
    if recompute_s_per_byte is not None:
        reason += f"; computing it {_ms_per_mib(recompute_s_per_byte)} ms"
    return CodecChoice(name, reason, times_s[name], beats)


def measure_codec(name: str, layout: BlockLayout, timer_s: Callable[[], float], *, rounds: int = 3) -> CodecCosts:
    """Times a codec on made-up blocks: some milliseconds, the median of `rounds`.

    `timer_s` is a monotonic clock, best the thread's own (`time.thread_time`), which a busy machine changes little.
    Sizes of real KV differ a little from these.
    """
    codec = make_codec(name, layout)
    blocks = sample_blocks(layout, _SAMPLE_BLOCKS, random.Random(0))
    into = memoryview(bytearray(layout.block_bytes))
    encode_s: list[float] = []
    decode_s: list[float] = []
    num_bytes = 0
    # The first round also pays for what is made once.
    for round_ in range(rounds + 1):
        start_s = timer_s()
        data = [codec.encode(block) for block in blocks]
        encoded_s = timer_s()
        for one in data:
            codec.decode(one, into)
        decoded_s = timer_s()
        num_bytes = sum(map(len, data))
        if round_:
            encode_s.append(encoded_s - start_s)
            decode_s.append(decoded_s - encoded_s)
    in_memory = layout.block_bytes * len(blocks)
    return CodecCosts(
        name=name,
        ratio=in_memory / num_bytes,
        encode_s_per_byte=median(encode_s) / in_memory,
        decode_s_per_byte=median(decode_s) / in_memory,
    )


def sample_blocks(layout: BlockLayout, num_blocks: int, rng: random.Random) -> list[memoryview]:
    """Blocks that look like KV to a codec: normal numbers; each channel of the keys has its mean and width."""
    draw = np.random.default_rng(rng.getrandbits(63))
    heads, layers, _, _, head_dim = layout.shape
    blocks: list[memoryview] = []
    for _ in range(num_blocks):
        values = draw.standard_normal(layout.shape, np.float32)
        channels = (heads, layers, 1, head_dim)
        values[:, :, 0] *= draw.lognormal(0.0, 0.5, channels).astype(np.float32)
        values[:, :, 0] += 2 * draw.standard_normal(channels, np.float32)
        block = memoryview(bytearray(layout.block_bytes))
        narrow_into(values, block, layout)
        blocks.append(block)
    return blocks


def _ms_per_mib(s_per_byte: float) -> str:
    return f"{1e3 * 2**20 * s_per_byte:.3g}"
