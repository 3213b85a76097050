"""Texts to tokens: off the event loop, long ones apart from short ones, and no further than the context reaches."""

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mlx_adapters.models.model import Model
from mlx_adapters.protocols.errors import ApiError

Result = TypeVar("Result")
LONG_TEXT = 1 << 16  # characters from which a text is tokenized apart, where it keeps no short one waiting


class Tokenizing:
    """Texts to tokens, each thread with a tokenizer of its own: long texts keep short ones waiting in no queue."""

    def __init__(self, model: Model) -> None:
        self._models = {long: self._copied(model) for long in (False, True)}
        self._threads = {long: ThreadPoolExecutor(1, "tokenizing") for long in (False, True)}
        self._waiting = 0
        self._longest = max(map(len, model.tokenizer.get_vocab()), default=1)

    @staticmethod
    def _copied(model: Model) -> Model:
        tokenizer = copy.deepcopy(model.tokenizer)
        return Model(model.module, tokenizer, model.base, model.config, template=model.template)

    async def run(self, size: int, work: Callable[[Model], Result], where: str) -> Result:
        """What `work` makes of a text of `size` characters. Raises ApiError 400 for one that cannot fit the context."""
        long = size > LONG_TEXT
        model = self._models[long]
        context = model.base.context
        if context is not None and size > context * self._longest:
            raise too_long(f"at least {size // self._longest}", context, where)
        if long and self._waiting >= 8:
            raise ApiError(429, "Too many long prompts are waiting.", kind="rate_limit_error", code="queue_full")
        self._waiting += long
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads[long], work, model)
        finally:
            self._waiting -= long

    def stop(self) -> None:
        """End the threads."""
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)


def check_fits(texts: Sequence[str], model: Model, where: str) -> None:
    """Raise ApiError 400 as soon as so much of the texts is tokenized that they cannot fit the model's context.

    Tokens at the end of a piece may differ from those of the whole, so a few of each are not counted.
    """
    context, counted = model.base.context, 0
    if context is None or sum(map(len, texts)) <= 2 * context:
        return
    for text in texts:
        for start in range(0, len(text), LONG_TEXT):
            counted += max(len(model.tokenizer.encode(text[start : start + LONG_TEXT])) - 16, 0)
            if counted > context:
                raise too_long(f"more than {counted}", context, where)


def too_long(tokens: str, context: int, where: str) -> ApiError:
    """The refusal of a prompt."""
    message = f"The prompt has {tokens} tokens; the model's context has {context}."
    return ApiError(400, message, param=where, code="context_length_exceeded")
