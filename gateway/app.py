"""The OpenAI-compatible REST API over a `GatewayCore`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from contracts.errors import NoCapacity, NotFound, NotReady, TandemError
from contracts.messages import MembersReply
from gateway.formats import format_of
from gateway.generation import Generation, TimelineLog, run_all, timeline_json
from gateway.health import HealthCheck
from gateway.metrics import Metrics
from gateway.planning import Plan, Planner
from gateway.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    parse,
    refuse_unknown,
)
from gateway.sse import EventStream
from gateway.terms import SLO_CLASS_HEADER, Terms, TermsBook
from gateway.tokenizer import TextTokenizer, TokenizingPool
from gateway.web import (
    Gate,
    error_response,
    json_response,
    read_body,
    routing_error_response,
    until_disconnect,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from contracts.clock import Clock
    from gateway.core import GatewayCore
    from gateway.formats import Format
    from gateway.settings import GatewaySettings

BodyT = TypeVar("BodyT", bound=msgspec.Struct)

Handler = Callable[..., Awaitable[Response]]

#: Keys of a prompt this long take about a millisecond.
_HASH_IN_THREAD_TOKENS = 16_384


def create_app(
    core: GatewayCore,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    clock: Clock,
    *,
    rng: random.Random | None = None,
) -> FastAPI:
    """The app of one gateway. `rng` gives seeds to requests that bring none; None: one that starts from the
    gateway's id and the time of day.

    The core must be entered by the caller, and stay so for as long as the app is served.
    """
    pool = TokenizingPool(tokenizer, num_threads=settings.tokenizer_threads)
    if rng is None:
        rng = random.Random(f"{core.gateway_id} {clock.wall_s()}")
    api = _Api(core, pool, settings, clock, rng)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        with pool:
            yield

    app = FastAPI(title="Tandem", version=settings.version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, settings=settings, new_request_id=api.new_request_id, log=core.log)
    app.add_exception_handler(TandemError, _on_tandem_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_routes(app, api)
    return app


def _add_routes(app: FastAPI, api: _Api) -> None:
    gets: dict[str, Handler] = {
        "/v1/models": api.models,
        "/v1/models/{model:path}": api.model,
        "/v1/requests/{request_id}/timeline": api.timeline,
        "/health": api.health,
        "/ready": api.health,
        "/live": api.live,
        "/version": api.version,
        "/metrics": api.metrics,
    }
    posts: dict[str, tuple[Handler, type[msgspec.Struct]]] = {
        "/v1/completions": (api.completions, CompletionBody),
        "/v1/chat/completions": (api.chat_completions, ChatBody),
        "/tokenize": (api.tokenize, TokenizeBody),
        "/detokenize": (api.detokenize, DetokenizeBody),
    }
    for path, handler in gets.items():
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
    for path, (handler, kind) in posts.items():
        body = {"required": True, "content": {"application/json": {"schema": msgspec.json.schema(kind)}}}
        app.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra={"requestBody": body})


async def _on_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return routing_error_response(error)


@dataclass(frozen=True, slots=True)
class _Arrival:
    """When and as what a request came."""

    request_id: str
    received_s: float
    created: int


class _Api:
    """The endpoints."""

    def __init__(
        self,
        core: GatewayCore,
        pool: TokenizingPool,
        settings: GatewaySettings,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._core = core
        self._pool = pool
        self._settings = settings
        self._clock = clock
        self._planner = Planner(settings, pool, rng)
        self._terms_book = TermsBook(settings.slos, settings.default_slo_class, settings.kv_class)
        self._metrics = Metrics(core, settings)
        self._timelines = TimelineLog(settings.max_timelines)
        self._health = HealthCheck(core, settings, clock)
        self._started = int(clock.wall_s())
        self._request_numbers = count(1)

    def new_request_id(self) -> str:
        return f"{self._core.gateway_id}-http-{next(self._request_numbers)}"

    # --- generation -----------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        arrival = self._arrival(request)
        body = await self._body(request, CompletionBody)
        terms = self._terms(request, body)
        return await self._answer(request, arrival, terms, await self._planner.completion(body))

    async def chat_completions(self, request: Request) -> Response:
        arrival = self._arrival(request)
        body = await self._body(request, ChatBody)
        terms = self._terms(request, body)
        return await self._answer(request, arrival, terms, await self._planner.chat(body))

    def _terms(self, request: Request, body: GenerationBody) -> Terms:
        """Raises BadRequest; and what `submit` would raise, before the prompt costs any work."""
        terms = self._terms_book.terms(request.state.tenant, body, request.headers.get(SLO_CLASS_HEADER))
        with self._counting_refusal(terms):
            self._core.check_room()
        return terms

    @contextmanager
    def _counting_refusal(self, terms: Terms) -> Generator[None]:
        try:
            yield
        except (NoCapacity, NotReady) as error:
            self._metrics.count_refusal(error.reason or error.code, terms.slo_class, terms.tenant)
            raise

    async def _answer(self, request: Request, arrival: _Arrival, terms: Terms, plan: Plan) -> Response:
        block_keys = [await self._block_keys(prompt.token_ids, terms) for prompt in plan.prompts]
        with self._counting_refusal(terms):
            generation = Generation(
                self._core,
                self._pool.tokenizer,
                plan,
                arrival.request_id,
                terms=terms,
                block_keys=block_keys,
                received_s=arrival.received_s,
                timeout_s=self._settings.request_timeout_s,
                metrics=self._metrics,
                timelines=self._timelines,
            )
        form = format_of(plan, self._pool.tokenizer)
        try:
            if plan.stream:
                await until_disconnect(request.receive, generation.accepted())
                return EventStream(generation, form, arrival.created, self._clock, self._settings)
            return await until_disconnect(request.receive, _whole(generation, form, arrival.created))
        except BaseException:
            generation.close("the client is gone")
            raise

    async def _block_keys(self, token_ids: tuple[int, ...], terms: Terms) -> bytes:
        return await self._pool.run(
            partial(self._core.block_hints.of, token_ids, terms.cache_salt, terms.kv_class),
            in_thread=len(token_ids) >= _HASH_IN_THREAD_TOKENS,
        )

    # --- text -----------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        tokens = await self._planner.tokenize(body)
        limit = self._settings.max_model_len
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        self._planner.check_model(body.model)
        self._planner.check_token_ids(body.tokens, "tokens")
        return json_response({"prompt": await self._pool.decode(body.tokens)})

    # --- about the gateway ----------------------------------------------------------------------

    async def models(self) -> Response:
        entries = [self._model_entry(name) for name in self._settings.served_model_names]
        return json_response({"object": "list", "data": entries})

    async def model(self, model: str) -> Response:
        return json_response(self._model_entry(self._planner.check_model(model)))

    async def timeline(self, request: Request, request_id: str) -> Response:
        """By the id of the answer, or by the request id."""
        bare = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        timelines = self._timelines.get(request.state.tenant.name, bare)
        if timelines is None:
            raise NotFound(
                f"no timeline of request {request_id[:64]!r}; the last {self._settings.max_timelines} are kept"
            )
        return json_response({"id": bare, "object": "timeline", **timeline_json(timelines)})

    async def health(self) -> Response:
        report = await self._health.report()
        if report.ok:
            return json_response(report.as_json())
        return json_response(report.as_json(), NotReady.http_status, {"retry-after": "1"})

    async def live(self) -> Response:
        return json_response({"status": "ok"})

    async def version(self) -> Response:
        return json_response({"version": self._settings.version})

    async def metrics(self) -> Response:
        """Answered without the workers' part while the coordinator does not answer."""
        try:
            cluster = await self._core.cluster()
        except TandemError:
            cluster = MembersReply(members=())
        text = self._metrics.exposition(cluster)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    # --- shared ---------------------------------------------------------------------------------

    def _arrival(self, request: Request) -> _Arrival:
        return _Arrival(request.state.request_id, self._clock.now_s(), int(self._clock.wall_s()))

    async def _body(self, request: Request, kind: type[BodyT]) -> BodyT:
        body, unknown = parse(await read_body(request, self._settings), kind)
        if self._settings.strict_fields:
            refuse_unknown(unknown, kind)
        self._metrics.count_unknown(unknown)
        return body

    def _model_entry(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "max_model_len": self._settings.max_model_len,
        }


async def _whole(generation: Generation, form: Format, created: int) -> Response:
    """The answer in one body."""
    pieces = await run_all([generation.whole(choice) for choice in generation.choices])
    content: dict[str, object] = {
        "id": form.id_prefix + generation.request_id,
        "object": form.whole_name,
        "created": created,
        "model": generation.plan.model,
        "choices": [form.whole(choice, piece) for choice, piece in zip(generation.choices, pieces, strict=True)],
        "usage": generation.usage(),
    }
    if generation.plan.include_timeline:
        content["timeline"] = generation.timeline()
    generation.close("finished")
    return json_response(content)
