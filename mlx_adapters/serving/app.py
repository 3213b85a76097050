"""The HTTP side: OpenAI's paths, adapters, metrics, health and a page, on Starlette."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_adapters.errors import AdapterError
from mlx_adapters.protocols.errors import ApiError, public
from mlx_adapters.protocols.ollama import ModelRecords, ollama_name
from mlx_adapters.serving.answering import Answering
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.transport import Guard, Limits, error_response
from mlx_adapters.sources.lookup import reference_of
from mlx_adapters.sources.references import check_name

PAGE = Path(__file__).parent / "page"
# The page loads nothing but its own files, and what a model wrote becomes HTML through DOMPurify or not at all.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)


FRESH = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}


class PageFiles(StaticFiles):
    """Files that a browser asks for anew each time: one of an older version beside a new one would break the page."""

    def file_response(self, *given: Any, **more: Any) -> Response:
        """Starlette's, or its 304."""
        response = super().file_response(*given, **more)
        response.headers.update(FRESH)
        return response


def health(status: str) -> Response:
    """What a proxy or a supervisor is told: 200 for "ok", else 503."""
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


class Server:
    """The handlers of one engine. `leaving`: it is about to end, and others should be asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.settings = engine, engine.settings
        self.answering = Answering(engine)
        self.started = int(time.time())
        self.records = ModelRecords(engine.model, self.started)
        self.leaving = False
        self._limits = Limits(self.settings)

    def app(self) -> Guard:
        """The ASGI application; its lifespan starts and drains the engine."""
        routes = [
            Route("/", self.page),
            Mount("/page", PageFiles(directory=PAGE)),
            Route("/health", self.live),
            Route("/health/live", self.live),
            Route("/health/ready", self.ready),
            Route("/metrics", self.guarded(self.metrics)),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{name:path}", self.guarded(self.model)),
            Route("/v1/chat/completions", self.guarded(self.answering.chat), methods=["POST"]),
            Route("/v1/completions", self.guarded(self.answering.completion), methods=["POST"]),
            Route("/v1/responses", self.guarded(self.answering.response), methods=["POST"]),
            Route("/v1/responses/input_tokens", self.guarded(self.answering.response_tokens), methods=["POST"]),
            Route("/v1/embeddings", self.guarded(self.answering.embeddings), methods=["POST"]),
            Route("/api/chat", self.guarded(self.answering.ollama_chat), methods=["POST"]),
            Route("/api/generate", self.guarded(self.answering.ollama_generate), methods=["POST"]),
            Route("/api/embed", self.guarded(self.answering.ollama_embed), methods=["POST"]),
            Route("/api/embeddings", self.guarded(self.answering.ollama_embed), methods=["POST"]),
            Route("/api/tags", self.guarded(self.ollama_tags)),
            Route("/api/ps", self.guarded(self.ollama_ps)),
            Route("/api/show", self.guarded(self.ollama_show), methods=["POST"]),
            Route("/api/version", self.guarded(self.ollama_version)),
            Route("/v1/load_lora_adapter", self.guarded(self.load_lora), methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.guarded(self.unload_lora), methods=["POST"]),
            Route("/v1/adapters", self.guarded(self.add_adapter), methods=["POST"]),
            Route("/v1/adapters/{name}", self.guarded(self.remove_adapter), methods=["DELETE"]),
        ]
        handlers: dict[Any, Any] = {
            status: lambda request, why, error=error: error_response(
                error, request.url.path, getattr(why, "headers", None)
            )
            for status, error in (
                (404, ApiError(404, "There is no such path.", code="not_found")),
                (405, ApiError(405, "This path does not take this method.")),
                (500, ApiError(500, "Internal error.", kind="server_error")),
            )
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)
        app.router.redirect_slashes = False  # to an address as this server sees it, which behind a proxy is another
        return Guard(app, self.settings)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start the engine; at the end let it finish what is under way."""
        self.engine.start()
        try:
            yield
        finally:  # however the loop ends: an engine that computes while Python ends would bring the process down
            self.answering.tokenizing.stop()
            await asyncio.to_thread(self.engine.stop)

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the API key, its refusals as OpenAI's errors."""

        async def guard(request: Request) -> Response:
            try:
                if request.scope["who"] is None:
                    raise ApiError(401, "The API key is wrong or missing.", code="invalid_api_key")
                if request.method == "POST":
                    request.scope["held"].enter_context(self._limits.one(request.scope["who"]))
                return await handler(request)
            except ApiError as error:
                self.engine.metrics.add("refusals_total", status=str(error.status))
                return error_response(error, request.url.path)
            except ClientDisconnect:
                return Response(status_code=499)

        return guard

    # -- small paths -----------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        """A page to chat with several adapters side by side."""
        told = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
        return FileResponse(PAGE / "index.html", headers={**told, **FRESH})

    async def live(self, _: Request) -> Response:
        """Whether the engine works; if not, only a new start helps."""
        return health("ok" if self.engine.alive else "down")

    async def ready(self, _: Request) -> Response:
        """Whether a proxy may send requests here: not to a server that is about to end."""
        return health("down" if not self.engine.alive else "leaving" if self.leaving else "ok")

    async def metrics(self, _: Request) -> Response:
        """Prometheus' page."""
        self.engine.update_gauges()
        return PlainTextResponse(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """Every name that `model` may have."""
        return JSONResponse({"object": "list", "data": [self.model_record(name) for name in self.engine.catalog.names]})

    async def model(self, request: Request) -> Response:
        """One model's record."""
        name = request.path_params["name"]
        self.engine.catalog.resolve(name, "")
        return JSONResponse(self.model_record(name))

    def model_record(self, name: str) -> dict[str, Any]:
        """What `/v1/models` tells of a name; `parent` is the base of an adapter."""
        served = self.engine.catalog.served.get(name)
        record = {"id": name, "object": "model", "created": self.started, "owned_by": "mlx_adapters"}
        record |= {"max_model_len": self.engine.model.base.context}
        if served is not None:
            record |= {"parent": self.engine.catalog.base_name, "resident": served.resident}
        for split in self.settings.splits:
            if split.name == name:
                record |= {"split": dict(split.arms)}
        return record

    async def ollama_tags(self, _: Request) -> Response:
        """Ollama's list of models."""
        return JSONResponse({"models": [self._listed(name) for name in self.engine.catalog.names]})

    async def ollama_ps(self, _: Request) -> Response:
        """Ollama's list of what is in memory."""
        catalog = self.engine.catalog
        names = [catalog.base_name, *(name for name, served in catalog.served.items() if served.resident)]
        return JSONResponse({"models": [self._listed(name) for name in names]})

    def _listed(self, name: str) -> dict[str, Any]:
        served = self.engine.catalog.served.get(name)
        adapter = (served.fingerprint, served.stored_bytes) if served else (None, 0)
        return self.records.listed(name, self.engine.catalog.base_name, *adapter)

    async def ollama_show(self, request: Request) -> Response:
        """What Ollama's clients ask of a model before they chat with it."""
        fields, catalog = await self.answering.fields(request), self.engine.catalog
        name = catalog.resolve(ollama_name(fields), "")
        fields.value("verbose")
        fields.refuse_rest()
        return JSONResponse(self.records.shown(name, catalog.base_name, catalog.template_of(name).chat_template))

    async def ollama_version(self, _: Request) -> Response:
        """What Ollama's clients ask first."""
        return JSONResponse({"version": version("mlx_adapters")})

    async def add_adapter(self, request: Request) -> Response:
        """POST {"name": NAME, "reference": NAME[@ITERATION]}: serve a registered adapter too."""
        self.check_loading()
        raw = (await self.answering.fields(request)).raw
        name, reference = raw.get("name"), raw.get("reference", raw.get("name"))
        if not isinstance(name, str) or not isinstance(reference, str) or set(raw) - {"name", "reference"}:
            raise ApiError(400, "Send 'name' and, if it is called otherwise, its 'reference'.")
        await self.load(name, reference)
        return JSONResponse(self.model_record(name), 201)

    async def load_lora(self, request: Request) -> Response:
        """vLLM's form of it: `lora_path` is an adapter's name."""
        self.check_loading()
        fields = await self.answering.fields(request)
        name, reference = fields.take("lora_name", str), fields.take("lora_path", str)
        fields.value("base_model_name"), fields.value("load_inplace")
        fields.refuse_rest()
        if not name or not reference:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
        await self.load(name, reference)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def load(self, name: str, reference: str) -> None:
        """Serve a registered adapter. Raises ApiError."""
        try:
            check_name(name)
            if reference_of(reference).kind != "name":
                raise ApiError(403, "Only adapters of the registry can be loaded.", param="reference")
            await self.engine.add_adapter(name, reference)
        except AdapterError as error:
            raise ApiError(404 if "No adapter named" in error.message else 400, public(error.message)) from None

    async def remove_adapter(self, request: Request) -> Response:
        """Serve an adapter no more."""
        self.check_loading()
        name = request.path_params["name"]
        self.unload(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def unload_lora(self, request: Request) -> Response:
        """vLLM's form of it."""
        self.check_loading()
        fields = await self.answering.fields(request)
        name = fields.take("lora_name", str)
        fields.value("lora_int_id")
        fields.refuse_rest()
        if not name:
            raise ApiError(400, "'lora_name' must be provided.", param="lora_name")
        self.unload(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    def unload(self, name: str) -> None:
        """Serve an adapter no more. Raises ApiError."""
        if name not in self.engine.catalog.served:
            raise ApiError(404, f"The adapter '{name}' is not served.", code="model_not_found")
        if any(name == arm for split in self.settings.splits for arm, _ in split.arms):
            raise ApiError(409, f"'{name}' is an arm of a split.")
        self.engine.remove_adapter(name)

    def check_loading(self) -> None:
        """Raise ApiError 403 unless loading at run time is allowed."""
        if not self.settings.allow_load:
            raise ApiError(403, "Loading adapters is off; start the server with --allow-load.")
