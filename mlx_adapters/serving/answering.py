"""From a request to its answers: prompts, what may be written, jobs for the engine, what is told of them."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mlx_adapters.answers.constraints import Constraint, Grammar, Grammars
from mlx_adapters.answers.reading import Answer, AnswerReader
from mlx_adapters.answers.tokens import TokenTexts
from mlx_adapters.errors import ModelError
from mlx_adapters.models.model import Model, prompt_tokens
from mlx_adapters.protocols.chat import CompletionWriter, FunctionWriter, Writer, embeddings_body
from mlx_adapters.protocols.conversation import Conversation, has_functions, read_conversation
from mlx_adapters.protocols.errors import ApiError, told_as
from mlx_adapters.protocols.fields import Fields, read_json
from mlx_adapters.protocols.ollama import (
    GenerateWriter,
    OllamaWriter,
    of_length_one,
    ollama_name,
    read_embed,
    read_ollama,
)
from mlx_adapters.protocols.options import Asked, read_options, read_prompts
from mlx_adapters.protocols.prompts import Prepared, Tokenizing, check_fits, plain_grammar, prepared
from mlx_adapters.protocols.responses import ResponseWriter, read_response
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.jobs import Job, Reply
from mlx_adapters.serving.transport import EventStream, left, read_body

DEFAULT_MAX_TOKENS = 512
HEADERS = "X-Ignored-Fields"


class Answering:
    """The handlers that make the model write."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.settings, self.model = engine, engine.settings, engine.model
        self.tokenizer = engine.model.tokenizer
        self.grammars = Grammars(self.tokenizer, self.model.vocabulary)
        self.tokenizing, self.texts = Tokenizing(self.model), TokenTexts(self.tokenizer)
        known = f"{engine.catalog.base_name} {self.model.base.fingerprint}"
        self.fingerprint = "fp_" + hashlib.sha256(known.encode()).hexdigest()[:12]

    async def fields(self, request: Request) -> Fields:
        """The fields of a request's body. Raises ApiError."""
        body = await read_body(request, self.settings.max_body_bytes)
        return Fields(read_json(body), self.settings.lenient)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        fields = await self.fields(request)
        asked, talk = read_options(fields, True, self.model.vocabulary), read_conversation(fields)
        fields.refuse_rest()
        return await self.converse(request, fields, asked, talk, FunctionWriter if has_functions(fields) else Writer)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        fields = await self.fields(request)
        asked = read_options(fields, False, self.model.vocabulary)
        given = read_prompts(fields.value("prompt"), self.model.vocabulary)
        fields.refuse_rest()
        model = self.engine.catalog.resolve(asked.model, asked.user)
        prompts = [await self.plain_tokens(prompt) for prompt in given]
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in given] if asked.echo else []
        writer = CompletionWriter(asked, model, self.fingerprint, self.texts, texts)
        return await self.answer(request, fields, asked, model, prompts, writer, lambda: None, plain_grammar(asked))

    async def response(self, request: Request) -> Response:
        """POST /v1/responses."""
        fields = await self.fields(request)
        asked, talk = read_response(fields, self.model.vocabulary)
        fields.refuse_rest()
        return await self.converse(request, fields, asked, talk, partial(ResponseWriter, fields.raw))

    async def response_tokens(self, request: Request) -> Response:
        """POST /v1/responses/input_tokens: how many a response's conversation has."""
        fields = await self.fields(request)
        asked, talk = read_response(fields, self.model.vocabulary)
        fields.refuse_rest()
        model = self.engine.catalog.resolve(asked.model, asked.user)
        prompt, _, _ = await self._prepared(model, asked, talk, ResponseWriter.asks_in)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(prompt)})

    async def ollama_chat(self, request: Request) -> Response:
        """POST /api/chat."""
        return await self._ollama(request, OllamaWriter)

    async def ollama_generate(self, request: Request) -> Response:
        """POST /api/generate."""
        return await self._ollama(request, GenerateWriter)

    async def _ollama(self, request: Request, writer: type[OllamaWriter]) -> Response:
        fields = await self.fields(request)
        if fields.value(writer.asks_in) in (None, "", []):  # so clients ask for the model to be in memory
            name = self.engine.catalog.resolve(ollama_name(fields), None)
            return JSONResponse(writer.loaded(name, fields.value("keep_alive")))
        raw = not writer.chat and fields.take("raw", bool, False)
        if raw and fields.raw.get("system"):
            raise ApiError(
                400, "With 'raw' the prompt is all that is read: there is no place for 'system'.", param="system"
            )
        asked, talk = read_ollama(fields, writer.chat, self.model.vocabulary)
        fields.refuse_rest()
        if not raw:
            return await self.converse(request, fields, asked, talk, writer)
        model, prompt = self.engine.catalog.resolve(asked.model, None), talk.messages[-1]["content"]
        made, tokens = writer(asked, model, self.fingerprint, self.texts), await self.plain_tokens(prompt)
        return await self.answer(request, fields, asked, model, [tokens], made, lambda: None, plain_grammar(asked))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: the mean of the last hidden state of each text."""
        fields = await self.fields(request)
        name = fields.model()
        given = read_prompts(fields.value("input"), self.model.vocabulary, "input")
        packed = fields.take("encoding_format", str, "float")
        if packed not in ("float", "base64"):
            raise ApiError(400, "'encoding_format' must be 'float' or 'base64'.", param="encoding_format")
        user, width = fields.take("user", str), fields.take("dimensions", int, None, 1)
        fields.refuse_rest()
        model = self.engine.catalog.resolve(name, user)
        vectors, tokens = await self._embedded(model, given, width, "input")
        return JSONResponse(embeddings_body(vectors, model, tokens, packed == "base64"))

    async def ollama_embed(self, request: Request) -> Response:
        """POST /api/embed, and /api/embeddings, what it was before: of one text."""
        fields, began = await self.fields(request), time.monotonic_ns()
        name, alone = ollama_name(fields), request.url.path.endswith("/embeddings")
        where = "prompt" if alone else "input"
        given = read_prompts(fields.take(where, str) if alone else fields.value(where), self.model.vocabulary, where)
        width = read_embed(fields)
        fields.refuse_rest()
        model = self.engine.catalog.resolve(name, None)
        vectors, tokens = await self._embedded(model, given, width, where)
        if alone:
            return JSONResponse({"embedding": vectors[0]})
        told = {"total_duration": time.monotonic_ns() - began, "load_duration": 0, "prompt_eval_count": tokens}
        return JSONResponse({"model": model, "embeddings": list(map(of_length_one, vectors)), **told})

    async def _embedded(
        self, model: str, given: Sequence[str | list[int]], width: int | None, where: str
    ) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens were read."""
        prompts = [await self.plain_tokens(prompt, where, whole=True) for prompt in given]
        with told_as(where):
            for prompt in prompts:
                self.model.checked_ids(prompt)
                self.model.room(len(prompt), 1)
            vectors = await self.engine.embed(model, prompts)
        if width is not None and width != (own := len(vectors[0])):
            why = f"A vector has {own} numbers here, of which none can be left out."
            raise ApiError(400, why, param="dimensions")
        return vectors, sum(map(len, prompts))

    async def plain_tokens(self, prompt: str | list[int], where: str = "prompt", whole: bool = False) -> list[int]:
        """The tokens of a text that goes through no template: one to go on with, or a `whole` one, which may end in
        EOS. Raises ApiError 400 beyond the context."""
        if not isinstance(prompt, str):
            return prompt

        def encoded(model: Model) -> list[int]:
            check_fits([prompt], model, where)
            return list(model.tokenizer.encode(prompt)) if whole else prompt_tokens(prompt, model.tokenizer)

        return await self.tokenizing.run(len(prompt), encoded, where)

    async def converse(
        self, request: Request, fields: Fields, asked: Asked, talk: Conversation, writer: Callable[..., Writer]
    ) -> Response:
        """Answer a conversation in the words of `writer`."""
        model = self.engine.catalog.resolve(asked.model, asked.user)
        made = writer(asked, model, self.fingerprint, self.texts)
        prompt, read, grammar = await self._prepared(model, asked, talk, made.asks_in)
        return await self.answer(request, fields, asked, model, [prompt], made, read, grammar)

    async def _prepared(self, model: str, asked: Asked, talk: Conversation, where: str) -> Prepared:
        """A conversation's prompt, and what follows from it; `where`: the field that holds the conversation."""
        own = self.engine.catalog.template_of(model)
        if not (self.model.has_template or own.chat_template):
            raise ApiError(400, "This model has no chat template; use /v1/completions.", param=where)
        size = sum(len(str(m.get("content"))) + len(str(m.get("tool_calls", ""))) for m in talk.messages)
        return await self.tokenizing.run(
            size, lambda with_: prepared(with_, own, asked, talk, self.grammars, where), where
        )

    # -- jobs ------------------------------------------------------------------------------------------

    async def answer(
        self,
        request: Request,
        fields: Fields,
        asked: Asked,
        model: str,
        prompts: Sequence[list[int]],
        writer: Writer,
        read: Callable[[], AnswerReader | None],
        grammar: Grammar | None,
    ) -> Response:
        """Put jobs in and answer with what they write, streamed or whole."""
        jobs = await self._jobs(asked, model, prompts, writer, grammar)
        told = request.scope["told"]
        reply = Reply(asked, prompts, jobs, [Answer(read()) for _ in jobs], writer, told)
        self.engine.submit(*jobs)
        told |= {"model": model, "prompt_tokens": sum(map(len, prompts)), "completion_tokens": 0}
        headers = {"X-Adapter": quote(model, safe="/:@ ")}
        if fields.ignored:
            headers[HEADERS] = quote(", ".join(fields.ignored), safe=", ._[]")
        if asked.stream:
            cancel = partial(self.engine.cancel, *jobs)
            return EventStream(reply.chunks(), cancel, headers, writer)
        try:
            return JSONResponse(await reply.whole(left(request.receive)), headers=headers)
        finally:
            self.engine.cancel(*jobs)

    async def _jobs(
        self, asked: Asked, model: str, prompts: Sequence[list[int]], writer: Writer, grammar: Grammar | None
    ) -> list[Job]:
        jobs, events = [], asyncio.Queue[Any]()
        for prompt in prompts:
            if not all(token < self.model.vocabulary for token in prompt):
                raise ApiError(400, "The text has tokens that the model does not know.", param=writer.asks_in)
            limit = self.token_limit(asked, len(prompt), writer)
            with told_as("min_tokens"):
                how = replace(asked.sampling, max_tokens=limit)
            for number in range(asked.choices):
                seed = None if how.seed is None else (how.seed + number) % 2**63
                jobs.append(
                    Job(
                        model,
                        prompt,
                        replace(how, seed=seed),
                        asked.logprobs,
                        continues=writer.continues,
                        constraint=await self._constraint(grammar),
                        scores=asked.echo and asked.logprobs is not None,
                        events=events,
                    )
                )
        return jobs

    async def _constraint(self, grammar: Grammar | None) -> Constraint | None:
        if grammar is None:
            return None
        with told_as("response_format"):
            return await asyncio.to_thread(self.grammars.constraint, grammar)

    def token_limit(self, asked: Asked, prompt_tokens: int, writer: Writer) -> int:
        """How many tokens may be written. Raises ApiError 400 beyond the context or the server's limit."""
        where, limit = writer.asks_in, writer.limits
        wanted = max(asked.max_tokens, 1) if asked.max_tokens is not None else None
        try:
            room = self.model.room(prompt_tokens, wanted or min(DEFAULT_MAX_TOKENS, self.settings.max_tokens))
        except ModelError as error:
            raise ApiError(400, error.message, param=where, code="context_length_exceeded") from None
        if wanted and wanted > room:
            raise ApiError(
                400,
                f"The prompt has {prompt_tokens} tokens and {wanted} were asked for; the "
                f"model's context has room for {room}.",
                param=where,
                code="context_length_exceeded",
            )
        if (wanted or 0) > self.settings.max_tokens:
            raise ApiError(400, f"'{limit}' may be at most {self.settings.max_tokens} here.", param=limit)
        return room
