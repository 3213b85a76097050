"""The fields of a request: read one by one; what nobody read must mean nothing.

A field that is null, empty or at a value that means "not used" passes, whatever its name. One that would change the
answer is refused by its name, or, by a server that is `lenient`, ignored and told of.
"""

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mlx_adapters.errors import did_you_mean
from mlx_adapters.protocols.errors import ApiError

KINDS = {int: "an integer", float: "a number", str: "a string", bool: "a boolean", dict: "an object", list: "a list"}
# Options we do not have -> the values that mean "not used".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (True, False),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "include_reasoning": (True,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "context": ("auto",),
    "mode": ("standard",),
    "penalize_newline": (True,),
    "top_a": (0,),
    "background": (False,),
    "truncation": ("disabled", "auto"),
    "encoding_format": ("float",),
}
# Fields that ask for nothing of the model, at any value.
NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
NOTES |= {
    "request_id",
    "priority",
    "prediction",
    "num_draft_tokens",
    "cache_prompt",
    "cache_salt",
    "include",
    "extra_headers",
}
EMPTY: tuple[Any, ...] = (None, "", [], {})


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body. Raises ApiError 400."""
    try:
        value = json.loads(body, parse_constant=_no_constant, parse_float=_finite_float, parse_int=_bounded_integer)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, spelled or in bytes, is no text
    except UnicodeEncodeError:
        raise ApiError(400, "The body is not valid Unicode.") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(value, dict):
        raise ApiError(400, "The body must be a JSON object.")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _bounded_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # it has more digits than Python reads, and says how a program lets it
        raise ValueError(f"{text[:20]}... is too large a number") from None


def _finite_float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


class Fields:
    """The fields of one request, or of an object `within` it; `spelled`: the client's names for ours.

    `ignored` names what a lenient server passed over.
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        lenient: bool = False,
        within: str = "",
        spelled: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.lenient, self.within = lenient, within
        self.raw = {spelled.get(name, name): value for name, value in raw.items()}
        self._spelled = {ours: theirs for theirs, ours in spelled.items() if theirs in raw}
        self.ignored: list[str] = []
        self._read: set[str] = set()

    def part(self, raw: Mapping[str, Any], within: str, spelled: Mapping[str, str] = MappingProxyType({})) -> "Fields":
        """The fields of an object in it; what is passed over there is told with the rest."""
        part = Fields(raw, self.lenient, within, spelled)
        part.ignored = self.ignored
        return part

    def name(self, name: str) -> str:
        """How a field is called in the whole request, as the client spells it."""
        name = self._spelled.get(name, name)
        return f"{self.within}.{name}" if self.within else name

    def value(self, name: str) -> Any:
        """A field as it is; None if it is not given."""
        self._read.add(name)
        return self.raw.get(name)

    def take(
        self, name: str, kind: type, default: Any = None, low: float | None = None, high: float | None = None
    ) -> Any:
        """A field of this kind within these bounds; `default` if it is empty or not given. Raises ApiError 400."""
        value, called = self.value(name), self.name(name)
        if value in EMPTY:
            return default
        wrong = not isinstance(value, (int, float) if kind is float else kind)
        if wrong or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"'{called}' must be {KINDS[kind]}.", param=called)
        if kind in (int, float) and ((low is not None and value < low) or (high is not None and value > high)):
            bounds = " and ".join(
                f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None
            )
            raise ApiError(400, f"'{called}' must be {bounds}.", param=called)
        return kind(value)

    def model(self) -> str:
        """The model that is asked for. Raises ApiError 400 if none is named."""
        if not (name := self.take("model", str)):
            raise ApiError(400, "You must provide a 'model'.", param="model")
        return name

    def refuse_rest(self) -> None:
        """Raise ApiError 400 for a field that nobody read and that would change the answer; or note it."""
        for name, value in self.raw.items():
            neutral = value in EMPTY or name in NOTES or value in NEUTRAL.get(name, ())
            if name in self._read or neutral:
                continue
            called = self.name(name)[:100]
            if self.lenient:
                self.ignored.append(called)
            elif name in NEUTRAL:
                raise ApiError(
                    400, f"This server does not support '{called}'.", param=called, code="unsupported_parameter"
                )
            else:
                hint = did_you_mean(name, self._read)
                raise ApiError(
                    400,
                    f"Unrecognized request argument: {called}." + (f" {hint[0].upper()}{hint[1:]}" if hint else ""),
                    param=called,
                )
