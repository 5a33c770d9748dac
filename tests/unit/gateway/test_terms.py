"""On which terms a request runs, and what of it goes to coordinator and workers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from contracts.errors import BadRequest, ConfigError
from contracts.messages import Predicted, PrefixPlan
from contracts.requests import PhaseTimes
from gateway.limits import GatewayLimits
from gateway.schemas import CompletionBody
from gateway.server import GatewaySettings
from gateway.settings import TenantSettings
from gateway.terms import Tenant, TermsBook
from kvstore.block_keys import block_keys, hints, root_key
from tests.support.fake_backend import IDENTITY
from workload.slo import SloClass

if TYPE_CHECKING:
    import httpx

    from contracts.messages import DispatchItem
    from contracts.requests import GenerateRequest
    from gateway.core import GatewayCore
    from tests.support.fake_backend import FakeCluster, Script

TEXT = "/v1/completions"
SLOS = {"chat": SloClass("chat", 300.0, 50.0), "batch": SloClass("batch", 60_000.0, 1000.0)}
BOOK = TermsBook(SLOS, "chat")
ACME = Tenant(name="acme", max_priority=5, slo_class="batch")
PLAIN = Tenant(name="default")
SETTINGS = GatewaySettings(
    served_model_names=("scripted",),
    max_model_len=200,
    api_keys=("sk-plain",),
    tenants=(TenantSettings(tenant=ACME, api_keys=("sk-acme", "sk-acme-2")),),
    slos=SLOS,
    default_slo_class="chat",
)


def body(**fields: Any) -> CompletionBody:
    return CompletionBody(prompt="a", **fields)


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


def test_the_class_is_the_bodys_the_headers_the_tenants_or_the_default() -> None:
    assert BOOK.terms(ACME, body(slo_class="chat"), "batch").slo_class == "chat"
    assert BOOK.terms(PLAIN, body(), "batch").slo_class == "batch"
    assert BOOK.terms(ACME, body(), None).slo_class == "batch"
    terms = BOOK.terms(PLAIN, body(), None)
    assert (terms.slo_class, terms.ttft_target_s, terms.tpot_target_s) == ("chat", 0.3, 0.05)
    none = TermsBook({}, None).terms(PLAIN, body(), None)
    assert (none.slo_class, none.ttft_target_s, none.tpot_target_s) == ("", None, None)


def test_an_unknown_class_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadRequest, match="no SLO class 'caht'; known are: batch, chat") as caught:
        BOOK.terms(PLAIN, body(slo_class="caht"), None)
    assert caught.value.param == "slo_class"
    with pytest.raises(BadRequest, match="known are: none"):
        TermsBook({}, None).terms(PLAIN, body(), "chat")


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-100, 100))
def test_lower_priorities_are_earlier_on_the_wire_and_none_is_above_the_tenants(asked: int, most: int) -> None:
    tenant = Tenant(name="t", max_priority=most)
    priority = BOOK.terms(tenant, body(priority=asked), None).priority
    assert priority == min(-asked, most)
    assert BOOK.terms(tenant, body(), None).priority == min(0, most)


def test_no_tenant_can_name_anothers_salt() -> None:
    salts = {
        BOOK.terms(tenant, body(cache_salt=salt), None).cache_salt
        for tenant in (PLAIN, ACME, Tenant(name="default.x"))
        for salt in (None, "x", "acme", "acme/x", "default/x")
    }
    assert len(salts) == 15


@pytest.mark.parametrize(
    "changes",
    [
        {"tenants": (TenantSettings(tenant=PLAIN, api_keys=("sk-plain",)),)},
        {"tenants": (TenantSettings(tenant=PLAIN, api_keys=("",)),)},
        {"tenants": (TenantSettings(tenant=ACME), TenantSettings(tenant=ACME))},
        {"tenants": (TenantSettings(tenant=Tenant(name="t", slo_class="no")),)},
        {"default_slo_class": "no"},
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(SETTINGS, **changes)


def test_settings_with_tenants_hide_their_keys_and_may_listen_anywhere() -> None:
    assert "sk-" not in repr(SETTINGS)
    replace(SETTINGS, host="0.0.0.0", api_keys=())
    with pytest.raises(ConfigError, match="api_keys"):
        replace(SETTINGS, host="0.0.0.0", api_keys=(), tenants=(TenantSettings(tenant=PLAIN),))


# --- what goes out ------------------------------------------------------------------------------------


def item_of(cluster: FakeCluster) -> DispatchItem:
    return [item for ask in cluster.dispatches for item in ask.items][-1]


def request_of(cluster: FakeCluster) -> GenerateRequest:
    return cluster.workers["prefill-0"].accepted[-1].request


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_terms_reach_coordinator_and_worker(client: httpx.AsyncClient, cluster: FakeCluster) -> None:
    fields = {"prompt": "hello", "max_tokens": 2, "priority": -9, "cache_salt": "s"}
    assert (await client.post(TEXT, json=fields, headers=key("sk-acme-2"))).status_code == 200
    item, request = item_of(cluster), request_of(cluster)
    assert (item.tenant, item.slo_class, item.priority, item.was_accepted) == ("acme", "batch", 5, False)
    assert 0 <= item.waited_s < 60
    assert (request.tenant, request.priority, request.cache_salt) == ("acme", 5, "acme/s")
    assert request.ttft_due_s is not None
    assert 0 < request.ttft_due_s <= 60 - item.waited_s
    assert request.tpot_target_s == 1.0
    headers = {**key("sk-plain"), "x-tandem-slo-class": "batch"}
    assert (await client.post(TEXT, json={"prompt": "hello"}, headers=headers)).status_code == 200
    assert (item_of(cluster).tenant, item_of(cluster).slo_class) == ("default", "batch")


async def test_without_keys_and_classes_a_request_is_nobodys_in_particular(
    client: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    assert (await client.post(TEXT, json={"prompt": "hello", "max_tokens": 2})).status_code == 200
    item, request = item_of(cluster), request_of(cluster)
    assert (item.tenant, item.slo_class, item.priority) == ("default", "", 0)
    assert (request.ttft_due_s, request.tpot_target_s, request.cache_salt) == (None, None, "default")


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_whose_key_is_wrong_is_nobodys_tenant(client: httpx.AsyncClient) -> None:
    for headers in ({}, key("sk-acm"), key("")):
        assert (await client.post(TEXT, json={"prompt": "a"}, headers=headers)).status_code == 401


@pytest.mark.parametrize("settings", [SETTINGS])
@pytest.mark.parametrize(
    "fields",
    [
        *({"slo_class": value} for value in ("no", 1)),
        *({"priority": value} for value in ("high", 2**31)),
        *({"cache_salt": value} for value in ("", "x" * 257)),
        {"exact_kv": "yes"},
    ],
)
async def test_wrong_terms_are_refused(client: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any]) -> None:
    response = await client.post(TEXT, json={"prompt": "a", **fields}, headers=key("sk-acme"))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == next(iter(fields))
    assert not cluster.workers["prefill-0"].accepted


@pytest.mark.parametrize("settings", [replace(SETTINGS, api_keys=(), tenants=(), kv_class="lossy")])
async def test_who_asks_for_exact_kv_shares_no_block_with_the_lossy(
    client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster
) -> None:
    core.block_hints.learn([IDENTITY])
    prompt = [1] * (2 * IDENTITY.layout.block_tokens)
    seen: list[tuple[str, bytes]] = []
    for extra in ({}, {"exact_kv": True}, {"exact_kv": False}):
        fields = {"prompt": prompt, "max_tokens": 1, **extra}
        assert (await client.post(TEXT, json=fields)).status_code == 200
        seen.append((request_of(cluster).kv_class, item_of(cluster).block_keys))
    (plain, plain_keys), (exact, exact_keys), (not_exact, not_exact_keys) = seen
    assert (plain, exact, not_exact) == ("lossy", "exact", "lossy")
    assert plain_keys == not_exact_keys != exact_keys
    salt, block_tokens = request_of(cluster).cache_salt, IDENTITY.layout.block_tokens
    for kind, keys in seen:
        root = root_key(IDENTITY, salt, kv_class="lossy" if kind == "lossy" else "exact")
        assert keys == hints(list(block_keys(root, prompt, block_tokens)))


def test_nobody_gets_lossy_kv_where_the_server_is_not_set_to_it() -> None:
    assert {BOOK.terms(PLAIN, body(exact_kv=asked), None).kv_class for asked in (None, False, True)} == {"exact"}


async def test_block_keys_and_the_prefix_plan_go_along(
    client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    core.block_hints.learn([IDENTITY])
    script.prefix = PrefixPlan(local_blocks=1)
    block_tokens = IDENTITY.layout.block_tokens
    prompt = [1] * (3 * block_tokens)
    for salt in ("a", "b", "a"):
        fields = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
        assert (await client.post(TEXT, json=fields)).status_code == 200
    keys = [item.block_keys for ask in cluster.dispatches for item in ask.items]
    assert [len(one) for one in keys] == [24, 24, 24]
    assert keys[0] == keys[2] != keys[1]
    assert cluster.workers["prefill-0"].accepted[-1].prefix == script.prefix


# --- what comes back ----------------------------------------------------------------------------------


async def samples(client: httpx.AsyncClient, headers: dict[str, str]) -> dict[tuple[str, ...], float]:
    response = await client.get("/metrics", headers=headers)
    # Labels come in the order of their names.
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_a_refusal_for_its_targets_tells_all(client: httpx.AsyncClient, script: Script) -> None:
    script.rejection = ("slo_unattainable", "predicted TTFT 900 ms, the target of class chat is 300 ms", 2.1)
    script.reject_reason = "ttft"
    response = await client.post(TEXT, json={"prompt": "a", "stream": True}, headers=key("sk-plain"))
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("slo_unattainable", "rate_limit_error")
    assert "900 ms" in error["message"]
    assert "300 ms" in error["message"]
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2100")
    assert response.headers["x-tandem-reject-reason"] == "ttft"
    found = await samples(client, key("sk-plain"))
    assert found["tandem_admission_rejections_total", "ttft", "chat"] == 1
    assert found["tandem_tenant_requests_total", "refused", "default"] == 1


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_a_refused_request_is_asked_for_once(
    client: httpx.AsyncClient, script: Script, cluster: FakeCluster
) -> None:
    script.rejection = ("slo_unattainable", "no", 0.0)
    response = await client.post(TEXT, json={"prompt": "a"}, headers=key("sk-plain"))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert sum(len(ask.items) for ask in cluster.dispatches) == 1


@pytest.mark.parametrize("limits", [GatewayLimits(max_open_requests=0)])
async def test_a_full_gateway_refuses_before_it_does_any_work(client: httpx.AsyncClient) -> None:
    response = await client.post(TEXT, json={"prompt": [10**6]})
    assert response.status_code == 429, "the prompt was looked at"
    assert response.headers["x-tandem-reject-reason"] == "gateway_full"
    assert (await samples(client, {}))["tandem_admission_rejections_total", "gateway_full", ""] == 1


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_predictions_and_cached_tokens_are_told(client: httpx.AsyncClient, script: Script) -> None:
    script.predicted = Predicted(waited_s=0.0, queue_s=0.01, transfer_s=0.0, prefill_s=0.02, ttft_s=0.03, tpot_s=0.004)
    script.first_phases = PhaseTimes(queue_s=0.0, prefill_s=0.0, cached_tokens=4)
    fields = {"prompt": [1, 2, 3, 4, 5, 6], "n": 2, "max_tokens": 3, "include_timeline": True}
    response = await client.post(TEXT, json=fields, headers=key("sk-acme"))
    content = response.json()
    assert content["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    timeline = content["timeline"]
    assert (timeline["predicted_ttft_ms"], timeline["predicted_tpot_ms"], timeline["cached_tokens"]) == (30.0, 4.0, 4)
    assert (timeline["tenant"], timeline["slo_class"]) == ("acme", "batch")
    found = await samples(client, key("sk-acme"))
    assert found["tandem_prefix_cache_hits_total",] == 8
    assert found["tandem_prefix_cache_queries_total",] == 12
    assert found["tandem_slo_requests_total", "true", "batch"] == 2
    assert found["tandem_ttft_prediction_error_seconds_count",] == 2
    assert found["tandem_tenant_tokens_total", "cached", "acme"] == 8
    assert found["tandem_tenant_requests_total", "answered", "acme"] == 2
    assert found["tandem_placements_total", "coordinator"] == 2


async def test_cached_tokens_are_not_told_where_nobody_knows(client: httpx.AsyncClient) -> None:
    response = await client.post(TEXT, json={"prompt": "hello", "max_tokens": 2})
    assert "prompt_tokens_details" not in response.json()["usage"]


@pytest.mark.parametrize("settings", [SETTINGS])
async def test_a_tenant_does_not_see_anothers_timelines(client: httpx.AsyncClient) -> None:
    headers = {**key("sk-acme"), "x-request-id": "mine"}
    assert (await client.post(TEXT, json={"prompt": "a"}, headers=headers)).status_code == 200
    where = "/v1/requests/mine/timeline"
    assert (await client.get(where, headers=key("sk-acme-2"))).status_code == 200
    assert (await client.get(where, headers=key("sk-plain"))).status_code == 404
