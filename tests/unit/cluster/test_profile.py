"""`tandem profile` before it measures: what it refuses, and where it stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from cluster.profile import default_path
from tests.support.profiles import PROFILE

if TYPE_CHECKING:
    from tests.support.commands import Tandem


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--threads", "0"), "--threads 0: this process may use"),
        (("--threads", "100000"), "--threads 100000: this process may use"),
        (("--max-context", "4096"), "--max-context 4096: the model's context ends at 2048 tokens"),
        (("--max-context", "512", "--max-model-len", "256"), "--max-context 512: the model's context ends at 256"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_2(
    run_tandem: Tandem, flags: tuple[str, ...], complaint: str
) -> None:
    refused = run_tandem("profile", "demo", *flags)
    assert refused.status == 2
    assert refused.stderr.startswith(f"tandem: {complaint}")
    assert refused.stderr.count("\n") == 1


def test_the_default_place_names_model_engine_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    profile = msgspec.structs.replace(PROFILE, model="org/name 2", engine="cpu-avx2, bfloat16, 2 thread(s)", threads=2)
    assert default_path(profile) == Path("/cache/tandem/profiles/org-name-2-cpu-avx2-bfloat16-2t.json")
