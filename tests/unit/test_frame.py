"""The ways to install and start agree with each other: Makefile, container file, README, CI script."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from packaging.requirements import Requirement

from cluster.demo import CHATS, shorten, timeline_table
from cluster.progress import curl_line
from tests.support.layout import ROOT, pyproject

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def recipe(target: str, *variables: str) -> list[str]:
    """What make would run for a target, one shell line each."""
    dry = subprocess.run(
        ["make", "--no-print-directory", "-n", "-B", target, *variables],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return [" ".join(line.split()) for line in dry.stdout.splitlines()]


def container_steps() -> list[str]:
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    # As with make, the index is only named when one was given.
    text = text.replace("${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}", "--extra-index-url $TORCH_INDEX")
    return [" ".join(line.split()[1:]) for line in text.splitlines() if line.startswith("RUN ")]


def installing(steps: list[str]) -> list[str]:
    """The steps that make and fill the environment."""
    found = (re.search(r"(python3 -m venv .*|\.venv/bin/python -m pip install .*)", step) for step in steps)
    return [match[1] for match in found if match is not None]


@needs_make
def test_container_takes_the_steps_of_make_venv() -> None:
    steps = installing(recipe("venv", "TORCH_INDEX=$TORCH_INDEX".replace("$", "$$")))
    assert len(steps) == 3
    assert installing(container_steps()) == steps


@needs_make
def test_container_starts_what_make_serve_starts() -> None:
    command = re.search(r"^CMD (\[.*\])$", (ROOT / "Containerfile").read_text(), re.MULTILINE)
    assert command is not None
    assert " ".join(json.loads(command[1])) == recipe("serve")[-1]


@needs_make
def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line for line in script.splitlines() if line.startswith("make ")]
    assert commands == ["make venv", "make lint", "make types", "make test"]
    assert "make test" in (ROOT / "README.md").read_text()


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make serve")


def test_readme_shows_what_the_demo_and_serve_print() -> None:
    text = (ROOT / "README.md").read_text()
    for number, chat in enumerate(CHATS, 1):
        assert f"chat {number}: {chat.title}\n" in text
        for turn in chat.turns:
            assert f"  user:      {shorten(turn)}\n" in text
    title, head = timeline_table([])[1:]
    assert title in text
    assert any(line.split() == head.split() for line in text.splitlines())
    assert curl_line("http://127.0.0.1:8000", "demo", with_key=False) in text


def test_every_requirement_is_pinned_by_the_constraints() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {_plain(name): version for name, version in re.findall(r"^(\S+)==(\S+)$", "\n".join(lines), re.M)}
    project = pyproject()["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert _plain(requirement.name) in pins, f"{text} has no pin"
        assert pins[_plain(requirement.name)] in requirement.specifier, f"{text} excludes what was tested"


def test_torch_is_pinned_without_a_build_and_ranged_for_gpu_machines() -> None:
    assert re.search(r"^torch==\d+\.\d+\.\d+$", (ROOT / "constraints.txt").read_text(), re.M)
    (torch,) = (Requirement(r) for r in pyproject()["project"]["dependencies"] if r.startswith("torch"))
    assert "2.11.0" in torch.specifier


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
