"""One answer, token by token: what comes of each step, and of all.

Tokens become text while they come, and stop words may begin in one token and end in another.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.drafting import one_token
from mlx_adapters.drafting.checking import Drafts, drafted_steps
from mlx_adapters.errors import ConfigError
from mlx_adapters.generation.sampling import Sampler, are_numbers, stop_tokens
from mlx_adapters.models.model import Model, names_of, no_numbers
from mlx_adapters.prompt_caches.layers import count_of, shortened
from mlx_adapters.prompt_caches.quantized import new_layers, reaching
from mlx_adapters.runtime.attached import Selection
from mlx_adapters.surgery.blocks import by_block
from mlx_adapters.surgery.cuda import generating
from mlx_adapters.system.door import generate_step, mx

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or a conversation's messages


PLAIN = Sampling()


@dataclass(frozen=True)
class Response:
    """One step of an answer.

    Args:
        text: what is new; it may be empty.
        token: the token of this step.
        logprobs: the log-probabilities that it was chosen from, (vocabulary,).
        prompt_tokens: how many tokens the prompt had.
        finish_reason: with the last one "stop" (the model ended it, or a stop text came), "length" or "context".
        guessed_tokens: how many tokens were guessed for this answer until now (`Drafting`).
        accepted_tokens: how many of them were right.

    Example:
        >>> steps = list(ma.load_model("demo").stream("What is the capital of France?", max_tokens=8))
        >>> len(steps) <= 8, steps[-1].finish_reason in ("stop", "length")
        (True, True)
    """

    text: str
    token: int
    logprobs: mx.array
    prompt_tokens: int
    finish_reason: str | None = None
    guessed_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Args:
        text: the answer.
        token_ids: its tokens, without the prompt's and the one that ends it.
        prompt_tokens: how many the prompt had.
        finish_reason: "stop" (the model ended it, or a stop text came), "length" or "context".
        seconds_to_first_token: from the call.
        seconds: of the whole answer.
        guessed_tokens: how many tokens were guessed (`Drafting`).
        accepted_tokens: how many of them were right.

    Example:
        >>> answer = ma.load_model("demo").generate("List the Physics courses.", max_tokens=4)
        >>> len(answer.token_ids) <= 4
        True
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    seconds_to_first_token: float
    seconds: float
    guessed_tokens: int = 0
    accepted_tokens: int = 0


def gathered(steps: Iterator[Response], ends: Collection[int]) -> Generation:
    """All steps of an answer together; `ends` are the tokens that end one."""
    start, first, given = time.perf_counter(), 0.0, []
    for step in steps:
        first = first or time.perf_counter() - start
        given.append(step)
    last, tokens = given[-1], [step.token for step in given]
    reason = last.finish_reason or "length"
    return Generation(
        "".join(step.text for step in given),
        tokens[:-1] if reason == "stop" and tokens[-1] in ends else tokens,
        given[0].prompt_tokens,
        reason,
        first,
        time.perf_counter() - start,
        last.guessed_tokens,
        last.accepted_tokens,
    )


def ids_of(
    model: Model, prompt: Prompt, raw: bool = False, own: TemplateConfig | None = None
) -> Sequence[int] | mx.array:
    """Token ids of a prompt in any of its forms; `own` as for `Model.encode_chat`.

    Raises ModelError; ConfigError for a conversation that is to be raw.
    """
    if isinstance(prompt, str):
        return model.encode(prompt, raw, own)
    if isinstance(prompt, Sequence) and any(isinstance(part, Mapping) for part in prompt):
        if raw:
            raise ConfigError("A conversation goes through the chat template.", "raw=True takes a text or token ids.")
        return model.encode_chat(prompt, own=own)  # type: ignore[arg-type]
    return prompt  # type: ignore[return-value]


def decode(
    model: Model,
    ids: mx.array,
    sampler: Sampler,
    before: int = 0,
    cache: list[Any] | None = None,
    drafts: Drafts | None = None,
    kv: CacheQuantization | None = None,
) -> Generator[Response]:
    """The steps of the answer to `ids` (tokens,); `before` more are in `cache`. `drafts`: guesses that are checked.

    `kv`: when the cache is quantized.
    """
    wanted = sampler.sampling.max_tokens
    room = model.room(before + ids.size, wanted)
    how = sampler.sampling
    ends, text = stop_tokens(how, model.tokenizer), TextStream(model.tokenizer, how)
    if drafts is not None:  # what is guessed and forgotten is not quantized on the way
        kv = reaching(kv, before + ids.size + room)
    cache = new_layers(model.module, kv) if cache is None else cache
    finished: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if drafts is None:
        called = by_block(model.module)
        if kv is None and one_token.serves():
            called = finished = one_token.OneToken(model.module)
        processors = [sampler.process] if sampler.processors else None
        steps = generate_step(
            ids,
            _reading_fast(called),
            max_tokens=room,
            sampler=sampler,
            logits_processors=processors,
            prompt_cache=cache,
            **({} if kv is None else vars(kv)),
        )
    else:
        steps = drafted_steps(ids.tolist(), model.module, cache, drafts, sampler.step, sampler.foresee, room)
    with finished, _ending(steps):
        for made, (token, logprobs) in enumerate(steps, start=1):
            if token == 0 and not are_numbers(logprobs).item():  # of no numbers a sampler takes 0
                raise no_numbers(model.module, *names_of(model))
            piece = text.add(token) if token not in ends else ""
            reason = "stop" if token in ends or text.stopped else None
            if reason is None and made == room:
                reason = "length" if room == wanted else "context"
            piece += text.finish() if reason else ""
            if text.stopped:
                reason = "stop"
            counts = (drafts.guessed, drafts.accepted) if drafts else ()
            yield Response(piece, token, logprobs, ids.size, reason, *counts)
            if reason:
                return


@contextlib.contextmanager
def _ending(steps: Generator[Any]) -> Iterator[None]:
    """Not every Python ends what an ended generator was reading. A web server may read an answer from several threads:
    where the last is not the first, mlx-lm's generator says at its end that its stream is another thread's."""
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            steps.close()


def _reading_fast(model: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The model, whose prompts are read as those that join a batch."""

    def call(tokens: mx.array, **options: Any) -> mx.array:
        with generating() if tokens.size > 1 else contextlib.nullcontext():
            return model(tokens, **options)

    return call


@dataclass(eq=False)
class PromptCache:
    """Keys and values of `tokens`, bound to the adapters they were computed with. `make` gives empty layers."""

    layers: list[Any]
    selection: Selection
    make: Callable[[], list[Any]]
    tokens: list[int] = field(default_factory=list)

    def beginning(self, token_ids: Sequence[int]) -> "PromptCache":
        """What of it `token_ids` begin with: itself, a part, or an empty one where it cannot be cut exactly."""
        pairs = zip(self.tokens, token_ids, strict=False)
        common = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        common = min(len(self.tokens), len(token_ids)) if common is None else common
        if common == len(self.tokens):
            return self
        layers = shortened(self.layers, common, self.make) if common else None
        if layers is None:
            return PromptCache(self.make(), self.selection, self.make)
        return PromptCache(layers, self.selection, self.make, self.tokens[:common])

    def noted(self, ids: Sequence[int], steps: Generator[Response], exactly: bool) -> Generator[Response]:
        """The steps that it reads `ids` in; then it knows its tokens. What was stopped within a step holds none.

        `exactly`: it has read what was given out, and nothing more. Until the steps end it is empty.
        """
        tokens, whole, layers = [*self.tokens, *ids], False, self.layers
        self.tokens, self.layers = [], self.make()
        try:
            for step in steps:
                tokens.append(step.token)
                yield step
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            steps.close()
            count = count_of(layers)
            if count is None and exactly:
                count = len(tokens)
            if whole and count is not None and count <= len(tokens):
                self.tokens, self.layers = tokens[:count], layers


class TextStream:
    """The text of one answer. Text that may be the beginning of a stop word is held back until it is not.

    With `continues` it goes on from a text: a space that it begins with is kept, which mlx-lm takes off. The stop words
    are those of `sampling`, which may ask for some tokens before they count.
    """

    def __init__(self, tokenizer: Any, sampling: Sampling = PLAIN, continues: bool = False) -> None:
        self._detokenizer, self._stop, self._held = tokenizer.detokenizer, sampling.stop, ""
        self._left = sampling.min_tokens
        self.stopped = False
        if continues:
            with contextlib.suppress(AttributeError):  # those that compute their text take nothing off
                self._detokenizer.text, self._detokenizer.offset = ".", 1

    def add(self, token: int) -> str:
        """The text that is certain after this token; sets `stopped` when a stop word is complete."""
        self._detokenizer.add_token(token)
        self._left -= 1
        return self._take(self._detokenizer.last_segment)

    def finish(self) -> str:
        """The rest of the text."""
        self._detokenizer.finalize()
        rest = self._take(self._detokenizer.last_segment)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        if self._left > 0:
            return text
        text = self._held + text
        places = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """How many characters at the end of `text` are the beginning of `word`."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def text_of(tokenizer: Any, tokens: Sequence[int], sampling: Sampling = PLAIN) -> str:
    """The text of these tokens up to the first stop word, as streaming them gives it."""
    stream = TextStream(tokenizer, sampling)
    return "".join([stream.add(token) for token in tokens]) + stream.finish()
