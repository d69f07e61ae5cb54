"""The front end as one ASGI application: the OpenAI API, the page, health, and Triton's metrics passed through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import httpx2
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from python_backends.core.config import Deployment
from router.door.client import DoorClient
from router.http.api import Api
from router.http.errors import ApiError
from router.http.keeper import RouterKeeper
from router.http.origin import TOLD_HEADERS, Originated
from router.http.pages import Pages
from router.http.watch import Watching
from router.tokenizer import Tokenizer

_METRICS_TIMEOUT_S = 5.0


def create_app(
    deployment: Deployment,
    tokenizer: Tokenizer,
    door_address: str,
    api_keys: frozenset[bytes],
    *,
    metrics: str,
    keeper: RouterKeeper | None,
) -> Starlette:
    """`metrics`: HOST:PORT of Triton's metrics. `keeper` restarts a dead router; one front end of a server has one."""
    door = DoorClient(door_address, deployment.router.worker_wait_s, keeper.fell_silent if keeper else None)
    api = Api(deployment, tokenizer, door, api_keys)
    probes = _Probes(door, metrics)
    watching = Watching(api, door)
    pages = Pages()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with door, probes:
            if keeper is None:
                yield
            else:
                async with keeper.watching(door):
                    yield

    cors = Middleware(
        CORSMiddleware,
        allow_origins=deployment.http.cors_origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=TOLD_HEADERS,
    )
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models),
            Route("/v1/models/{model:path}", api.model),
            Route("/health", probes.health),
            Route("/health/live", probes.live),
            Route("/metrics", probes.metrics),
            Route("/baton/events", watching.events),
            Route("/baton/requests/{what}", watching.requests),
            Route("/", pages.index),
            Route("/page/{name}", pages.file),
        ],
        middleware=[Middleware(Originated), *([cors] if deployment.http.cors_origins else [])],
        exception_handlers={HTTPException: _not_found},
        lifespan=lifespan,
    )


class _Probes:
    """What machines ask: is it alive, can it serve, how is it doing."""

    def __init__(self, door: DoorClient, metrics: str) -> None:
        self._door = door
        self._metrics = f"http://{metrics}/metrics"

    async def __aenter__(self) -> None:
        self._client = httpx2.AsyncClient(timeout=_METRICS_TIMEOUT_S)

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def live(self, _: Request) -> Response:
        """This process answers; nothing is said of router and workers."""
        return Response(status_code=HTTPStatus.OK)

    async def health(self, _: Request) -> Response:
        """200 when requests can be served now, else 503 and why not."""
        router = self._door.router
        trouble = "the router is not up" if router is None else router.trouble
        body = {"status": "unavailable" if trouble else "ok", "trouble": trouble}
        status = HTTPStatus.SERVICE_UNAVAILABLE if trouble else HTTPStatus.OK
        return Response(msgspec.json.encode(body), status, media_type="application/json")

    async def metrics(self, _: Request) -> Response:
        """Triton's metrics, Baton's among them."""
        try:
            got = await self._client.get(self._metrics)
        except httpx2.HTTPError as error:
            return Response(f"{self._metrics} does not answer: {error}\n", HTTPStatus.BAD_GATEWAY, media_type="text/plain")
        return Response(got.content, got.status_code, media_type=got.headers.get("content-type"))


async def _not_found(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there, in the API's words."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; the API is under /v1"
    answer: Any = ApiError(error.status_code, message, code="not_found")
    return Response(answer.body, error.status_code, error.headers, "application/json")
