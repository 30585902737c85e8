"""The application: the OpenAI-compatible interface, the chat page, health and numbers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

from chiasm.serving import attention, chat, embeddings, errors
from chiasm.serving.answers import Health, ModelCard, ModelList
from chiasm.serving.document import Documented
from chiasm.serving.errors import RESPONSES, ApiError
from chiasm.serving.fetch import Fetcher
from chiasm.serving.gate import Gate
from chiasm.serving.served import Served, Shared
from chiasm.serving.settings import Settings

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in ("page", "api", "look", "pictures", "words")},
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def create_app(models: Sequence[Served], settings: Settings, fetcher: Fetcher | None = None) -> FastAPI:
    """The application on these models; when it shuts down, their engines finish what runs.

    Args:
        fetcher: of pictures from addresses; by default one of public addresses only.
    """
    shared = Shared(models, settings, fetcher)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(shared.close)

    quiet: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = Documented(settings, title="Chiasm", version="1", lifespan=lifespan, **quiet)
    app.state.broken = shared.broken
    errors.install(app)
    for part in (chat, embeddings, attention):
        app.include_router(part.router(shared))
    app.include_router(_models(shared))
    app.include_router(_state(shared))
    app.include_router(_page())
    app.add_middleware(Gate, shared=shared)
    if settings.origins:  # around the gate, so that a page may read its refusals
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _models(shared: Shared) -> APIRouter:
    routes = APIRouter(tags=["models"])

    def card(model: Served) -> ModelCard:
        return ModelCard(id=model.name, created=model.created, kind=model.kind, **model.describe())

    @routes.get("/v1/models", responses={401: RESPONSES[401], 403: RESPONSES[403]})
    async def list_models() -> ModelList:
        """All models behind this address."""
        return ModelList(data=[card(model) for model in shared.models.values()])

    @routes.get("/v1/models/{model:path}", responses={s: RESPONSES[s] for s in (400, 401, 403, 404)})
    async def retrieve_model(model: str) -> ModelCard:
        """One of them."""
        return card(shared.named(model))

    return routes


def _state(shared: Shared) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", responses={503: RESPONSES[503]})
    async def health() -> Health:
        """Whether all models answer."""
        if (name := shared.broken()) is not None:
            raise ApiError(503, f"the engine of {name!r} has stopped; restart the server", code="stopped")
        return Health(models=list(shared.models))

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @routes.get("/metrics", response_class=Response, responses={200: text, 401: RESPONSES[401]})
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(shared.metrics.text(), headers={"Content-Type": shared.metrics.content_type})

    return routes


def _page() -> APIRouter:
    """The chat page's own files; nothing of it comes from elsewhere."""
    routes = APIRouter(include_in_schema=False)
    folder = resources.files("chiasm.serving") / "page"
    for path, (name, kind) in PAGE.items():
        routes.add_api_route(path, _file(folder.joinpath(name).read_bytes(), kind), methods=["GET", "HEAD"])
    return routes


def _file(content: bytes, kind: str) -> Any:
    async def file() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return file
