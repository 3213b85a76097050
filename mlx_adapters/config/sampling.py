"""How answers are written: the one definition that Python, the command line and the server share. Imports no MLX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from mlx_adapters.config.mapping import from_mapping, require, shown
from mlx_adapters.config.settings import check, setting, settings


@settings
@dataclass(frozen=True)
class Sampling:
    """How long an answer may be, and how its tokens are chosen.

    Logits are changed by `logit_bias`, then by the penalties; the filters follow each other as in mlx-lm, on the
    probabilities at temperature 1: `top_p`, `min_p`, `xtc_probability`, `top_k`.

    Raises ConfigError for a value out of range.

    Example:
        >>> wild = ma.Sampling(temperature=1.2, min_p=0.05, stop=("\\n\\n",))
        >>> answer = ma.load_model("demo").generate("List the Physics courses.", wild, max_tokens=8)
    """

    max_tokens: int = setting(256, "Longest answer", at_least=1)
    temperature: float = setting(0.0, "0: greedy", at_least=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this mass", above=0, at_most=1)
    min_p: float = setting(
        0.0, "Sample from tokens at least this likely, relative to the likeliest", at_least=0, at_most=1
    )
    top_k: int = setting(0, "Sample from this many of the likeliest tokens; 0: from all", at_least=0)
    xtc_probability: float = setting(
        0.0,
        "How often the likeliest tokens are left out, all but the least likely of those above `xtc_threshold`",
        at_least=0,
        at_most=1,
    )
    xtc_threshold: float = setting(0.1, "Probability above which tokens count as likely there", at_least=0, at_most=0.5)
    repetition_penalty: float = setting(
        1.0,
        "Divide logits of tokens that were there by this",
        more="In the prompt or the answer; negative logits are multiplied by it.",
        above=0,
    )
    presence_penalty: float = setting(0.0, "Take this from logits of tokens that the answer has")
    frequency_penalty: float = setting(0.0, "Take this from logits for each time the answer has the token")
    penalty_window: int | None = setting(
        None,
        "Penalties look at this many of the last tokens, also the prompt's",
        means="at all",
        at_least=1,
    )
    logit_bias: dict[str, Any] = setting(
        dict, "Add a number to a token's logits", more="By the token's id.", metavar="ID=NUMBER"
    )
    seed: int | None = setting(None, "Seed of the sampling", at_least=0, below=1 << 63)
    stop: tuple[str, ...] = setting((), "End the answer before this text", metavar="TEXT", repeated=True)
    extra_eos: tuple[str, ...] = setting(
        (), "End the answer at this token too", more="By its text or its id.", metavar="TOKEN", repeated=True
    )
    min_tokens: int = setting(0, "Shortest answer; nothing ends it before", at_least=0)
    ignore_eos: bool = setting(False, "Go on where the model ends the answer")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check(self)
        require(all(self.stop), "stop must be texts that are not empty.")
        bad = [entry for entry in self.logit_bias.items() if not _is_bias(*entry)]
        require(not bad, f"logit_bias maps token ids to numbers, not '{str(bad[0][0])[:40] if bad else ''}'.")
        require(len(set(map(int, self.logit_bias))) == len(self.logit_bias), "logit_bias names a token twice.")
        require(
            self.min_tokens <= self.max_tokens,
            f"'min_tokens' is {shown(self.min_tokens)}, and {self.max_tokens} may be written.",
        )

    def changed(self, options: Mapping[str, Any]) -> "Sampling":
        """These settings but for `options`, by name. Raises ConfigError for an unknown name or a wrong value.

        Args:
            options: names and values.
        """
        stop = options.get("stop")
        stops = {"stop": [stop]} if isinstance(stop, str) else {}
        return from_mapping(Sampling, {**vars(self), **options, **stops}, "sampling")


@settings
@dataclass(frozen=True)
class Drafting:
    """Speculative decoding: several tokens are guessed, and the model checks them in one step.

    What is written stays the same to the token, greedy or with a seed, up to the rounding of floats.

    Raises ConfigError for a value out of range.

    Example:
        >>> model = ma.load_model("demo", drafting=ma.Drafting(prompt_lookup=True))
        >>> answer = model.generate("Say it twice: one, two, three, one, two, three.", max_tokens=8)
        >>> answer.accepted_tokens <= answer.guessed_tokens
        True
    """

    draft_model: str | Path | None = setting(
        None, "A smaller model with the same tokenizer, which guesses", metavar="BASE"
    )
    draft_tokens: int = setting(4, "Most tokens guessed at a time", at_least=1, at_most=64)
    prompt_lookup: bool = setting(
        False, "Guess that what followed the last tokens before follows them again, where they were there before"
    )

    def __post_init__(self) -> None:
        check(self)

    @property
    def drafts(self) -> bool:
        """Whether anything is guessed."""
        return self.prompt_lookup or self.draft_model is not None


class SamplingOptions(TypedDict, total=False):
    """The fields of `Sampling` as arguments of `generate`, for type checkers and editors."""

    max_tokens: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int | None
    logit_bias: dict[str, Any]
    seed: int | None
    stop: str | Sequence[str]
    extra_eos: tuple[str, ...]
    min_tokens: int
    ignore_eos: bool


def _is_bias(token: Any, value: Any) -> bool:
    """Whether it is a token's id and a number that float32 holds."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3.4e38
    return number and str(token).isdecimal() and int(token) < 1 << 32
