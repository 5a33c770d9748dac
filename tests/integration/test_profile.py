"""`tandem profile` on a real engine: stores what it measured, or says that the fit is not good enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.latency import StepWork
from contracts.profile import MAX_DECODE_ERROR, load_profile
from tests.support.commands import tandem

if TYPE_CHECKING:
    from pathlib import Path

RANGE = ("--max-context", "256", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")


def test_a_profile_is_measured_shown_and_stored_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with tandem("profile", "demo", "--threads", "1", "--output", str(path), *RANGE) as command:
        status, output = command.wait()
    assert "held-out error: prefill " in output
    assert output.count("  held out") >= 6
    if status == 1:
        # A busy machine may spoil the measurement; then nothing is stored.
        assert "tandem: profile_refused: the fit is not stored: on held-out points the fit is off by" in output
        assert not path.exists()
        return
    assert status == 0, output
    assert f"stored in {path}" in output
    profile = load_profile(path)
    assert (profile.model, profile.threads, profile.block_tokens, profile.kv_token_bytes) == ("demo", 1, 16, 2048)
    assert profile.num_blocks == 2**29 // (16 * 2048)
    assert profile.max_context_tokens == 2048
    assert profile.errors.decode <= MAX_DECODE_ERROR
    assert 0 < profile.step_overhead_s < 1
    assert profile.transfer is not None
    whole = profile.latency.step_s(StepWork(64, 64 * 65 / 2, 1))
    assert profile.latency.decode_terms(1).base_s < whole


def test_a_profile_needs_room_for_its_points() -> None:
    with tandem("profile", "demo", "--max-num-seqs", "7") as command:
        status, output = command.wait()
    assert status == 2
    assert "tandem: a profile needs chunks of at least 64 tokens and 8 sequences" in output


def test_a_profile_never_takes_most_of_the_memory() -> None:
    with tandem("profile", "demo", "--max-num-seqs", "1000000") as command:
        status, output = command.wait()
    assert status == 2, output
    assert "GiB of KV, this machine spares" in output
