"""The options of a request: who is asked, how tokens are chosen, what form the answer has.

Names are OpenAI's, and where it has none those of mlx-lm's and vLLM's servers.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_adapters.answers.schemas import check_schema
from mlx_adapters.config.sampling import Sampling
from mlx_adapters.protocols.errors import ApiError, told_as
from mlx_adapters.protocols.fields import EMPTY, Fields

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP_LOGPROBS, MAX_CHOICES, MAX_PROMPTS = 1024, 1024, 20, 128, 1024
WINDOWS = ("repetition_context_size", "presence_context_size", "frequency_context_size")


@dataclass(frozen=True)
class ResponseFormat:
    """The JSON schema that an answer must satisfy."""

    schema: dict[str, Any]
    strict: bool


@dataclass(frozen=True)
class Asked:
    """A checked request, but for prompt and conversation.

    `max_tokens` None: what the context leaves, up to the server's default; that of `sampling` means nothing.
    `logprobs` None: none are told; n: also those of the n likeliest tokens. `choices`: answers to each prompt.
    """

    model: str
    user: str | None
    stream: bool
    include_usage: bool
    max_tokens: int | None
    sampling: Sampling
    logprobs: int | None
    choices: int = 1
    echo: bool = False
    format: ResponseFormat | None = None


def read_options(fields: Fields, chat: bool, vocabulary: int) -> Asked:
    """Everything but messages or prompt. Raises ApiError 400."""
    model = fields.model()
    options = fields.part(fields.take("stream_options", dict, {}), "stream_options")
    include_usage = options.take("include_usage", bool, False)
    options.value("include_obfuscation"), options.value("continuous_usage_stats")
    options.refuse_rest()
    echo = False if chat else fields.take("echo", bool, False)
    limit = fields.take("max_completion_tokens", int, None, 1)
    most = fields.take("max_tokens", int, None, 0 if echo else 1)
    if None not in (limit, most) and limit != most:
        raise ApiError(400, "'max_tokens' and 'max_completion_tokens' are not the same.", param="max_tokens")
    sampling = read_sampling(fields, vocabulary)
    if limit is None and most == 0 and sampling.min_tokens:
        raise ApiError(400, f"'min_tokens' is {sampling.min_tokens}, and 0 may be written.", param="min_tokens")
    choices = fields.take("n", int, 1, 1, MAX_CHOICES)
    if fields.raw.get("best_of") == choices:  # of which all are given
        fields.value("best_of")
    logprobs = read_logprobs(fields) if chat else fields.take("logprobs", int, None, 0, MAX_TOP_LOGPROBS)
    return Asked(
        model=model,
        user=fields.take("user", str),
        stream=fields.take("stream", bool, False),
        include_usage=include_usage,
        max_tokens=limit if limit is not None else most,
        sampling=sampling,
        logprobs=logprobs,
        choices=choices,
        echo=echo,
        format=read_format(fields.value("response_format")),
    )


def read_sampling(fields: Fields, vocabulary: int, temperature: float = 1.0) -> Sampling:
    """How tokens are chosen. Raises ApiError 400."""
    windows = {size for name in WINDOWS if (size := fields.take(name, int, None, 1)) is not None}
    if len(windows) > 1:
        raise ApiError(400, f"{', '.join(WINDOWS)} must be equal.", param=WINDOWS[0])
    seed = fields.take("seed", int, None, -(2**63), 2**63 - 1)
    ends = _token_ids(fields, "stop_token_ids", vocabulary)
    with told_as("sampling"):
        return Sampling(
            max_tokens=sys.maxsize,  # how many may be written is known with the prompt
            temperature=fields.take("temperature", float, temperature, 0, 100),
            top_p=max(fields.take("top_p", float, 1.0, 0, 1), 1e-9),  # 0 means the likeliest token alone
            top_k=max(fields.take("top_k", int, 0, -1), 0),  # -1, as vLLM's clients say it: all
            min_p=fields.take("min_p", float, 0.0, 0, 1),
            xtc_probability=fields.take("xtc_probability", float, 0.0, 0, 1),
            xtc_threshold=fields.take("xtc_threshold", float, 0.1, 0, 0.5),
            repetition_penalty=fields.take("repetition_penalty", float, 0.0, 0, 100) or 1.0,  # mlx-lm's "none" is 0
            presence_penalty=fields.take("presence_penalty", float, 0.0, -100, 100),
            frequency_penalty=fields.take("frequency_penalty", float, 0.0, -100, 100),
            penalty_window=windows.pop() if windows else None,
            logit_bias=_logit_bias(fields, vocabulary),
            seed=None if seed is None else seed % 2**63,
            stop=_stop(fields),
            extra_eos=ends,
            min_tokens=fields.take("min_tokens", int, 0, 0),
            ignore_eos=fields.take("ignore_eos", bool, False),
        )


def _stop(fields: Fields) -> tuple[str, ...]:
    value, called = fields.value("stop"), fields.name("stop")
    words = [] if value in EMPTY else [value] if isinstance(value, str) else value
    good = isinstance(words, list) and all(isinstance(w, str) and 0 < len(w) <= MAX_STOP_LENGTH for w in words)
    if not good or len(words) > MAX_STOPS:
        raise ApiError(
            400,
            f"'{called}' must be a string or up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters.",
            param=called,
        )
    return tuple(words)


def _token_ids(fields: Fields, name: str, vocabulary: int) -> tuple[str, ...]:
    ids = fields.take(name, list, [])
    if not all(type(i) is int and 0 <= i < vocabulary for i in ids) or len(ids) > MAX_STOPS:
        raise ApiError(400, f"'{name}' must be a list of token ids below {vocabulary}.", param=name)
    return tuple(map(str, ids))


def _logit_bias(fields: Fields, vocabulary: int) -> dict[str, float]:
    biases: dict[str, float] = {}
    for key, value in fields.take("logit_bias", dict, {}).items():
        good = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary and str(int(key)) == key
        if not good or isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 100:
            raise ApiError(
                400,
                f"'logit_bias' must map token ids below {vocabulary} to numbers from -100 to 100.",
                param="logit_bias",
            )
        biases[key] = float(value)
    return biases


def read_logprobs(fields: Fields) -> int | None:
    """How many likeliest tokens a chat is told with each token; None: no log-probabilities. Raises ApiError 400."""
    wanted, top = fields.take("logprobs", bool, False), fields.take("top_logprobs", int, 0, 0, MAX_TOP_LOGPROBS)
    if top and not wanted:
        raise ApiError(400, "'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    return top if wanted else None


def read_format(value: Any, where: str = "response_format") -> ResponseFormat | None:
    """The schema that the answer must satisfy; None: any text. Raises ApiError 400 with the place."""
    if value in EMPTY:
        return None
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat({"type": "object"}, False)
    if kind != "json_schema":
        raise ApiError(400, f"'{where}.type' must be 'text', 'json_object' or 'json_schema'.", param=where)
    inner = value.get("json_schema", value)  # /v1/responses has its fields beside the type
    where = f"{where}.json_schema" if "json_schema" in value else where
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping):
        raise ApiError(400, f"'{where}' needs a 'schema'.", param=where)
    strict = bool(inner.get("strict"))
    with told_as(f"{where}.schema"):
        check_schema(inner["schema"], f"{where}.schema", strict)
    return ResponseFormat(dict(inner["schema"]), strict)


def read_prompts(value: Any, vocabulary: int, name: str = "prompt") -> list[str | list[int]]:
    """The checked prompts of a completion: texts or token ids, one or several. Raises ApiError 400."""
    several = isinstance(value, list) and len(value) > 0 and all(isinstance(one, str | list) for one in value)
    prompts = value if several else [value]
    if len(prompts) <= MAX_PROMPTS and all(_is_prompt(prompt, vocabulary) for prompt in prompts):
        return list(prompts)
    raise ApiError(
        400,
        f"'{name}' must be a text that is not empty or a list of token ids below {vocabulary}, or a list of up to "
        f"{MAX_PROMPTS} of these.",
        param=name,
    )


def _is_prompt(value: Any, vocabulary: int) -> bool:
    ids = isinstance(value, list) and all(type(i) is int and 0 <= i < vocabulary for i in value)
    return bool(value) and (isinstance(value, str) or ids)
