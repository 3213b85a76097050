"""Many answers at once: greedy decoding of all prompts in one batch, and the share that is right."""

from collections.abc import Sequence
from typing import Any

from mlx_adapters.door import batch_generate
from mlx_adapters.evaluation.sqlite import Database, is_correct
from mlx_adapters.events import OnEvent, Progress, ignore
from mlx_adapters.model import Model

BATCH = 40  # prompts decoded together; more cost memory and save little
MAX_TOKENS = 48  # the longest gold query has 27


def answer_all(
    model: Model, conversations: Sequence[Sequence[dict[str, Any]]], *, max_tokens: int = MAX_TOKENS,
    label: str = "answer", on_event: OnEvent = ignore,
) -> list[str]:  # fmt: skip
    """The model's greedy answer to each conversation (its turns up to the one to be written)."""
    prompts = [
        list(model.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=False))
        for turns in conversations
    ]
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        answers += batch_generate(model.module, model.tokenizer, batch, max_tokens=max_tokens, verbose=False).texts
        on_event(Progress(label, len(answers), len(prompts), "question"))
    return answers


def right_answers(
    model: Model, rows: Sequence[dict[str, Any]], database: Database, *, label: str = "answer",
    on_event: OnEvent = ignore,
) -> tuple[list[str], list[bool]]:  # fmt: skip
    """(answers, whether each is right) to chat rows whose last turn is the gold query."""
    answers = answer_all(model, [row["messages"][:-1] for row in rows], label=label, on_event=on_event)
    gold = [row["messages"][-1]["content"] for row in rows]
    return answers, [is_correct(answer, sql, database) for answer, sql in zip(answers, gold, strict=True)]
