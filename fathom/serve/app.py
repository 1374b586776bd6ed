"""The application: routes, the page, and what every answer carries."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from fathom.data.tokenizer import Tokenizer
from fathom.engine.protocol import Engine
from fathom.serve import documents, handlers
from fathom.serve.envelope import Envelope
from fathom.serve.errors import ApiError
from fathom.serve.schema import ChatForm, CompletionForm
from fathom.serve.service import Service
from fathom.serve.settings import ServiceSettings

_PAGE = Path(__file__).parent / "page"


def create_app(engine: Engine, tokenizer: Tokenizer, settings: ServiceSettings) -> FastAPI:
    """The service over `engine` as an ASGI application; `app.state.service` is its `Service`.

    The engine is closed when the application is. Paths: `/v1/…`, the same without `/v1` and under `/beta` (DeepSeek's),
    `/health`, `/ping`, `/version`, `/metrics`, `/openapi.json`, and the chat page at `/`.
    """
    service = Service(engine, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # The customary pages of documentation load scripts from elsewhere, and this service needs no network.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    handlers.install(app)
    documents.install(app, version=version("fathom-lm"), with_keys=bool(settings.api_keys))
    _add_api(app, service)
    _add_operations(app, service)
    _add_page(app)
    _add_middleware(app, service)
    return app


def _add_middleware(app: FastAPI, service: Service) -> None:
    """From the inside out: each sees what those before it made."""
    app.add_middleware(handlers.Mistakes)
    if origins := service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send a dozen of their own, and none has a meaning here that could harm
            expose_headers=["x-request-id", "retry-after"],
        )
    if hosts := service.settings.hosts:
        app.add_middleware(handlers.Hosts, hosts=hosts)
    app.add_middleware(Envelope, settings=service.settings, metrics=service.metrics)


def _add_api(app: FastAPI, service: Service) -> None:
    async def chat(request: Request) -> Response:
        return await service.chat(request)

    async def complete(request: Request) -> Response:
        return await service.complete(request)

    async def models(request: Request) -> dict[str, Any]:
        service.identify(request)
        return service.models()

    async def model(request: Request, name: str) -> dict[str, Any]:
        service.identify(request)
        found = next((entry for entry in service.models()["data"] if entry["id"] == name), None)
        if found is None:
            raise ApiError(404, f"there is no model '{name[:100]}' here", code="model_not_found", param="model")
        return found

    chat_route = documents.post(ChatForm, "Answer a conversation")
    completion_route = documents.post(CompletionForm, "Continue a text, or fill a gap in it")
    for prefix in ("/v1", "", "/beta", "/beta/v1"):
        shown = {"include_in_schema": prefix == "/v1"}
        app.add_api_route(f"{prefix}/chat/completions", chat, methods=["POST"], **chat_route, **shown)
        app.add_api_route(f"{prefix}/completions", complete, methods=["POST"], **completion_route, **shown)
        listed = documents.get(documents.ModelList, "What is served")
        app.add_api_route(f"{prefix}/models", models, methods=["GET"], **listed, **shown)
        one = documents.get(documents.Model, "One served model")
        app.add_api_route(f"{prefix}/models/{{name:path}}", model, methods=["GET"], **one, **shown)


def _add_operations(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        if service.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def which() -> dict[str, str]:
        return {"version": version("fathom-lm")}

    taken = documents.get(documents.Health, "Whether requests are taken")
    app.add_api_route("/health", health, methods=["GET"], **taken)
    app.add_api_route("/ping", health, methods=["GET"], include_in_schema=False, **taken)
    app.add_api_route("/version", which, methods=["GET"], **documents.get(documents.Version, "Which Fathom this is"))
    app.add_api_route("/metrics", metrics, methods=["GET"], summary="Figures for Prometheus", response_class=Response)


def _add_page(app: FastAPI) -> None:
    """Each file and folder by its name: a mount at `/` would answer for every path that the API does not have."""

    def show(file: Path) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return FileResponse(file)

        return page

    for entry in sorted(_PAGE.iterdir()):
        if entry.is_dir():
            app.mount(f"/{entry.name}", StaticFiles(directory=entry), name=entry.name)
        else:
            path = "/" if entry.name == "index.html" else f"/{entry.name}"
            app.add_api_route(path, show(entry), methods=["GET", "HEAD"], include_in_schema=False)
