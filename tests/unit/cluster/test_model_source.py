"""Where the checkpoint comes from, and what is said when it cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cluster.model_source import resolve_model
from contracts.errors import ConfigError
from tests.support.fake_hub import FakeHub
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickled, never wanted",
    "modeling_custom.py": b"code, never wanted",
    "README.md": b"not needed",
}

#: Resolves a model and prints its folder, or the error, as JSON: the hub's client reads its settings once.
PROGRAM = """
import json, sys
from cluster.model_source import resolve_model
from contracts.errors import ConfigError
try:
    source = resolve_model(sys.argv[1], lambda line: print(line, file=sys.stderr))
    print(json.dumps({"folder": str(source.folder), "name": source.name}))
except ConfigError as error:
    print(json.dumps({"error": error.message}))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub("tiny/llama", FILES, gated="tiny/gated").serving() as hub:
        yield hub


def resolve_elsewhere(model: str, cache: Path, **environ: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model],
        cwd=ROOT,
        env={**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1", **environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"{}")
    return path


def error_of(model: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve_model(model, print)
    return caught.value.message


def test_a_folder_is_served_under_its_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "my-model", "config.json", "model.safetensors")
    source = resolve_model(str(folder), print)
    assert (source.folder, source.name) == (folder, "my-model")


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    empty = folder_with(tmp_path / "empty")
    assert error_of(str(empty)) == f"model folder {empty}: it has no config.json"
    bare = folder_with(tmp_path / "bare", "config.json", "pytorch_model.bin")
    assert error_of(str(bare)) == f"model folder {bare}: it has neither a *.safetensors file nor tandem-index.json"


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "this is a file; name the folder" in error_of(str(file))
    assert error_of(f"{tmp_path}/nothing") == f"model {tmp_path}/nothing: no such folder"
    assert error_of("./nothing") == "model ./nothing: no such folder"
    assert error_of("a/b/c") == "model a/b/c: no such folder"


def test_a_hub_id_is_fetched_once_and_only_what_is_read(hub: FakeHub, tmp_path: Path) -> None:
    answer = resolve_elsewhere("tiny/llama", tmp_path, HF_ENDPOINT=hub.url)
    assert answer["name"] == "tiny/llama"
    wanted = {"config.json", "model.safetensors", "tokenizer.json"}
    assert set(os.listdir(answer["folder"])) == set(hub.downloaded) == wanted
    again = resolve_elsewhere("tiny/llama", tmp_path, HF_ENDPOINT=hub.url)
    assert again == answer
    assert len(hub.downloaded) == len(wanted)
    offline = resolve_elsewhere("tiny/llama", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline == answer


def test_an_unknown_id_is_told_apart_from_a_gated_one(hub: FakeHub, tmp_path: Path) -> None:
    unknown = resolve_elsewhere("tiny/nothing", tmp_path, HF_ENDPOINT=hub.url)
    assert unknown["error"].startswith("model tiny/nothing: neither a folder here nor a model on the hub")
    gated = resolve_elsewhere("tiny/gated", tmp_path, HF_ENDPOINT=hub.url)
    assert gated["error"].startswith("model tiny/gated: access is restricted; accept its terms")


def test_a_hub_out_of_reach_is_told(tmp_path: Path) -> None:
    out_of_reach = "model tiny/llama: not in the local cache, and the hub cannot be reached"
    offline = resolve_elsewhere("tiny/llama", tmp_path, HF_HUB_OFFLINE="1")
    assert offline["error"].startswith(out_of_reach)
    refused = resolve_elsewhere("tiny/llama", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert refused["error"].startswith(out_of_reach)


def test_a_repository_without_safetensors_is_told(tmp_path: Path) -> None:
    with FakeHub("old/model", {"config.json": b"{}", "pytorch_model.bin": b"x"}, gated="-").serving() as hub:
        answer = resolve_elsewhere("old/model", tmp_path, HF_ENDPOINT=hub.url)
    assert answer["error"].endswith("it has neither a *.safetensors file nor tandem-index.json")
