"""The REST API against a scripted cluster, without sockets: formats, options, books."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from contracts.errors import NoCapacity
from contracts.requests import PhaseTimes
from gateway.server import GatewaySettings
from tests.unit.gateway import tokenizers_for_tests as small

if TYPE_CHECKING:
    import httpx

    from contracts.requests import GenerateRequest
    from tests.support.fake_backend import FakeCluster, Script

TOKENIZER = small.chat_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def says(script: Script, text: str) -> list[int]:
    """Makes the cluster answer with this text, then end-of-sequence."""
    reply = ids(text + small.EOS)
    script.reply = lambda _: reply
    return reply


async def post(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


async def events(client: httpx.AsyncClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The stream's chunks; checks its form and its end."""
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: {") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


USER = [{"role": "user", "content": "hello"}]


async def test_a_chat_answer(client: httpx.AsyncClient, script: Script, cluster: FakeCluster) -> None:
    reply = says(script, "Hello there! 😀")
    answer = await post(client, "/v1/chat/completions", model="alias", messages=USER, temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "alias"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there! 😀"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = ids(f"{small.BOS}{small.USER}hello{small.EOS}{small.ASSISTANT}")
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": len(reply),
        "total_tokens": len(prompt) + len(reply),
    }
    request = cluster.workers["prefill-0"].accepted[0].request
    assert request.token_ids == tuple(prompt)
    assert request.sampling.max_tokens == 200 - len(prompt)
    assert request.sampling.greedy


async def test_a_chat_stream(client: httpx.AsyncClient, script: Script) -> None:
    says(script, "Hello there! 😀")
    chunks = await events(client, "/v1/chat/completions", messages=USER, stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *answers, last = chunks
    assert answers[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answers)
    assert text == "Hello there! 😀"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in answers]
    assert reasons == [None] * (len(answers) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in answers)
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_no_chunk_holds_half_a_character(client: httpx.AsyncClient, script: Script) -> None:
    says(script, "你好 👍🏽 né")
    chunks = await events(client, "/v1/completions", prompt="x", max_tokens=50)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "你好 👍🏽 né"
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert len(chunks) > 3


async def test_a_character_cut_by_the_end_is_replaced(client: httpx.AsyncClient, script: Script) -> None:
    says(script, "a\N{SNOWMAN}")
    num_tokens = len(ids("a")) + len(ids("\N{SNOWMAN}")) - 1
    answer = await post(client, "/v1/completions", prompt="x", max_tokens=num_tokens)
    assert answer["choices"][0]["text"] == "a\ufffd"
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hello", [[0, *ids("hello")]]),
        (["hello", "world"], [[0, *ids("hello")], [0, *ids("world")]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_forms_of_a_prompt(
    client: httpx.AsyncClient, cluster: FakeCluster, prompt: object, expected: list[list[int]]
) -> None:
    answer = await post(client, "/v1/completions", prompt=prompt)
    accepted = cluster.workers["prefill-0"].accepted
    assert [list(body.request.token_ids) for body in accepted] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 16 * len(expected)
    assert answer["object"] == "text_completion"


@pytest.mark.parametrize("stream", [True, False])
async def test_several_answers_have_several_seeds(
    client: httpx.AsyncClient, cluster: FakeCluster, script: Script, stream: bool
) -> None:
    def by_seed(request: GenerateRequest) -> list[int]:
        return [*ids(f"seed {request.sampling.seed - 40}"), 1]

    script.reply = by_seed
    body: dict[str, Any] = {"prompt": ["a", "b"], "n": 2, "seed": 41}
    texts = [""] * 4
    if stream:
        for chunk in await events(client, "/v1/completions", **body):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        answer = await post(client, "/v1/completions", **body)
        texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["seed 1", "seed 2"] * 2


async def test_echo(client: httpx.AsyncClient, script: Script) -> None:
    says(script, " world")
    answer = await post(client, "/v1/completions", prompt="hello", echo=True)
    assert answer["choices"][0]["text"] == "hello world"
    chunks = await events(client, "/v1/completions", prompt=ids("hello"), echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("include", "expected"), [(False, "Hello "), (True, "Hello the")])
async def test_stop_strings_end_an_answer_and_its_work(
    client: httpx.AsyncClient,
    script: Script,
    cluster: FakeCluster,
    stream: bool,
    include: bool,
    expected: str,
) -> None:
    # Long enough that its worker is still at it when the stop string is found.
    says(script, "Hello there! " + "How are you today? " * 100)
    body = {"messages": USER, "stop": ["the", "you"], "include_stop_str_in_output": include}
    if stream:
        choices = [chunk["choices"][0] for chunk in await events(client, "/v1/chat/completions", **body)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        last = choices[-1]
    else:
        last = (await post(client, "/v1/chat/completions", **body))["choices"][0]
        text = last["message"]["content"]
    assert text == expected
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "the")
    await cluster.workers["decode-0"].wait_cancelled()


async def test_stop_strings_wait_for_min_tokens(client: httpx.AsyncClient, script: Script) -> None:
    says(script, "Hello there! Hello world")
    body: dict[str, Any] = {"stop": "Hello", "min_tokens": len(ids("Hello there!")), "max_tokens": 50}
    answer = await post(client, "/v1/completions", prompt="x", **body)
    assert answer["choices"][0]["text"] == "Hello there! "


async def test_a_stop_token_is_no_text_unless_asked_for(client: httpx.AsyncClient, script: Script) -> None:
    stop = ids(" fox")[-1]
    reply = [*ids("quick"), stop]
    script.reply = lambda _: reply
    body: dict[str, Any] = {"prompt": "x", "stop_token_ids": [stop], "return_token_ids": True}
    choice = (await post(client, "/v1/completions", **body))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("quick", "stop", stop)
    assert choice["token_ids"] == reply
    assert choice["prompt_token_ids"] == [0, *ids("x")]
    choice = (await post(client, "/v1/completions", include_stop_str_in_output=True, **body))["choices"][0]
    assert choice["text"] == TOKENIZER.decode(reply)


async def test_special_tokens_are_skipped_unless_asked_for(client: httpx.AsyncClient, script: Script) -> None:
    reply = [*ids("a"), ids(small.USER)[0], *ids("b")]
    script.reply = lambda _: [*reply, 1]
    assert (await post(client, "/v1/completions", prompt="x"))["choices"][0]["text"] == "ab"
    answer = await post(client, "/v1/completions", prompt="x", skip_special_tokens=False)
    assert answer["choices"][0]["text"] == f"a{small.USER}b"


async def test_chat_logprobs(client: httpx.AsyncClient, script: Script) -> None:
    reply = says(script, "é")
    answer = await post(client, "/v1/chat/completions", messages=USER, logprobs=True, top_logprobs=2)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == len(reply)
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spelled == f"é{small.EOS}".encode()
    assert [entry["logprob"] for entry in entries[0]["top_logprobs"]] == [-0.5, -1.5]
    assert entries[0]["top_logprobs"][0]["token"] == entries[0]["token"]


async def test_streamed_logprobs_cover_every_token(client: httpx.AsyncClient, script: Script) -> None:
    reply = says(script, "né 😀 the")
    body: dict[str, Any] = {"messages": USER, "logprobs": True, "return_token_ids": True}
    choices = [chunk["choices"][0] for chunk in await events(client, "/v1/chat/completions", **body)]
    logprobs: list[dict[str, Any]] = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    entries: list[dict[str, Any]] = [entry for part in logprobs for entry in part["content"]]
    assert [token_id for choice in choices for token_id in choice.get("token_ids", [])] == reply
    assert len(entries) == len(reply)
    assert all(entry["top_logprobs"] == [] for entry in entries)


@pytest.mark.parametrize("stream", [True, False])
async def test_completion_logprobs(client: httpx.AsyncClient, script: Script, stream: bool) -> None:
    reply = says(script, "the fox")
    body: dict[str, Any] = {"prompt": "x", "logprobs": 1}
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in await events(client, "/v1/completions", **body)]
    else:
        parts = [(await post(client, "/v1/completions", **body))["choices"][0]["logprobs"]]
    tokens = [token for part in parts for token in part["tokens"]]
    assert "".join(tokens) == f"the fox{small.EOS}"
    assert [offset for part in parts for offset in part["text_offset"]] == [
        len("".join(tokens[:index])) for index in range(len(reply))
    ]
    assert all(len(top) == 1 for part in parts for top in part["top_logprobs"])


async def test_sampling_is_passed_on(client: httpx.AsyncClient, cluster: FakeCluster) -> None:
    await post(
        client,
        "/v1/completions",
        prompt="x",
        max_tokens=7,
        temperature=0.001,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=-1,
        min_tokens=3,
        ignore_eos=True,
        presence_penalty=-1.5,
        frequency_penalty=1,
        repetition_penalty=1.2,
        logit_bias={"7": -100, "8": 2.5},
        stop_token_ids=[9, 9],
        user="somebody",
    )
    sampling = cluster.workers["prefill-0"].accepted[0].request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (7, 3, True)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.01, 0.5, 0, 0.1)
    assert sampling.seed == 2**63 - 1
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1.5, 1.0)
    assert sampling.repetition_penalty == 1.2
    assert sampling.logit_bias == ((7, -100.0), (8, 2.5))
    assert sampling.stop_token_ids == (9,)
    assert sampling.logprobs is None


async def test_content_parts_and_template_variables(client: httpx.AsyncClient, cluster: FakeCluster) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await post(
        client,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": parts}],
        add_generation_prompt=False,
        chat_template_kwargs={"enable_thinking": False},
        max_tokens=4,
        max_completion_tokens=2,
    )
    request = cluster.workers["prefill-0"].accepted[0].request
    assert TOKENIZER.decode(request.token_ids, skip_special_tokens=False) == (
        f"{small.BOS}{small.USER}one\ntwo{small.EOS}"
    )
    assert request.sampling.max_tokens == 2


async def test_the_timeline_of_a_request(client: httpx.AsyncClient, script: Script) -> None:
    script.first_phases = PhaseTimes(queue_s=0.1, prefill_s=1e-5)
    headers = {"x-request-id": "my-id.1"}
    body = {"messages": USER, "max_tokens": 3, "include_timeline": True}
    response = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "my-id.1"
    timeline = response.json()["timeline"]
    phases = ("gateway_ms", "queue_ms", "prefill_ms", "handoff_ms", "decode_ms")
    assert sum(timeline[phase] for phase in phases) == pytest.approx(timeline["total_ms"], abs=1e-6)
    assert timeline["prefill_ms"] == 0.01
    assert timeline["decode_worker"] == "decode-0"
    for name in ("my-id.1", "chatcmpl-my-id.1"):
        later = await client.get(f"/v1/requests/{name}/timeline")
        assert later.json() == {"id": "my-id.1", "object": "timeline", **timeline}


async def test_the_timeline_ends_a_stream(client: httpx.AsyncClient) -> None:
    chunks = await events(client, "/v1/completions", prompt=["a", "b"], include_timeline=True)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 32
    assert chunks[-1]["timeline"]["outcome"] == "length"
    assert len(chunks[-1]["timeline"]["choices"]) == 2


async def test_an_unsafe_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    for given in ("", "a b", "x" * 65, "<script>"):
        response = await client.get("/live", headers={"x-request-id": given})
        assert response.headers["x-request-id"].startswith("gw-http-")


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    text = "Hello world, né 😀"
    answer = await post(client, "/tokenize", prompt=text)
    assert answer == {
        "tokens": [0, *ids(text)],
        "count": 1 + len(ids(text)),
        "max_model_len": 200,
    }
    bare = await post(client, "/tokenize", prompt=text, add_special_tokens=False)
    assert await post(client, "/detokenize", tokens=bare["tokens"]) == {"prompt": text}
    chat = await post(client, "/tokenize", messages=USER)
    assert chat["tokens"] == ids(f"{small.BOS}{small.USER}hello{small.EOS}{small.ASSISTANT}")


async def test_models(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["scripted", "alias"]
    assert (await client.get("/v1/models/alias")).json()["max_model_len"] == 200
    assert (await client.get("/v1/models/none")).status_code == 404


async def test_small_endpoints(client: httpx.AsyncClient) -> None:
    assert (await client.get("/live")).json() == {"status": "ok"}
    assert (await client.get("/version")).json() == {"version": "0.1.0"}
    schema = (await client.get("/openapi.json")).json()
    assert "/v1/chat/completions" in schema["paths"]


async def test_health_follows_the_cluster(client: httpx.AsyncClient, cluster: FakeCluster) -> None:
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "reason": "serving",
        "prefill_workers": 1,
        "decode_workers": 1,
    }
    assert (await client.get("/ready")).status_code == 200


@pytest.mark.parametrize("settings", [GatewaySettings(served_model_names=("m",), max_model_len=9, health_cache_s=0)])
@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        ({"prefill-0": "prefill"}, "no decode worker"),
        ({"decode-0": "decode"}, "no prefill worker"),
        ({}, "no prefill and no decode worker"),
    ],
)
async def test_health_names_what_is_missing(client: httpx.AsyncClient, cluster: FakeCluster, reason: str) -> None:
    response = await client.get("/health")
    assert (response.status_code, response.json()["reason"]) == (503, reason)
    assert response.headers["retry-after"] == "1"
    cluster.kill_coordinator()
    response = await client.get("/ready")
    assert response.json()["reason"] == "the coordinator did not answer (worker_unavailable)"


async def test_metrics(client: httpx.AsyncClient, script: Script) -> None:
    await post(client, "/v1/completions", prompt="hello", max_tokens=5, guided_json={}, oddity=1)
    script.prefill_error = NoCapacity("full")
    await client.post("/v1/completions", json={"prompt": "hello"})
    response = await client.get("/metrics")
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if "_bucket" not in sample.name
    }
    assert samples["tandem_num_requests_running",] == 0
    assert samples["tandem_generation_tokens_total",] == 5
    assert samples["tandem_prompt_tokens_total",] == 1 + len(ids("hello"))
    assert samples["tandem_request_success_total", "length"] == 1
    assert samples["tandem_request_failures_total", "no_capacity"] == 1
    assert samples["tandem_unknown_fields_total", "guided_json"] == 1
    assert samples["tandem_unknown_fields_total", "other"] == 1
    assert samples["tandem_time_to_first_token_seconds_count",] == 1
    assert samples["tandem_inter_token_latency_seconds_count",] == 4
    for phase in ("queue", "prefill", "handoff", "decode"):
        assert samples[f"tandem_request_{phase}_time_seconds_count",] == 1
    assert samples["tandem_e2e_request_latency_seconds_sum",] > 0


async def test_timelines_are_bounded(cluster: FakeCluster) -> None:
    from gateway.generation import TimelineLog

    log = TimelineLog(2)
    for name in ("a", "b", "a", "c"):
        log.add("tenant", name, ())
    assert [name for name in "abc" if log.get("tenant", name) is not None] == ["a", "c"]
    assert log.get("other", "a") is None


def test_settings_hide_keys() -> None:
    settings = GatewaySettings(served_model_names=("m",), max_model_len=9, api_keys=("secret",))
    assert "secret" not in repr(settings)
