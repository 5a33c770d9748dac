"""A process that fetches one checkpoint from a web server into a disk tier: `python -m tests.support.tier_process
URL TIER WAIT_S`. Prints "begun" when its first bytes came, and at the end the folder or the error's code."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from coldstart.chunk_fetch import FetchSettings
from coldstart.download import DownloadSettings, fetch_checkpoint
from coldstart.local_tier import LocalTier
from coldstart.object_source import ObjectFolder
from coldstart.tier_files import LiveTierFiles
from contracts.errors import TandemError
from rpc.clock import LiveBlockingClock, LiveClock


def main() -> None:
    url, root, wait_s = sys.argv[1:]
    tier = LocalTier(Path(root), capacity_bytes=1 << 30, files=LiveTierFiles(), clock=LiveBlockingClock())
    remote = ObjectFolder(url, clock=LiveClock(), rng=random.Random(0))
    told = False

    def progress(_: int, __: int) -> None:
        nonlocal told
        if not told:
            told = True
            print("begun", flush=True)

    how = DownloadSettings(fetch=FetchSettings(num_connections=2, span_bytes=1 << 16), wait_s=float(wait_s))
    try:
        with fetch_checkpoint(remote, tier, settings=how, progress=progress) as entry:
            print(entry.path, flush=True)
    except TandemError as error:
        print(error.code, flush=True)
    finally:
        remote.close()


if __name__ == "__main__":
    main()
