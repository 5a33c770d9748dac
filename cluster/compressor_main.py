"""The compressor: `python -m cluster.compressor_main`, started by the node agent for a copy of weights gone cold.

It tells what the codec does with some of the copy's chunks, and compresses it if it is told to: at the lowest priority,
since nobody waits for it. It reads sealed memory, and writes to memory that counts only once it has ended well.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from functools import partial

from cluster.child_main import tell
from cluster.launch import MAX_LAUNCH_BYTES, Failed, Shrunk, Tried, decode_compressor_launch, decode_go
from cluster.lifeline import die_with_parent
from cluster.telling import Teller
from coldstart.codec_trial import try_codec
from coldstart.codecs.registry import BEST
from coldstart.compressed import Compression, RawCopy, overhead_bytes
from coldstart.compressing import bound_bytes
from coldstart.pipeline import NUM_THREADS
from contracts.errors import LoadError, TandemError

_LOWEST_PRIORITY = 19


def main() -> int:
    try:
        launch = decode_compressor_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        die_with_parent(launch.parent_pid)
        memory = mmap.mmap(launch.source, 0, prot=mmap.PROT_READ)
        source = RawCopy(memory, launch.weight_bytes, launch.index_bytes, rank=launch.key.rank, name=launch.key.folder)
        num_threads = min(NUM_THREADS, len(os.sched_getaffinity(0)))
        # At the priority that a load has: this is how fast one would be.
        rates = try_codec(source, BEST, num_threads=num_threads, now_s=time.monotonic)
        beside_bytes = overhead_bytes(source.num_chunks, launch.index_bytes)
        tell(Tried(rates=rates, bound_bytes=bound_bytes(launch.weight_bytes, beside_bytes, source.chunk_bytes, rates)))
        line = sys.stdin.buffer.readline(MAX_LAUNCH_BYTES)
        if not line:
            return 0
        go = decode_go(line)
        os.nice(_LOWEST_PRIORITY)
        # The mapping goes with the process, which the agent waits for.
        into = mmap.mmap(launch.descriptor, go.num_bytes)
        teller = Teller()
        compression = Compression(source, into, BEST, num_threads=num_threads, progress=partial(teller, "compression"))
        tell(Shrunk(num_bytes=compression.run()))
    except TandemError as error:
        tell(Failed(error=error.code, message=error.message))
        return 1
    except (OSError, MemoryError, ValueError) as error:
        tell(Failed(error=LoadError.code, message=f"memory for compressed weights: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
