"""The official client against a running cluster with the demo model: it works as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from tests.support.cluster import ClusterProcess, started_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    with started_cluster(config="configs/local.yaml") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def client(cluster: ClusterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.base_url}/v1", api_key="none", timeout=60, max_retries=0) as made:
        yield made


@pytest.mark.slow
def test_a_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Who are you?"}],
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert text.strip()
    assert finishes[-1] in ("stop", "length")
    assert finishes[:-1] == [None] * (len(finishes) - 1)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    whole = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=40
    )
    assert whole.choices[0].message.content == text


@pytest.mark.slow
def test_sampling_repeats_with_its_seed(client: openai.OpenAI) -> None:
    def story(seed: int) -> str:
        answer = client.completions.create(
            model="demo", prompt="One day, a small dog", temperature=1.2, seed=seed, max_tokens=40
        )
        return answer.choices[0].text

    assert story(1) == story(1)
    assert len({story(seed) for seed in range(2, 6)}) > 1


@pytest.mark.slow
def test_logprobs_and_stop_strings(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="One day, a small dog", temperature=0, max_tokens=60, stop=["."], logprobs=2
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "." not in choice.text
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert all(value is None or value <= 0 for value in choice.logprobs.token_logprobs)


@pytest.mark.slow
def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.completions.create(model="gpt-5", prompt="hello")
    with pytest.raises(openai.BadRequestError, match="2048") as raised:
        client.completions.create(model="demo", prompt="dog " * 3000)
    assert raised.value.code == "context_length_exceeded"
