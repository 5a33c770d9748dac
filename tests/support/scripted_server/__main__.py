"""The scripted server as a command. Stops on SIGINT and SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal

import uvloop

from tests.support.scripted_server import READY, Behaviour, Fault, FaultRule, serving
from tests.support.scripted_server.script import REFUSABLE


async def serve(behaviour: Behaviour, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(behaviour, port=port) as server:
        # The log grows to tens of thousands of objects, which would be looked through while a chunk is due. What goes
        # away here goes without the collector: no cycles are left behind.
        gc.freeze()
        gc.disable()
        print(f"{READY}{server.base_url}", flush=True)
        await stop.wait()


def parse() -> argparse.Namespace:
    standard = Behaviour()
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.scripted_server",
        description="An OpenAI-compatible server with known delays, which does what a script says.",
        epilog=f"Faults: {', '.join(Fault)}.",
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="on 127.0.0.1; 0: any free one")
    add("--core", type=int, help="runs on this core alone")
    add("--model", default=standard.model)
    add("--ttft-ms", type=float, default=standard.ttft_ms, help="from the start of service to the first token")
    add("--itl-ms", type=float, default=standard.itl_ms, help="from chunk to chunk")
    add("--tokens-per-chunk", type=int, default=standard.tokens_per_chunk)
    add("--max-running", type=int, help="requests in service at a time; others wait")
    add("--natural-tokens", type=int, help="where answers end by themselves")
    add("--max-model-len", type=int, default=standard.max_model_len)
    add("--chat-overhead-tokens", type=int, default=0, help="prompt tokens that the chat template adds")
    add("--refuse", choices=REFUSABLE, action="append", default=[], help="answers 400 to this request field")
    add("--idle-close-ms", type=float, help="closes kept connections after so long without a request")
    add("--retry-after-s", type=int, default=standard.retry_after_s)
    add("--fault", type=FaultRule.parse, action="append", default=[], help="NAME=SHARE or NAME@3,5-9")
    add("--seed", type=int, default=0, help="of the draws of faults by share")
    add("--max-log-entries", type=int, default=standard.max_log_entries)
    return parser.parse_args()


def main() -> None:
    given = vars(parse())
    port, core = given.pop("port"), given.pop("core")
    if core is not None:
        os.sched_setaffinity(0, {core})
    refused, faults = frozenset(given.pop("refuse")), tuple(given.pop("fault"))
    uvloop.run(serve(Behaviour(**given, refused_fields=refused, faults=faults), port))


if __name__ == "__main__":
    main()
