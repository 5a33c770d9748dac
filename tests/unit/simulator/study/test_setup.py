"""From flags and cluster files to what is simulated."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from contracts.errors import ConfigError, TandemError
from contracts.latency import StepWork
from contracts.latency_models import DISTSERVE_OPT, CostCurve, FittedLatency
from contracts.profile import FitErrors, LatencyProfile, ServingOverheads
from contracts.roofline import DEVICES, MODELS, kv_blocks_that_fit
from contracts.transfer_models import LinkTransfer
from simulator.heap.study import simulate
from simulator.study.flags import ClusterFlags, LatencyFlags, PolicyFlags
from simulator.study.setup import build_setup, parse_workers
from tests.support.layout import ROOT
from tests.support.profiles import PROFILE, save_to
from workload import SloClass, WorkloadRequest

DISTSERVE = LatencyFlags(latency="distserve:opt-13b-tp1")


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8P8D", {"prefill": 8, "decode": 8}),
        ("4P4D2M", {"prefill": 4, "decode": 4, "mixed": 2}),
        ("2D1P", {"decode": 2, "prefill": 1}),
        ("16M", {"mixed": 16}),
        ("1P1M", {"prefill": 1, "mixed": 1}),
    ],
)
def test_workers_by_role(text: str, counts: dict[str, int]) -> None:
    assert parse_workers(text) == counts


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("8", "write counts and roles, such as 8P8D"),
        ("8p8d", "write counts and roles"),
        ("P8D8", "write counts and roles"),
        ("", "write counts and roles"),
        ("8P2P8D", "P stands twice"),
        ("0P8D", "0P must be between 1 and 100,000"),
        ("8P200000D", "200000D must be between"),
        ("8P", r"without D \(decode\) or M"),
        ("8D", r"without P \(prefill\) or M"),
    ],
)
def test_workers_that_make_no_cluster(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=f"--workers {text}: .*{what}"):
        parse_workers(text)


def test_without_anything_it_is_one_of_each_with_all_the_memory_of_a_device() -> None:
    setup = build_setup(ClusterFlags(), LatencyFlags())
    prefill, decode = setup.spec.groups
    assert (prefill.name, prefill.role, prefill.count) == ("prefill", "prefill", 1)
    assert (decode.name, decode.role, decode.count) == ("decode", "decode", 1)
    fits = kv_blocks_that_fit(MODELS["llama-3-8b"], DEVICES["h100-sxm"], block_tokens=16)
    assert prefill.num_blocks == decode.num_blocks == fits
    assert (prefill.budget.max_tokens, prefill.budget.max_sequences) == (512, 64)
    assert "roofline of llama-3-8b on 1 x h100-sxm" in setup.costs.text
    assert "not fitted to an engine" in setup.warnings[0]


def test_a_cluster_file_gives_pools_memory_and_budgets(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "model: llama-3-8b\nblock_tokens: 32\nmax_model_len: 5000\n"
        "pools:\n"
        "  - {name: readers, role: prefill, workers: 3, kv_memory: 8GiB, max_batch_tokens: 2048}\n"
        "  - {name: writers, role: decode, workers: 2, kv_blocks: 777}\n"
        "engine: {max_sequences: 200}\ngateway: {request_timeout_s: 30s}\ncoordinator: {heartbeat_interval_s: 200ms}\n"
    )
    spec = build_setup(ClusterFlags(config=file), LatencyFlags()).spec
    readers, writers = spec.groups
    assert (readers.name, readers.count, readers.num_blocks) == ("readers", 3, 8 * 2**30 // (131_072 * 32))
    assert (writers.name, writers.count, writers.num_blocks) == ("writers", 2, 777)
    assert (readers.budget.max_tokens, readers.budget.max_sequences) == (2048, 200)
    assert (writers.budget.max_tokens, writers.budget.max_sequences) == (512, 200)
    assert (spec.block_tokens, spec.max_context_tokens, spec.kv_token_bytes) == (32, 5000, 131_072)
    assert (spec.request_timeout_s, spec.heartbeat_interval_s) == (30.0, 0.2)


def test_workers_go_before_the_file_and_keep_the_pools_of_a_role(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "pools:\n"
        "  - {name: readers, role: prefill, workers: 3, kv_blocks: 50}\n"
        "  - {name: writers, role: decode, workers: 2, kv_blocks: 60}\n"
    )
    spec = build_setup(ClusterFlags(config=file, workers="300P5M"), DISTSERVE).spec
    assert [(group.name, group.role, group.count) for group in spec.groups] == [
        ("readers", "prefill", 300),
        ("mixed", "mixed", 5),
    ]
    assert spec.groups[0].num_blocks == 50
    assert spec.groups[1].num_blocks == build_setup(ClusterFlags(), DISTSERVE).spec.groups[0].num_blocks


def test_workers_cannot_say_which_of_two_pools(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("pools: [{name: a, role: mixed}, {name: b, role: mixed}]")
    with pytest.raises(ConfigError, match=r"--workers 2M: the file has several mixed pools \(a, b\)"):
        build_setup(ClusterFlags(config=file, workers="2M"), DISTSERVE)


def test_flags_go_before_the_file() -> None:
    flags = ClusterFlags(
        config=ROOT / "configs" / "2p2d.yaml",
        kv_blocks=1234,
        max_batch_tokens=99,
        max_sequences=7,
        link_bandwidth="25GB",
        link_latency_ms=2.0,
    )
    spec = build_setup(flags, DISTSERVE).spec
    assert [group.count for group in spec.groups] == [2, 2]
    assert {group.num_blocks for group in spec.groups} == {1234}
    assert {(group.budget.max_tokens, group.budget.max_sequences) for group in spec.groups} == {(99, 7)}
    assert spec.transfer == LinkTransfer(latency_s=0.002, bandwidth_bytes_s=25e9)


def test_the_published_fit_brings_its_model_and_devices() -> None:
    spec = build_setup(ClusterFlags(), LatencyFlags(latency="distserve:opt-66b-tp4")).spec
    assert spec.groups[0].latency == DISTSERVE_OPT["opt-66b-tp4"]
    assert spec.groups[0].num_devices == 4
    assert spec.num_devices == 8
    assert spec.kv_token_bytes == MODELS["opt-66b"].kv_token_bytes


def test_batches_beyond_a_fit_are_told() -> None:
    assert build_setup(ClusterFlags(max_sequences=94), DISTSERVE).warnings == ()
    (warning,) = build_setup(ClusterFlags(max_sequences=256), DISTSERVE).warnings
    assert warning == "latencies are fitted to batches of at most 94 sequences; steps of up to 256 are extrapolated"


def test_a_roofline_of_a_checkpoint_at_given_efficiencies(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_hidden_layers": 4,
                "hidden_size": 256,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "intermediate_size": 1024,
                "vocab_size": 1000,
                "dtype": "float32",
            }
        )
    )
    flags = LatencyFlags(model=str(tmp_path), device="a100-80g", compute_efficiency=0.5, step_overhead_ms=3.0)
    setup = build_setup(ClusterFlags(), flags)
    assert setup.spec.kv_token_bytes == 2 * 4 * 2 * 32 * 4
    assert setup.spec.groups[0].latency.step_s(StepWork(num_decodes=1, context_tokens=1)) > 0.003
    assert "at 50% of its compute" in setup.costs.text


def profile_file(path: Path) -> LatencyProfile:
    profile = msgspec.structs.replace(
        PROFILE,
        model="tiny",
        kv_token_bytes=512,
        block_tokens=8,
        max_context_tokens=640,
        hardware="this machine",
        latency=FittedLatency(
            prefill=CostCurve(floor_s=0.001, knots=(0, 100), knot_s=(0.0, 0.01)),
            pair_s=1e-9,
            decode=CostCurve.line(0.002, 1e-4),
            context_token_s=1e-7,
        ),
        step_overhead_s=0.0005,
        serving=None,
        transfer=LinkTransfer(latency_s=0.001, bandwidth_bytes_s=1e9, efficiency=0.5),
        errors=FitErrors(prefill=0.01, decode=0.02, mixed=0.03),
    )
    save_to(profile, path)
    return profile


def test_a_profile_brings_costs_memory_overhead_and_link(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    profile = profile_file(file)
    setup = build_setup(ClusterFlags(), LatencyFlags(profile=file))
    group = setup.spec.groups[0]
    assert group.latency == profile.latency
    assert group.num_blocks == 800 // 16
    assert setup.spec.between_steps_s == 0.0005
    assert setup.spec.max_context_tokens == 640
    assert setup.spec.transfer == profile.transfer
    assert setup.warnings == (
        "the profile does not say what serving adds to its engine: measure it without --no-serving",
    )
    faster = build_setup(ClusterFlags(link_bandwidth="4GB"), LatencyFlags(profile=file)).spec.transfer
    assert faster == LinkTransfer(latency_s=0.001, bandwidth_bytes_s=4e9)


@pytest.mark.parametrize(
    "added",
    [
        ServingOverheads(first_token_s=0.006, step_s=0.001, handoff_s=0.004),
        # Less than the messages of a study ordinarily take.
        ServingOverheads(first_token_s=0.0008, step_s=0.0, handoff_s=0.004),
        ServingOverheads(first_token_s=0.006, step_s=0.001, handoff_s=0.0003),
        ServingOverheads(first_token_s=0.0, step_s=0.0, handoff_s=0.0),
    ],
)
def test_a_request_alone_takes_what_the_measured_one_took(tmp_path: Path, added: ServingOverheads) -> None:
    save_to(msgspec.structs.replace(PROFILE, serving=added), tmp_path / "profile.json")
    setup = build_setup(ClusterFlags(workers="1P1D"), LatencyFlags(profile=tmp_path / "profile.json"))
    assert setup.warnings == ()
    answer = simulate(setup.spec, [WorkloadRequest(0.0, 100, 9)]).requests
    latency, transfer = PROFILE.latency, PROFILE.transfer
    assert transfer is not None
    steps_s = [latency.step_s(StepWork(num_decodes=1, context_tokens=100 + later)) for later in range(1, 9)]
    link_s = 112 * PROFILE.kv_token_bytes / transfer.bandwidth_bytes_s
    first_token_s = latency.step_s(StepWork(100, 5050.0, 1)) + added.first_token_s
    second_token_s = first_token_s + link_s + added.handoff_s + steps_s[0]
    assert answer.first_token_s[0] == pytest.approx(first_token_s)
    assert answer.second_token_s[0] == pytest.approx(second_token_s)
    assert answer.finished_s[0] == pytest.approx(second_token_s + sum(steps_s[1:]) + 7 * added.step_s)


def test_what_was_set_up_can_be_written_down(tmp_path: Path) -> None:
    profile_file(tmp_path / "profile.json")
    for flags in (LatencyFlags(), DISTSERVE, LatencyFlags(profile=tmp_path / "profile.json")):
        written = json.loads(msgspec.json.encode(build_setup(ClusterFlags(workers="2P3D"), flags).facts))
        assert [(group["name"], group["num_workers"]) for group in written["groups"]] == [("prefill", 2), ("decode", 3)]
        assert written["latency"]["source"] in ("roofline", "distserve", "profile")
        assert written["transfer"]["bandwidth_bytes_s"] > 0


@pytest.mark.parametrize(
    ("latency", "what"),
    [
        (LatencyFlags(model="lama-3-8b"), "--model lama-3-8b: .*did you mean 'llama-3-8b'"),
        (LatencyFlags(device="h100"), "--device h100: unknown; did you mean 'h100-sxm'"),
        (LatencyFlags(latency="distserve:opt-13b"), "--latency distserve:opt-13b: .*did you mean 'opt-13b-tp"),
        (LatencyFlags(latency="vidur:x"), "--latency vidur:x: unknown; write distserve:SETTING"),
        (LatencyFlags(tensor_parallel=3), "--tensor-parallel 3: 32 heads do not divide"),
        (LatencyFlags(tensor_parallel=0), "--tensor-parallel 0"),
        (LatencyFlags(model="llama-3-70b"), "--model llama-3-70b --device h100-sxm .*leave no room for KV"),
        (LatencyFlags(compute_efficiency=1.5), "--compute-efficiency.*must be in"),
        (LatencyFlags(model="opt-13b", latency="distserve:opt-13b-tp1"), "--model and --latency: .*one of them"),
        (LatencyFlags(latency="distserve:opt-13b-tp1", device="h200-sxm"), "--device: belongs to a roofline"),
        (LatencyFlags(profile=Path("missing.json")), "profile missing.json: cannot be read"),
    ],
)
def test_latencies_that_cannot_be(latency: LatencyFlags, what: str) -> None:
    with pytest.raises(TandemError, match=what):
        build_setup(ClusterFlags(), latency)


@pytest.mark.parametrize(
    ("cluster", "what"),
    [
        (ClusterFlags(config=ROOT / "configs" / "local.yaml"), "model 'demo' has no roofline: give --profile"),
        (ClusterFlags(config=Path("missing.yaml")), "missing.yaml: cannot be read"),
        (ClusterFlags(kv_blocks=0), "--kv-blocks 0: must be at least 1"),
        (ClusterFlags(max_batch_tokens=-5), "--max-batch-tokens -5: must be"),
        (ClusterFlags(max_sequences=0), "--max-sequences 0: must be"),
        (ClusterFlags(link_bandwidth="fast"), "--link-bandwidth: 'fast' is not a number"),
        (ClusterFlags(link_bandwidth="0GB"), "--link-bandwidth, --link-latency-ms: a link needs"),
        (ClusterFlags(link_latency_ms=-1.0), "--link-bandwidth, --link-latency-ms: a link needs"),
    ],
)
def test_clusters_that_cannot_be(cluster: ClusterFlags, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        build_setup(cluster, LatencyFlags())


def test_policies_come_from_the_file_and_flags_go_first(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "model: llama-3-8b\n"
        "coordinator: {dispatch: {policy: prefix_only, fetch_ratio: 3, replica_share: 2}, "
        "admission: {form: current, ttft_share: 0.8}}\n"
        "engine: {queue: {order: shortest, ageing_s: 5, saturation_tokens: 300}}\n"
        "gateway: {tenants: [{name: gold, api_keys: [key], weight: 3}]}"
    )
    slo = SloClass("chat", 1000.0, 50.0)
    spec = build_setup(ClusterFlags(config=file), LatencyFlags(), slos=[slo]).spec
    assert (spec.conductor.policy, spec.conductor.fetch_ratio, spec.conductor.replica_share) == (
        "prefix_only",
        3.0,
        2.0,
    )
    assert (spec.conductor.admission.form, spec.conductor.admission.ttft_share) == ("current", 0.8)
    assert (spec.slos, spec.max_output_tokens) == ((slo,), None)
    rules = spec.groups[0].prefill.queue
    assert (rules.order, rules.ageing_s, rules.tenant_weights) == ("shortest", 5.0, {"gold": 3.0})
    assert spec.settings(0).queue_order == "shortest"
    assert (spec.settings(0).block_tokens, spec.settings(512).block_tokens) == (16, 512)
    assert [group.budget.saturation_tokens for group in spec.groups] == [300, 300]
    assert [group.prefix_cache_tokens for group in spec.groups] == [0, 0]
    policy = PolicyFlags(dispatch="random", admission="none", prefix_cache=5000, max_output=100)
    setup = build_setup(ClusterFlags(config=file), LatencyFlags(), policy)
    assert (setup.spec.conductor.policy, setup.spec.conductor.admission.form) == ("random", "none")
    assert setup.spec.max_output_tokens == 100
    assert [group.prefix_cache_tokens for group in setup.spec.groups] == [5000, 5000]
    assert "dispatch random, queues shortest, prefix caches of 5,000 tokens" in setup.text


def test_nothing_is_refused_for_targets_unless_somebody_says_so() -> None:
    assert build_setup(ClusterFlags(), LatencyFlags()).spec.conductor.admission.form == "none"
    asked = build_setup(ClusterFlags(), LatencyFlags(), PolicyFlags(admission="predicted"))
    assert asked.spec.conductor.admission.form == "predicted"
    assert "dispatch ttft_min, admission by predicted load, queues fcfs" in asked.text


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        (PolicyFlags(prefix_cache=-1), "--prefix-cache -1: must not be negative"),
        (PolicyFlags(max_output=0), "--max-output 0: must be at least 1"),
    ],
)
def test_policies_that_cannot_be(policy: PolicyFlags, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        build_setup(ClusterFlags(), LatencyFlags(), policy)


def test_memory_that_holds_no_block_is_told(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("pools: [{name: all, role: mixed, kv_memory: 1MiB}]")
    with pytest.raises(ConfigError, match=r"pools\.all\.kv_memory: 1048576 bytes hold no block of 16 tokens"):
        build_setup(ClusterFlags(config=file), DISTSERVE)
