"""Several models behind one address: each request goes to the API of the model that its body names.

A model's requests, books and tokenizer are its own (`gateway.app.Api` over a `GatewayCore`); here is only what all
share: the list of models, one page of metrics, and a look at the body. Limits, keys and request ids come before that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request  # noqa: TC002 (read at run time: the signatures say what a path's handler needs)
from starlette.responses import Response  # noqa: TC002 (as above)

from contracts.errors import BadRequest, ConfigError, NotFound
from gateway.app import Api, app_of, arrival_of, metrics_response, no_timeline
from gateway.metrics import exposition_of
from gateway.tokenizer import TokenizingPool
from gateway.web import json_response, read_body

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import FastAPI

    from contracts.clock import Clock
    from gateway.core import GatewayCore
    from gateway.health import HealthReport
    from gateway.settings import GatewaySettings
    from gateway.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    core: GatewayCore
    tokenizer: TextTokenizer
    #: All of a front have the same, but for names, lengths and SLO classes.
    settings: GatewaySettings


def create_front(models: Sequence[ServedModel], clock: Clock) -> FastAPI:
    """The app of a gateway for these models; of one alone it is `create_app`'s.

    The cores must be entered by the caller, and stay so for as long as the app is served. Raises ConfigError for
    two of one name.
    """
    return front_of(models, apis_of(models, clock), clock)


def apis_of(models: Sequence[ServedModel], clock: Clock) -> list[Api]:
    """What answers for each model: whoever made a core that ends before the app does tells its `Api`."""
    return [
        Api(
            each.core, TokenizingPool(each.tokenizer, num_threads=each.settings.tokenizer_threads), each.settings, clock
        )
        for each in models
    ]


def front_of(models: Sequence[ServedModel], apis: Sequence[Api], clock: Clock) -> FastAPI:
    """As `create_front`, of APIs that `apis_of` made."""
    first = models[0]
    if len(models) == 1:
        return app_of(apis[0], apis, first.settings, first.core.log)
    return app_of(Front(models, apis, clock), apis, first.settings, first.core.log)


class Front:
    """The endpoints over several models: `gateway.app.Endpoints`."""

    def __init__(self, models: Sequence[ServedModel], apis: Sequence[Api], clock: Clock) -> None:
        self._settings = models[0].settings
        self._clock = clock
        self._apis = list(apis)
        self._may_sleep = [each.settings.may_sleep for each in models]
        self._by_name: dict[str, Api] = {}
        for each, api in zip(models, apis, strict=True):
            for name in each.settings.served_model_names:
                if name in self._by_name:
                    raise ConfigError(f"two models are served as {name!r}")
                self._by_name[name] = api
        self._first_names = [each.settings.served_model_names[0] for each in models]

    # --- by model -------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await (await self._api_of(request)).completions(request)

    async def chat_completions(self, request: Request) -> Response:
        return await (await self._api_of(request)).chat_completions(request)

    async def tokenize(self, request: Request) -> Response:
        return await (await self._api_of(request)).tokenize(request)

    async def detokenize(self, request: Request) -> Response:
        return await (await self._api_of(request)).detokenize(request)

    async def model(self, model: str) -> Response:
        return json_response(next(entry for entry in await self._entries() if entry["id"] == self._known(model)))

    async def _api_of(self, request: Request) -> Api:
        """Reads the body, once. Raises as `read_body`, BadRequest where none is named, and NotFound."""
        request.state.arrival = arrival_of(request, self._clock)
        request.state.raw_body = raw = await read_body(request, self._settings)
        try:
            name = msgspec.json.decode(raw, type=_Named).model
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            # What is wrong with it is the same for every model.
            return self._apis[0]
        if name is None:
            raise BadRequest(
                f"model: {len(self._apis)} models are served here, name one; /v1/models lists them", param="model"
            )
        return self._by_name[self._known(name)]

    def _known(self, name: str) -> str:
        """Raises NotFound."""
        if name not in self._by_name:
            raise NotFound(f"the model {name[:128]!r} is not served here", param="model")
        return name

    # --- of all ---------------------------------------------------------------------------------

    async def models(self) -> Response:
        return json_response({"object": "list", "data": await self._entries()})

    async def _entries(self) -> list[dict[str, object]]:
        reports = await self._reports()
        return [
            {**entry, "state": state_of(report, may_sleep=may_sleep)}
            for api, report, may_sleep in zip(self._apis, reports, self._may_sleep, strict=True)
            for entry in api.entries()
        ]

    async def _reports(self) -> list[HealthReport]:
        return await asyncio.gather(*(api.health_report() for api in self._apis))

    async def health(self) -> Response:
        """Of the front; that of each model beside it."""
        reports = await self._reports()
        models = {
            name: {"state": state_of(report, may_sleep=may_sleep), **report.as_json()}
            for name, report, may_sleep in zip(self._first_names, reports, self._may_sleep, strict=True)
        }
        return json_response({"status": "ok", "models": models})

    async def timeline(self, request: Request, request_id: str) -> Response:
        """By the id of the answer, or by the request id."""
        for api in self._apis:
            answer = api.timeline_of(request.state.tenant.name, request_id)
            if answer is not None:
                return json_response(answer)
        raise no_timeline(request_id, self._settings.max_timelines)

    async def live(self) -> Response:
        return await self._apis[0].live()

    async def version(self) -> Response:
        return await self._apis[0].version()

    async def metrics(self) -> Response:
        families = await asyncio.gather(*(api.metric_families() for api in self._apis))
        return metrics_response(exposition_of(zip(self._first_names, families, strict=True)))


class _Named(msgspec.Struct):
    """What is looked at before the body is read in full."""

    model: str | None = None


def state_of(report: HealthReport, *, may_sleep: bool) -> str:
    """`awake`: it answers; `asleep`: the next request starts its workers; `unavailable`: neither. Pure."""
    if report.ok:
        return "awake"
    return "asleep" if may_sleep and report.is_heard else "unavailable"
