"""Runs of `tandem loadtest` as a user sees them, and the scripted server's log beside them."""

from __future__ import annotations

import csv
import json
import urllib.request
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

Row = dict[str, str]
Entry = dict[str, Any]


def server_log(base_url: str) -> list[Entry]:
    with urllib.request.urlopen(f"{base_url}/script/log") as response:
        log = json.load(response)
    assert log["num_forgotten"] == 0
    return cast("list[Entry]", log["requests"])


def read_json(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "report.json").read_text(encoding="utf-8")))


def read_csv(folder: Path) -> list[Row]:
    with (folder / "requests.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pairs(rows: Iterable[Row], entries: Iterable[Entry]) -> list[tuple[Row, Entry]]:
    """Each row of requests.csv with the server's entry: the same lengths, and the order of sending among these.

    Entries without a row are left out: the probe's. They came first. Raises KeyError where a row has no entry.
    """
    waiting: defaultdict[tuple[int, int], deque[Entry]] = defaultdict(deque)
    for entry in sorted(entries, key=lambda entry: entry["arrival_s"], reverse=True):
        waiting[entry["prompt_tokens"], entry["output_tokens"]].append(entry)
    found: list[tuple[Row, Entry]] = []
    for row in sorted(rows, key=lambda row: float(row["sent_s"]), reverse=True):
        lengths = int(row["prompt_tokens"]), int(row["output_tokens"])
        if not waiting[lengths]:
            raise KeyError(f"the server saw no request {row['index']} of {lengths}")
        found.append((row, waiting[lengths].popleft()))
    found.reverse()
    return found
