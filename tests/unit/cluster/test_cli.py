"""The command line: its flags, its errors, and what it never loads."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cluster.flags import ConfigFlags, flag_keys, load
from contracts.errors import ConfigError
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.commands import Tandem

#: The flags people know from vLLM and those of our own, and the keys they set.
KNOWN_FLAGS = {
    "--admission": "coordinator.admission.form",
    "--api-key": "gateway.api_keys",
    "--block-size": "block_tokens",
    "--default-slo-class": "default_slo_class",
    "--device": "pools.*.device",
    "--dispatch-policy": "coordinator.dispatch.policy",
    "--dtype": "dtype",
    "--host": "gateway.host",
    "--kv-cache-memory-bytes": "pools.*.kv_memory",
    "--log-dir": "log_dir",
    "--max-model-len": "max_model_len",
    "--max-num-batched-tokens": "engine.max_batch_tokens",
    "--max-num-seqs": "engine.max_sequences",
    "--model": "model",
    "--port": "gateway.port",
    "--served-model-name": "served_model_name",
    "--strict-fields": "gateway.strict_fields",
}

#: How a running cluster is found.
REACHED = {"--coordinator", "--state-file", "--token-file"}

OPTIONS = {
    "serve": {*KNOWN_FLAGS, "--config", "--set", "--no-strict-fields", "--state-file"},
    "demo": {*KNOWN_FLAGS, "--config", "--set", "--no-strict-fields"},
    "coordinator": {*KNOWN_FLAGS, "--config", "--set", "--no-strict-fields", "--cell", "--bind", "--token-file"},
    "gateway": {*KNOWN_FLAGS, "--config", "--set", "--no-strict-fields", "--cell", "--coordinator", "--token-file"},
    "agent": {
        *KNOWN_FLAGS,
        "--cell",
        "--config",
        "--set",
        "--no-strict-fields",
        "--coordinator",
        "--runtime-dir",
        "--bind",
        "--token-file",
    },
    "worker": {
        *KNOWN_FLAGS,
        "--cell",
        "--config",
        "--set",
        "--no-strict-fields",
        "--coordinator",
        "--pool",
        "--index",
        "--runtime-dir",
        "--bind",
        "--token-file",
    },
    "doctor": {
        *KNOWN_FLAGS,
        "--config",
        "--set",
        "--no-strict-fields",
        "--coordinator",
        "--state-file",
        "--token-file",
    },
    "profile": {
        *KNOWN_FLAGS,
        "--cell",
        "--config",
        "--set",
        "--no-strict-fields",
        "--max-context",
        "--no-serving",
        "--output",
        "--serving",
        "--threads",
    },
    "workers": {*REACHED, "--json", "--model"},
    "operations": {*REACHED, "--json", "--cancel", "--model"},
    "drain": {*REACHED, "--force", "--no-wait", "--undo", "--within"},
    "flip": {*REACHED, "--force", "--no-wait"},
    "restart": {*REACHED, "--force", "--no-wait", "--python", "--rolling", "--model"},
    "start": {*REACHED, "--no-wait", "--role"},
    "stop": {*REACHED, "--force", "--no-wait", "--within"},
}


def test_flags_are_named_as_people_know_them() -> None:
    assert dict(sorted(flag_keys().values())) == KNOWN_FLAGS


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_each_command_has_these_options(run_tandem: Tandem, command: str) -> None:
    shown = run_tandem(command, "--help")
    assert shown.status == 0
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown.stdout)) == OPTIONS[command]


def test_help_names_every_command(run_tandem: Tandem) -> None:
    shown = run_tandem("--help").stdout
    for command in ("serve", "demo", "config", "coordinator", "gateway", "worker", "doctor", "profile"):
        assert re.search(rf"^\W*{command} ", shown, re.MULTILINE), command


def test_config_show_says_where_values_came_from(run_tandem: Tandem) -> None:
    shown = run_tandem("config", "show", "--port", "9", "--api-key", "sk-hidden", TANDEM_DTYPE="float32")
    assert re.search(r"^gateway\.port +9 +--port$", shown.stdout, re.MULTILINE)
    assert re.search(r"^dtype +float32 +TANDEM_DTYPE$", shown.stdout, re.MULTILINE)
    assert re.search(r"^gateway\.host +127\.0\.0\.1 +default$", shown.stdout, re.MULTILINE)
    assert "sk-hidden" not in shown.stdout


def test_config_validate_names_what_is_wrong(run_tandem: Tandem, tmp_path: Path) -> None:
    good = run_tandem("config", "validate", "configs/local.yaml", "configs/2p2d.yaml")
    assert good.stdout == "configs/local.yaml: ok\nconfigs/2p2d.yaml: ok\n"
    bad = tmp_path / "bad.yaml"
    bad.write_text("gateway: {prot: 1}")
    refused = run_tandem("config", "validate", str(bad))
    assert refused.status == 2
    assert refused.stderr == f"tandem: {bad}: gateway.prot: unknown key; did you mean 'port'?\n"


def test_a_wrong_model_is_one_line_and_status_2(run_tandem: Tandem, tmp_path: Path) -> None:
    refused = run_tandem("serve", f"{tmp_path}/nothing", "--port", "0")
    assert refused.status == 2
    assert refused.stderr == f"tandem: model {tmp_path}/nothing: no such folder\n"


def test_processes_alone_need_the_token(run_tandem: Tandem) -> None:
    refused = run_tandem("coordinator")
    assert refused.status == 2
    assert refused.stderr == "tandem: no cluster token: set TANDEM_CLUSTER_TOKEN or give --token-file\n"


def test_neither_torch_nor_the_hub_client_is_loaded_to_read_the_configuration() -> None:
    program = (
        "import sys, cluster.cli\n"
        "from cluster.flags import load\n"
        "load(None, {})\n"
        "print(sorted({'torch', 'transformers', 'grpc', 'huggingface_hub', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=90
    )
    assert done.stdout.strip() == "[]"


def test_the_positional_model_is_the_model() -> None:
    loaded = load(None, {}, model="org/name")
    assert loaded.config.model == "org/name"
    assert next(str(row.source) for row in loaded.rows() if row.key == "model") == "MODEL"
    with pytest.raises(ConfigError, match="two models are named: a and --model b"):
        load(ConfigFlags(model="b"), {}, model="a")


def test_set_needs_a_value() -> None:
    with pytest.raises(ConfigError, match="--set gateway: write --set key=value"):
        load(ConfigFlags(set_=["gateway"]), {})
