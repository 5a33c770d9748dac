"""Object stores, real and misbehaving: the right bytes, or the error that says what happened, within its deadline."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import obstore
import pytest
from obstore.store import S3Store

from coldstart.chunk_fetch import FetchSettings
from coldstart.download import DownloadSettings, fetch_checkpoint
from coldstart.local_tier import LocalTier
from coldstart.object_requests import StoreSettings
from coldstart.object_source import STREAM_BYTES, ObjectFolder
from coldstart.remote_retry import RetrySettings
from coldstart.through import Through, open_through
from coldstart.tier_files import LiveTierFiles
from contracts.errors import Cancelled, ConfigError, CorruptCheckpoint, LoadError
from rpc.clock import LiveBlockingClock, LiveClock
from tests.support.converted_folders import converted_folder
from tests.support.proxy import Damage, Proxy, proxy
from tests.support.range_server import Act, RangeServer, Served, range_server

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from coldstart.remote import RemoteFile

DATA = random.Random(1).randbytes(3 << 20)
#: Every read below ends within this, right or not; slow machines included.
DEADLINE_S = 8.0

SETTINGS = StoreSettings(
    piece_bytes=1 << 20,
    stall_timeout_s=0.5,
    request_timeout_s=3.0,
    connect_timeout_s=1.0,
    read_deadline_s=4.0,
    whole_file_bytes=4 << 20,
    retry=RetrySettings(max_fruitless=4, first_backoff_s=0.01, throttled_backoff_s=0.02, max_backoff_s=0.1),
)


@contextmanager
def folder(url: str, settings: StoreSettings = SETTINGS) -> Generator[ObjectFolder]:
    opened = ObjectFolder(url, clock=LiveClock(), rng=random.Random(0), settings=settings)
    try:
        yield opened
    finally:
        opened.close()


def looked_at(remote: ObjectFolder, name: str) -> RemoteFile:
    file = remote.look(name)
    assert file is not None
    return file


def read_all(remote: ObjectFolder, name: str = "w.bin") -> bytes:
    source = remote.open(looked_at(remote, name))
    data = bytearray(source.num_bytes)
    begun_s = time.monotonic()
    try:
        source.read_into(0, data)
    finally:
        took_s = time.monotonic() - begun_s
        source.close()
    assert took_s < DEADLINE_S
    return bytes(data)


@pytest.fixture
def web() -> Iterator[RangeServer]:
    with range_server({"w.bin": DATA}) as server:
        yield server


# --- a server that behaves, and one that seldom does ------------------------------------------------------


def test_pieces_are_fetched_side_by_side_and_no_byte_twice(web: RangeServer) -> None:
    with folder(web.url) as remote:
        assert read_all(remote) == DATA
    mib = 1 << 20
    assert sorted(web.asked) == [("w.bin", (start * mib, (start + 1) * mib)) for start in range(3)]
    assert web.sent_bytes == len(DATA)


def test_any_range_is_what_it_says(web: RangeServer) -> None:
    rng = random.Random(2)
    with folder(web.url) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        for _ in range(20):
            start = rng.randrange(len(DATA))
            data = bytearray(rng.randrange(min(len(DATA) - start, 300_000)))
            source.read_into(start, data)
            assert data == DATA[start : start + len(data)]
        with pytest.raises(LoadError, match="has 3145728 bytes"):
            source.read_into(len(DATA) - 1, bytearray(2))


@pytest.mark.parametrize(
    "script",
    [
        [Act.TRUNCATE],
        [Act.STALL],
        [Act.SHORT],
        [Act.LONG],
        [Act.RESET, Act.RESET],
        [Act.OTHER_RANGE],
        [Act.STATUS_500],
        [Act.STATUS_503, Act.STATUS_503],
        [Act.STATUS_429, Act.STATUS_429, Act.STATUS_429],
        [Act.TRUNCATE, Act.STATUS_503, Act.STALL, Act.RESET, Act.SHORT, Act.OTHER_RANGE, Act.STATUS_429],
    ],
    ids=lambda script: "+".join(act.name.lower() for act in script),
)
def test_what_passes_is_asked_again(web: RangeServer, script: list[Act]) -> None:
    with folder(web.url) as remote:
        looked_at(remote, "w.bin")
        web.script += script
        assert read_all(remote) == DATA
    assert not web.script


def test_a_broken_stream_goes_on_where_it_broke(web: RangeServer) -> None:
    web.script += [Act.TRUNCATE] * 3
    with folder(web.url) as remote:
        assert read_all(remote) == DATA
    # Half, half of the rest and the rest of some; what came is not fetched again but for the end of a stream.
    assert len(web.asked) == 6
    assert len(DATA) <= web.sent_bytes < len(DATA) + 3 * STREAM_BYTES


def test_a_file_that_always_breaks_is_read_as_long_as_bytes_come(web: RangeServer) -> None:
    web.script += [Act.TRUNCATE] * 9
    with folder(web.url, replace(SETTINGS, piece_bytes=4 << 20)) as remote:
        # More breaks in one piece than are borne without a byte.
        assert SETTINGS.retry.max_fruitless < 5
        assert read_all(remote) == DATA
    assert not web.script


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (Act.STATUS_404, "it is gone"),
        (Act.STATUS_403, "denied access"),
        (Act.STATUS_412, "was changed since it was opened"),
        (Act.OTHER_TAG, "was changed since it was opened"),
        (Act.STATUS_429, "asks to be asked less"),
        (Act.STATUS_503, "asks to be asked less"),
        (Act.STATUS_500, "it failed"),
        (Act.RESET, "the connection broke"),
        (Act.OTHER_RANGE, "another range than was asked for"),
    ],
)
def test_what_does_not_pass_is_named(web: RangeServer, act: Act, says: str) -> None:
    with folder(web.url) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        # In the middle of the file.
        web.script += [Act.SERVE]
        web.then = act
        begun_s = time.monotonic()
        with pytest.raises(LoadError, match=says) as failed:
            source.read_into(0, bytearray(len(DATA)))
        assert time.monotonic() - begun_s < DEADLINE_S
        assert "w.bin" in failed.value.message


def test_a_server_that_never_answers_ends_with_the_reads_deadline(web: RangeServer) -> None:
    settings = replace(SETTINGS, stall_timeout_s=0.2, read_deadline_s=1.0, retry=RetrySettings(max_fruitless=100))
    with folder(web.url, settings) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        web.files["w.bin"] = Served(b"")
        web.then = Act.STALL
        with pytest.raises(LoadError):
            source.read_into(0, bytearray(1000))


def test_one_content_is_read_or_none(web: RangeServer) -> None:
    with folder(web.url) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        source.read_into(0, bytearray(100))
        assert web.insisted == ['"1"']
        web.files["w.bin"] = Served(DATA[::-1], '"2"')
        with pytest.raises(LoadError, match="was changed since it was opened"):
            source.read_into(100, bytearray(100))


def test_a_weak_tag_is_compared_here(web: RangeServer) -> None:
    web.files["w.bin"].tag = 'W/"1"'
    with folder(web.url) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        data = bytearray(100)
        source.read_into(0, data)
        assert data == DATA[:100]
        # By the standard it would never match.
        assert web.insisted == [None]
        web.files["w.bin"].tag = 'W/"2"'
        with pytest.raises(LoadError, match="was changed"):
            source.read_into(0, data)


def test_a_server_without_ranges_is_read_whole_once(web: RangeServer) -> None:
    web.then = Act.WHOLE
    with folder(web.url) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        for start in (5, 2_000_000, 0):
            data = bytearray(1000)
            source.read_into(start, data)
            assert data == DATA[start : start + 1000]
    assert [bounds for _, bounds in web.asked].count(None) == 1


def test_a_large_file_without_ranges_is_refused(web: RangeServer) -> None:
    web.then = Act.WHOLE
    with folder(web.url, replace(SETTINGS, whole_file_bytes=1 << 20)) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        with pytest.raises(LoadError, match="must support range requests"):
            source.read_into(0, bytearray(100))
    assert web.asked == [("w.bin", (0, 100))]


def test_closing_ends_a_read_that_waits(web: RangeServer) -> None:
    with folder(web.url, replace(SETTINGS, stall_timeout_s=60.0, request_timeout_s=60.0)) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        web.then = Act.STALL
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(source.read_into, 0, bytearray(1000))
            _until(lambda: bool(web.asked))
            remote.close()
            with pytest.raises(Cancelled):
                reading.result(DEADLINE_S)


def test_bytes_in_flight_are_bounded(web: RangeServer) -> None:
    settings = replace(SETTINGS, piece_bytes=1 << 18, max_in_flight_bytes=1 << 19, stall_timeout_s=60.0)
    with folder(web.url, replace(settings, request_timeout_s=60.0, read_deadline_s=60.0)) as remote:
        source = remote.open(looked_at(remote, "w.bin"))
        web.then = Act.STALL
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(source.read_into, 0, bytearray(len(DATA)))
            # Twelve pieces, of which two may be asked for: no answer has been whole yet.
            _until(lambda: web.sent_bytes == 1 << 18)
            assert len(web.asked) == 2
            remote.close()
            with pytest.raises(Cancelled):
                reading.result(DEADLINE_S)


def test_cut_connections_cost_at_most_what_was_under_way(web: RangeServer) -> None:
    with between(web.port, Damage(cuts_per_mib=4.0)) as proxied:
        with folder(f"http://{proxied.address}/models/m", replace(SETTINGS, read_deadline_s=60.0)) as remote:
            file = None
            while file is None:
                file = remote.look("w.bin")
            data = bytearray(len(DATA))
            remote.open(file).read_into(0, data)
        assert data == DATA
        assert proxied.done["cuts_per_mib"] > 3


def test_a_slow_store_is_slow_and_no_error(web: RangeServer) -> None:
    with between(web.port, Damage(delay_s=0.005)) as proxied, folder(f"http://{proxied.address}/models/m") as remote:
        assert read_all(remote) == DATA


def test_a_port_where_nobody_listens(web: RangeServer) -> None:
    with folder("http://127.0.0.1:1/m") as remote, pytest.raises(LoadError, match="the connection broke"):
        remote.look("w.bin")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/m", "no object store"),
        ("/a/folder", "no object store"),
        ("https://user:hunter2@host/m", "credentials go into the environment"),
        ("https://host/m?sig=hunter2", "has no query"),
        ("s3:///m", "names no bucket"),
    ],
)
def test_addresses_that_cannot_be(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as failed:
        ObjectFolder(url, clock=LiveClock(), rng=random.Random(0))
    assert "hunter2" not in failed.value.message


def test_secrets_are_in_no_error(monkeypatch: pytest.MonkeyPatch, web: RangeServer) -> None:
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2020&sig=hunter2secret")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    web.then = Act.STATUS_500
    settings = replace(SETTINGS, endpoint=f"http://127.0.0.1:{web.port}/account")
    with folder("az://models/m", settings) as remote, pytest.raises(LoadError) as failed:
        remote.files()
    assert "hunter2" not in failed.value.message + repr(remote)
    assert failed.value.__cause__ is None
    assert failed.value.__suppress_context__


# --- whole checkpoints over the web ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_comes_through_a_bad_network(seed: int, tmp_path: Path) -> None:
    files = converted_folder(seed, num_chunks=40, chunk_bytes=16384)
    tier = _tier(tmp_path)
    with range_server(files) as web, between(web.port, Damage(cuts_per_mib=3.0)) as proxied:
        settings = replace(SETTINGS, read_deadline_s=60.0)
        with (
            folder(f"http://{proxied.address}/models/m", settings) as remote,
            fetch_checkpoint(remote, tier, settings=_DOWNLOAD) as entry,
        ):
            assert _contents(entry.path) == files


@pytest.mark.parametrize("act", [Act.STATUS_404, Act.STATUS_500, Act.RESET, Act.OTHER_TAG, Act.STATUS_429])
def test_a_download_that_fails_leaves_nothing_to_be_found_and_goes_on_later(act: Act, tmp_path: Path) -> None:
    files = converted_folder(7, num_chunks=40, chunk_bytes=16384)
    tier = _tier(tmp_path)
    with range_server(files) as web, folder(web.url) as remote:
        # The index, and some of the chunks.
        web.script += [Act.SERVE] * 12
        web.then = act
        with pytest.raises(LoadError):
            fetch_checkpoint(remote, tier, settings=_DOWNLOAD)
        assert tier.manifests() == []
        before, web.then = web.sent_bytes, Act.SERVE
        with fetch_checkpoint(remote, tier, settings=_DOWNLOAD) as entry:
            assert _contents(entry.path) == files
        if act not in (Act.STATUS_404, Act.OTHER_TAG):
            assert web.sent_bytes - before < sum(map(len, files.values()))


def test_wrong_bytes_are_asked_for_once_more_and_never_kept(tmp_path: Path) -> None:
    files = converted_folder(8, num_chunks=10)
    weights = "weights-00001-of-00001.tandem"
    wrong = bytearray(files[weights])
    wrong[5 * 4096 + 7] ^= 4
    tier = _tier(tmp_path)
    with range_server({**files, weights: bytes(wrong)}) as web, folder(web.url) as remote:
        with pytest.raises(CorruptCheckpoint, match=r"weights-00001.*chunk 5 .*twice.*embedding"):
            fetch_checkpoint(remote, tier, settings=_DOWNLOAD)
        assert tier.manifests() == []
        assert tier.used_bytes() == 0
        web.files[weights] = Served(files[weights], '"2"')
        with fetch_checkpoint(remote, tier, settings=_DOWNLOAD) as entry:
            assert _contents(entry.path) == files


def test_a_checkpoint_is_read_while_the_tier_fills(tmp_path: Path) -> None:
    files = converted_folder(9, num_chunks=40, tensor_parallel=2)
    tier = _tier(tmp_path)
    with range_server(files) as web, folder(web.url) as remote:
        through = open_through(remote, tier)
        assert isinstance(through, Through)
        source, held = through.sources[0], bytearray(40 * 4096)
        for start in range(0, len(held), 4096):
            source.read_into(start, memoryview(held)[start : start + 4096])
        assert held == files["weights-00001-of-00002.tandem"]
        entry = through.finish({0: held})
        assert entry is not None
        with entry:
            assert _contents(entry.path) == files
        fetched = [bounds for name, bounds in web.asked if name == "weights-00001-of-00002.tandem"]
    assert len(fetched) == len(set(fetched)) == 40


# --- a real S3 server ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Endpoint of a moto server with a bucket `models`."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer  # pyright: ignore[reportMissingTypeStubs]

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/models", method="PUT")).close()
    yield endpoint
    server.stop()


@pytest.fixture
def s3_environment(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    return s3


def test_a_checkpoint_comes_from_s3(s3_environment: str, tmp_path: Path) -> None:
    files = converted_folder(3, num_chunks=64, tensor_parallel=2, chunk_bytes=65536)
    _upload(s3_environment, "team/llama", {**files, "sub/other.bin": b"not of the model"})
    tier = _tier(tmp_path)
    with folder("s3://models/team/llama") as remote:
        assert {file.name for file in remote.files()} == set(files)
        with fetch_checkpoint(remote, tier, settings=_DOWNLOAD) as entry:
            assert _contents(entry.path) == files
        with fetch_checkpoint(remote, tier, settings=_DOWNLOAD) as again:
            assert again.path == entry.path


def test_an_endpoint_can_be_told(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _upload(s3_environment, "told", {"w.bin": DATA[:5000]})
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with folder("s3://models/told", replace(SETTINGS, endpoint=s3_environment)) as remote:
        assert read_all(remote) == DATA[:5000]


def test_s3_says_what_is_wrong(s3_environment: str) -> None:
    _upload(s3_environment, "wrong", {"w.bin": DATA[:5000]})
    with folder("s3://models/wrong") as remote:
        assert remote.look("no.bin") is None
        source = remote.open(looked_at(remote, "w.bin"))
        _upload(s3_environment, "wrong", {"w.bin": DATA[1000:6000]})
        with pytest.raises(LoadError, match="was changed since it was opened"):
            source.read_into(0, bytearray(5000))
        source = remote.open(looked_at(remote, "w.bin"))
        obstore.delete(S3Store.from_url("s3://models/wrong", client_options={"allow_http": True}), "w.bin")
        with pytest.raises(LoadError, match="it is gone") as failed:
            source.read_into(0, bytearray(5000))
        assert "hunter2" not in failed.value.message
    with folder("s3://no-such-bucket/m") as remote, pytest.raises(LoadError, match="the folder: it is gone"):
        remote.files()


def test_s3_over_a_bad_network(s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = converted_folder(4, num_chunks=16, chunk_bytes=65536)
    _upload(s3_environment, "bad", files)
    with between(int(s3_environment.rpartition(":")[2]), Damage(cuts_per_mib=3.0)) as proxied:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxied.address}")
        with (
            folder("s3://models/bad", replace(SETTINGS, read_deadline_s=60.0)) as remote,
            fetch_checkpoint(remote, _tier(tmp_path), settings=_DOWNLOAD) as entry,
        ):
            assert _contents(entry.path) == files


_DOWNLOAD = DownloadSettings(fetch=FetchSettings(num_connections=2, span_bytes=1 << 16), wait_s=10.0)


def _tier(root: Path) -> LocalTier:
    return LocalTier(root / "tier", capacity_bytes=1 << 30, files=LiveTierFiles(), clock=LiveBlockingClock())


def _contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def _upload(endpoint: str, prefix: str, files: dict[str, bytes]) -> None:
    store = S3Store.from_url(f"s3://models/{prefix}", endpoint=endpoint, client_options={"allow_http": True})
    for name, data in files.items():
        obstore.put(store, name, data)


def _until(is_so: object) -> None:
    assert callable(is_so)
    until_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.005)


@contextmanager
def between(port: int, damage: Damage) -> Generator[Proxy]:
    """A proxy on a loop in a thread of its own: reads of a source block."""
    started: list[Proxy] = []
    is_up, end = threading.Event(), threading.Event()

    async def serve() -> None:
        async with proxy("127.0.0.1", port, random.Random(5)) as made:
            made.damage = damage
            started.append(made)
            is_up.set()
            await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_up.wait(DEADLINE_S)
    try:
        yield started[0]
    finally:
        end.set()
        thread.join()
