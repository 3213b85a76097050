"""Answers to the questions of a data set: many at a time, greedy."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_adapters.data.datasets import RawRow
from mlx_adapters.data.tokenizing import messages_of
from mlx_adapters.errors import FormatError
from mlx_adapters.events import OnEvent, Progress, ignore
from mlx_adapters.models.model import Model
from mlx_adapters.system.door import BatchGenerator


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
        raise FormatError(f"{row.where}: there is no answer to a question in the row.",
                          "without --score none is needed.")  # fmt: skip
    expected = messages[last]["content"]
    if row.format == "completion" and not model.has_template:
        return Question(tuple(model.encode(row.values["prompt"])), expected, row)
    return Question(tuple(model.encode_chat(messages[:last], row.values.get("tools") or None)), expected, row)


def greedy_answers(
    model: Model, prompts: Sequence[Sequence[int]], *, max_tokens: int = 256, batch_size: int = 8,
    on_event: OnEvent = ignore,
) -> list[str]:  # fmt: skip
    """The likeliest continuation of each prompt, up to an end token, `max_tokens` or the model's last position.

    `batch_size` at a time. Raises ModelError for a prompt that the model cannot read.
    """
    asked = [model.checked_ids(prompt).tolist() for prompt in prompts]
    limits = [model.room(len(prompt), max_tokens) for prompt in asked]
    generator = BatchGenerator(
        model.module, completion_batch_size=batch_size,
        stop_tokens=[[token] for token in model.tokenizer.eos_token_ids],
    )  # fmt: skip
    written: dict[int, list[int]] = {uid: [] for uid in generator.insert(asked, limits)}
    done = 0
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                written[response.uid].append(response.token)
            if response.finish_reason is not None:
                done += 1
                on_event(Progress("answer", done, len(prompts), "question"))
    generator.close()
    return [model.tokenizer.decode(tokens) for tokens in written.values()]
