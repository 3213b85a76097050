"""The HTTP side: OpenAI's paths, adapters, metrics, health and a page, on Starlette."""

import asyncio
import contextlib
import hashlib
import hmac
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from importlib.resources import files as package_files
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.errors import AdapterError, ModelError
from mlx_adapters.serving import protocol
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.jobs import ApiError, Job, Piece
from mlx_adapters.serving.protocol import Asked, ResponseWriter, usage
from mlx_adapters.serving.transport import EventStream, error_response, left, read_body
from mlx_adapters.sources.references import check_name, parse_reference


class Server:
    """The handlers of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.settings = engine, engine.settings
        self.tokenizer = engine.model.tokenizer
        self._keys = [hashlib.sha256(key.encode()).digest() for key in self.settings.api_keys]
        self._tokenizing = threading.Lock()

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and drains the engine."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.guarded(self.metrics)),
            Route("/v1/models", self.guarded(self.models)),
            Route("/v1/models/{name:path}", self.guarded(self.model)),
            Route("/v1/chat/completions", self.guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self.guarded(self.completion), methods=["POST"]),
            Route("/v1/adapters", self.guarded(self.add_adapter), methods=["POST"]),
            Route("/v1/adapters/{name}", self.guarded(self.remove_adapter), methods=["DELETE"]),
        ]
        handlers: dict[Any, Any] = {
            404: lambda *_: error_response(ApiError(404, "There is no such path.", code="not_found")),
            405: lambda *_: error_response(ApiError(405, "This path does not take this method.")),
            500: lambda *_: error_response(ApiError(500, "Internal error.", kind="server_error")),
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start the engine; at the end let it finish what is under way."""
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop)

    def guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The handler behind the API key, its refusals as OpenAI's errors."""

        async def guard(request: Request) -> Response:
            try:
                self.check_key(request)
                return await handler(request)
            except ApiError as error:
                self.engine.metrics.add("refusals_total", status=str(error.status))
                return error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)

        return guard

    def check_key(self, request: Request) -> None:
        """Raise ApiError 401 unless a key is given (compared in constant time) or none is needed."""
        if not self._keys:
            return
        header = request.headers.get("authorization", "")
        given = header[7:].strip() if header[:7].lower() == "bearer " else header
        digest = hashlib.sha256(given.encode()).digest()
        if not any([hmac.compare_digest(digest, key) for key in self._keys]):
            raise ApiError(401, "The API key is wrong or missing.", code="invalid_api_key")

    # -- small paths -----------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        """A page to chat with two adapters side by side."""
        html = package_files("mlx_adapters.serving").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def health(self, _: Request) -> Response:
        """Whether the engine works."""
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "down"}, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        """Prometheus' page."""
        self.engine.update_gauges()
        return PlainTextResponse(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        """Every name that `model` may have."""
        return JSONResponse({"object": "list", "data": [self.model_record(name) for name in self.engine.names]})

    async def model(self, request: Request) -> Response:
        """One model's record."""
        name = request.path_params["name"]
        self.engine.resolve(name, "")
        return JSONResponse(self.model_record(name))

    def model_record(self, name: str) -> dict[str, Any]:
        """What `/v1/models` tells of a name; `parent` is the base of an adapter."""
        served = self.engine.served.get(name)
        record = {"id": name, "object": "model", "created": 0, "owned_by": "mlx_adapters"}
        if served is not None:
            record |= {"parent": self.engine.base_name, "resident": served.resident}
        for split in self.settings.splits:
            if split.name == name:
                record |= {"split": dict(split.arms)}
        return record

    async def add_adapter(self, request: Request) -> Response:
        """POST {"name": NAME, "reference": NAME[@ITERATION]}: serve a registered adapter too."""
        self.check_loading()
        raw = await self.json(request)
        name, reference = raw.get("name"), raw.get("reference", raw.get("name"))
        if not isinstance(name, str) or not isinstance(reference, str) or set(raw) - {"name", "reference"}:
            raise ApiError(400, "Send 'name' and, if it is called otherwise, its 'reference'.")
        try:
            check_name(name)
            if parse_reference(reference).kind != "name":
                raise ApiError(403, "Only adapters of the registry can be loaded.", param="reference")
            if name in self.engine.names:
                raise ApiError(409, f"'{name}' is served already.", param="name")
            await asyncio.to_thread(self.engine.add_adapter, name, reference)
        except AdapterError as error:
            raise ApiError(404 if "No adapter named" in error.message else 400, error.message) from None
        return JSONResponse(self.model_record(name), 201)

    async def remove_adapter(self, request: Request) -> Response:
        """Serve an adapter no more."""
        self.check_loading()
        name = request.path_params["name"]
        if name not in self.engine.served:
            raise ApiError(404, f"The adapter '{name}' is not served.", code="model_not_found")
        if any(name == arm for split in self.settings.splits for arm, _ in split.arms):
            raise ApiError(409, f"'{name}' is an arm of a split.")
        self.engine.remove_adapter(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    def check_loading(self) -> None:
        """Raise ApiError 403 unless loading at run time is allowed."""
        if not self.settings.allow_load:
            raise ApiError(403, "Loading adapters is off; start the server with --allow-load.")

    async def json(self, request: Request) -> dict[str, Any]:
        """The JSON object of the request's body. Raises ApiError."""
        return protocol.read_json(await read_body(request, self.settings.max_body_bytes))

    # -- answers ---------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        raw = await self.json(request)
        asked, messages = protocol.read_request(raw, chat=True), protocol.read_messages(raw)
        model = self.engine.resolve(asked.model, asked.user)
        arguments = protocol.read_template_arguments(raw)
        prompt = await asyncio.to_thread(self.chat_tokens, messages, model, arguments)
        return await self.answer(request, asked, model, prompt, chat=True)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        raw = await self.json(request)
        asked, prompt = protocol.read_request(raw, chat=False), protocol.read_prompt(raw, self.engine.model.vocabulary)
        model = self.engine.resolve(asked.model, asked.user)
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(self.text_tokens, prompt)
        return await self.answer(request, asked, model, prompt, chat=False)

    def chat_tokens(self, messages: list[dict[str, str]], model: str, arguments: dict[str, Any]) -> list[int]:
        """The prompt of a chat, through the model's template. Raises ApiError 400."""
        own = self.engine.template_of(model)
        if not (self.engine.model.has_template or own.chat_template):
            raise ApiError(400, "This model has no chat template; use /v1/completions.", param="messages")
        with self._tokenizing:
            try:
                asked = TemplateConfig(chat_template_args=arguments)
                return self.engine.model.encode_chat(messages, template=asked, own=own)
            except AdapterError as error:
                raise ApiError(400, error.message[:240], param="messages") from None

    def text_tokens(self, text: str) -> list[int]:
        """The tokens of a plain prompt."""
        with self._tokenizing:
            return list(self.tokenizer.encode(text))

    async def answer(self, request: Request, asked: Asked, model: str, prompt: list[int], chat: bool) -> Response:
        """Put a job in and answer with its text, streamed or whole."""
        where = "messages" if chat else "prompt"
        if not all(token < self.engine.model.vocabulary for token in prompt):
            raise ApiError(400, "The text has tokens that the model does not know.", param=where)
        limit = self.token_limit(asked, len(prompt), where)
        job = Job(model, prompt, replace(asked.sampling, max_tokens=limit), asked.top_logprobs, continues=not chat)
        writer = ResponseWriter(asked, model, chat, lambda token: self.tokenizer.decode([token]))
        self.engine.submit(job)
        headers = {"X-Adapter": quote(model, safe="/:@ ")}
        if asked.stream:
            chunks = self.chunks(job, writer, asked)
            return EventStream(chunks, lambda: self.engine.cancel(job), self.settings.write_seconds, headers)
        return JSONResponse(await self.whole(request, job, writer), headers=headers)

    def token_limit(self, asked: Asked, prompt_tokens: int, where: str) -> int:
        """How many tokens may be written. Raises ApiError 400 beyond the context or the server's limit."""
        most = asked.max_tokens or min(protocol.DEFAULT_MAX_TOKENS, self.settings.max_tokens)
        try:
            room = self.engine.model.room(prompt_tokens, most)
        except ModelError as error:
            raise ApiError(400, error.message, param=where, code="context_length_exceeded") from None
        if asked.max_tokens and asked.max_tokens > room:
            raise ApiError(
                400,
                f"The prompt has {prompt_tokens} tokens and {asked.max_tokens} were asked for; the "
                f"model's context has room for {room}.",
                param=where,
                code="context_length_exceeded",
            )
        if (asked.max_tokens or 0) > self.settings.max_tokens:
            raise ApiError(400, f"max_tokens may be at most {self.settings.max_tokens} here.", param="max_tokens")
        return room

    async def whole(self, request: Request, job: Job, writer: ResponseWriter) -> dict[str, Any]:
        """Wait for the answer, or for the client to go away."""
        gone = asyncio.ensure_future(left(request.receive))
        text, tokens = "", []
        try:
            while True:
                event = asyncio.ensure_future(job.events.get())
                await asyncio.wait([event, gone], return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise ClientDisconnect
                piece = event.result()
                if isinstance(piece, ApiError):
                    raise piece
                text += piece.text
                tokens += piece.tokens
                if piece.finish_reason is not None:
                    return writer.whole(
                        text, tokens, piece.finish_reason, usage(len(job.prompt), piece.completion_tokens)
                    )
        finally:
            gone.cancel()
            self.engine.cancel(job)

    async def chunks(self, job: Job, writer: ResponseWriter, asked: Asked) -> AsyncIterator[dict[str, Any] | ApiError]:
        """The chunks of a stream."""
        first = True
        while True:
            piece: Piece | ApiError = await job.events.get()
            if isinstance(piece, ApiError):
                yield piece
                return
            if piece.finish_reason is None or piece.text or piece.tokens or first:
                yield writer.chunk(piece.text, piece.tokens, None, first)
                first = False
            if piece.finish_reason is not None:
                yield writer.chunk(None, (), piece.finish_reason, False)
                if asked.include_usage:
                    yield writer.usage_chunk(usage(len(job.prompt), piece.completion_tokens))
                return
