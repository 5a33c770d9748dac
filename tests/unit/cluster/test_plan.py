"""From the configuration to launches."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.launch import QueueOptions, SnapshotOptions, decode_launch, decode_status, encode_line
from cluster.plan import Site, plan_launches, worker_environ
from contracts.config import ClusterConfig
from contracts.errors import ConfigError

SITE = Site(
    model_dir="/models/demo",
    model_name="demo",
    coordinator_address="127.0.0.1:1",
    cluster_token="tok",
    runtime_dir="/tmp/t",
    bind="127.0.0.1:0",
    parent_pid=1,
    allowed_cores=(0, 1, 2, 3),
)


def config(**keys: object) -> ClusterConfig:
    return ClusterConfig.model_validate(keys)


def test_workers_are_numbered_within_their_pool() -> None:
    pools = [{"name": "p", "role": "prefill", "workers": 2}, {"name": "d", "role": "decode"}]
    launches = plan_launches(config(pools=pools), SITE)
    assert [(launch.worker_id, launch.role) for launch in launches] == [
        ("p-0", "prefill"),
        ("p-1", "prefill"),
        ("d-0", "decode"),
    ]
    assert [launch.cores for launch in launches] == [(0, 1), (2,), (3,)]


def test_machines_that_share_pools_have_numbers_of_their_own() -> None:
    launches = plan_launches(config(first_worker=8, pools=[{"name": "m", "role": "mixed", "workers": 2}]), SITE)
    assert [launch.worker_id for launch in launches] == ["m-8", "m-9"]


def test_a_pool_overrides_the_engine_limits() -> None:
    pools = [
        {"name": "p", "role": "prefill", "max_batch_tokens": 2048},
        {"name": "d", "role": "decode", "max_sequences": 4, "kv_blocks": 100},
    ]
    engine = {"max_batch_tokens": 256, "max_sequences": 8}
    prefill, decode = plan_launches(config(pools=pools, engine=engine), SITE)
    assert (prefill.max_batch_tokens, prefill.max_sequences, prefill.num_blocks) == (2048, 8, None)
    assert (decode.max_batch_tokens, decode.max_sequences, decode.num_blocks) == (256, 4, 100)


@pytest.mark.parametrize(
    ("cores", "message"), [([3, 9], r"pools\.m\.cores: .* cores \[9\]"), ([], r"pools\.m\.cores: .*empty")]
)
def test_cores_that_are_not_ours_are_refused(cores: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_launches(config(pools=[{"name": "m", "role": "mixed", "cores": cores}]), SITE)


def test_a_launch_survives_the_pipe() -> None:
    for launch in plan_launches(ClusterConfig(), SITE):
        line = encode_line(launch)
        assert line.count(b"\n") == 1
        assert decode_launch(line) == launch


def test_a_bad_launch_is_refused_without_its_content() -> None:
    with pytest.raises(ConfigError) as caught:
        decode_launch(b'{"cluster_token": "hidden", "worker_id": 3}\n')
    assert "hidden" not in caught.value.message


@pytest.mark.parametrize("line", [b"", b"hello", b"{}", b'{"event": "other"}', b"\xff\xfe"])
def test_a_line_that_is_no_status_is_none(line: bytes) -> None:
    assert decode_status(line) is None


def test_threads_are_limited_before_any_library_is_loaded() -> None:
    environ = worker_environ({"PATH": "/bin", "OMP_NUM_THREADS": "64"}, 3)
    assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "3"
    assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environ["PATH"] == "/bin"


def test_the_prefix_cache_is_on_unless_it_is_switched_off() -> None:
    assert [launch.prefix_cache for launch in plan_launches(config(), SITE)] == [True, True]
    off = plan_launches(config(engine={"prefix_cache": False}), SITE)
    assert [launch.prefix_cache for launch in off] == [False, False]


def test_queue_settings_and_uneven_weights_reach_the_workers() -> None:
    assert [launch.queue for launch in plan_launches(config(), SITE)] == [QueueOptions()] * 2
    tenants = [
        {"name": "a", "api_keys": ["k1"], "weight": 2.5},
        {"name": "b", "api_keys": ["k2"]},
    ]
    queue = {"order": "shortest", "ageing_s": "2s", "fair": False, "saturation_tokens": 300, "tpot_chunks": False}
    launches = plan_launches(config(engine={"queue": queue}, gateway={"tenants": tenants}), SITE)
    for launch in launches:
        assert decode_launch(encode_line(launch)).queue == QueueOptions(
            order="shortest",
            ageing_s=2.0,
            fair=False,
            tenant_weights={"a": 2.5},
            saturation_tokens=300,
            tpot_chunks=False,
        )


def test_snapshots_are_off_unless_they_have_a_size_and_lie_beside_the_tier() -> None:
    assert all(launch.snapshot is None for launch in plan_launches(ClusterConfig(), SITE))
    weights = {"snapshot": "1GiB", "ssd": {"path": "/disk/weights"}}
    for launch in plan_launches(config(weights=weights), SITE):
        assert launch.snapshot == SnapshotOptions(folder="/disk/weights/snapshots", size_bytes=2**30)
    (launch, *_) = plan_launches(config(weights={"snapshot": 5}), SITE)
    assert launch.snapshot is not None
    assert launch.snapshot.folder == str(Path("~/.cache/tandem/weights/snapshots").expanduser())
