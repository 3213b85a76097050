"""One answer, token by token: what comes of each step, and of all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.drafting.checking import Drafts, drafted_steps
from mlx_adapters.errors import ConfigError
from mlx_adapters.generation.sampling import Sampler, stop_tokens
from mlx_adapters.generation.text_stream import TextStream
from mlx_adapters.models.model import Model
from mlx_adapters.system.door import generate_step, make_prompt_cache, mx

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # a text, token ids, or a conversation's messages


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
) -> Iterator[Response]:
    """The steps of the answer to `ids` (tokens,); `before` more are in `cache`. `drafts`: guesses that are checked."""
    wanted = sampler.sampling.max_tokens
    room = model.room(before + ids.size, wanted)
    how = sampler.sampling
    ends, text = stop_tokens(how, model.tokenizer), TextStream(model.tokenizer, how)
    cache = make_prompt_cache(model.module) if cache is None else cache
    if drafts is None:
        processors = [sampler.process] if sampler.processors else None
        steps = generate_step(
            ids, model.module, max_tokens=room, sampler=sampler, logits_processors=processors, prompt_cache=cache
        )
    else:
        steps = drafted_steps(ids.tolist(), model.module, cache, drafts, sampler.step, sampler.foresee, room)
    for made, (token, logprobs) in enumerate(steps, start=1):
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
