"""Answers to the questions of a data set, many at a time, greedy; and task scores: how right an answer is.

A score goes from 0 to 1, given what was expected:

- `exact`: the texts are equal, white space aside.
- `regex:PATTERN`: what the pattern finds (its first group, if it has one) is the same in both.
- `sqlite[:FILE]`: both are queries and return the same rows; the data folder's only `.sqlite` file by default.
- `command:COMMAND`: a program reads {"answer", "expected", "row"} as JSON and prints a number; if it prints
  nothing, exit status 0 means 1 and any other 0.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.data.datasets import RawRow
from mlx_adapters.data.tokenizing import messages_of
from mlx_adapters.errors import ConfigError, FormatError, NotFoundError, did_you_mean
from mlx_adapters.evaluation.sqlite import Database, is_correct
from mlx_adapters.events import OnEvent, Progress, log_warnings
from mlx_adapters.generation.batching import answer_plainly
from mlx_adapters.generation.requests import Request
from mlx_adapters.models.model import Model
from mlx_adapters.storage import paths

Score = Callable[[str, str, Mapping[str, Any]], float]
COMMAND_SECONDS = 60


@dataclass(frozen=True)
class Question:
    """What the model is asked (as token ids), what it should say, and the row it came from."""

    prompt: tuple[int, ...]
    expected: str
    row: RawRow


def questions(rows: Sequence[RawRow], model: Model) -> list[Question]:
    """The last assistant turn of each row as a question. Raises FormatError, naming the line, if it has none."""
    return [_question(row, model) for row in rows]


def _question(row: RawRow, model: Model) -> Question:
    if row.format == "text":
        raise FormatError(f"{row.where}: a text row asks nothing.", "scores need prompt-completion or chat rows.")
    messages = messages_of(row)
    last = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "assistant"), 0)
    if last == 0 or not isinstance(messages[last].get("content"), str):
        raise FormatError(
            f"{row.where}: there is no answer to a question in the row.", "without --score none is needed."
        )
    expected = messages[last]["content"]
    if row.format == "completion" and not model.has_template:
        return Question(tuple(model.encode(row.prompt)), expected, row)
    template = TemplateConfig(chat_template_args=row.template_arguments)
    return Question(tuple(model.encode_chat(messages[:last], row.tools, template=template)), expected, row)


def greedy_answers(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 256,
    batch_size: int = 8,
    kv: CacheQuantization | None = None,
    on_event: OnEvent = log_warnings,
) -> list[str]:
    """The likeliest continuation of each prompt, up to an end token, `max_tokens` or the model's last position.

    `batch_size` at a time, with keys and values kept as `kv` says. Raises ModelError for a prompt that the model cannot
    read; IncompatibleError if they cannot be kept so.
    """
    asked = [model.checked_ids(prompt).tolist() for prompt in prompts]
    limits = [model.room(len(prompt), max_tokens) for prompt in asked]
    stop = frozenset(model.tokenizer.eos_token_ids)
    requests = [Request(p, max_tokens=n, stop_tokens=stop) for p, n in zip(asked, limits, strict=True)]
    written: dict[Request, list[int]] = {}
    for request, tokens in answer_plainly(model, requests, batch_size, kv):
        written[request] = tokens
        on_event(Progress("answer", len(written), len(prompts), "question"))
    return [model.tokenizer.decode(written[request]) for request in requests]


def parse_score(text: str, data: str | Path | None) -> Score:
    """The score that `text` spells, for data in the folder `data`, if it is in one.

    Raises ConfigError or NotFoundError.
    """
    kind, _, detail = text.partition(":")
    if kind not in SCORES:
        raise ConfigError(f"There is no score '{kind}'.", did_you_mean(kind, SCORES, f"scores: {', '.join(SCORES)}."))
    return SCORES[kind](detail, None if data is None else Path(data))


def _exact(detail: str, data: Path | None) -> Score:
    if detail:
        raise ConfigError(f"'exact' takes no '{detail}'.")
    return lambda answer, expected, _: float(answer.split() == expected.split())


def _regex(detail: str, data: Path | None) -> Score:
    try:
        pattern = re.compile(detail)
    except re.error as error:
        raise ConfigError(f"'{detail}' is not a regular expression: {error}.") from None
    if not detail:
        raise ConfigError("'regex' needs a pattern.", "for example regex:'answer: (\\d+)'.")

    def find(text: str) -> str | None:
        match = pattern.search(text)
        return match and match[1 if pattern.groups else 0]

    return lambda answer, expected, _: float(find(answer) is not None and find(answer) == find(expected))


def _sqlite(detail: str, data: Path | None) -> Score:
    databases = [Path(detail)] if detail else [] if data is None else paths.visible(data, "*.sqlite")
    if len(databases) != 1:
        raise NotFoundError(
            f"The data '{data or 'from Python'}' has {len(databases) or 'no'} .sqlite files.", "write sqlite:FILE."
        )
    database = Database(databases[0])
    return lambda answer, expected, _: float(is_correct(answer, expected, database))


def _command(detail: str, data: Path | None) -> Score:
    try:
        command = shlex.split(detail)
    except ValueError as error:
        raise ConfigError(f"'{detail}' is not a command: {error}.") from None
    if not command:
        raise ConfigError("'command' needs a program.", "for example command:./grade.py.")

    def score(answer: str, expected: str, row: Mapping[str, Any]) -> float:
        question = json.dumps({"answer": answer, "expected": expected, "row": dict(row)})
        try:
            done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        except FileNotFoundError:
            raise NotFoundError(
                f"There is no program '{command[0]}' to score with.", "is it installed, and on the PATH?"
            ) from None
        except (subprocess.TimeoutExpired, PermissionError) as error:
            raise FormatError(f"The score command '{detail}' failed: {error}.") from None
        return _number(done.stdout, done.returncode, detail)

    return score


def _number(printed: str, status: int, command: str) -> float:
    if not printed.strip():
        return float(status == 0)
    try:
        value = float(printed.split()[-1])
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise FormatError(f"The score command '{command}' printed '{printed.strip()[:80]}', not a number from 0 to 1.")
    return value


SCORES: dict[str, Callable[[str, Path | None], Score]] = {
    "exact": _exact,
    "regex": _regex,
    "sqlite": _sqlite,
    "command": _command,
}
