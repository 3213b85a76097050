"""Answers that are written together are those that each question gets alone."""

import pytest
from helpers.tiny_configs import tiny_base

from mlx_adapters.evaluation.scores import greedy_answers
from mlx_adapters.generation.live import load_model
from mlx_adapters.sources.bases import resolve_base

PROMPTS = [[5, 300, 17], [44, 120, 9, 77, 201, 33, 8], [9, 10], [44, 1, 2, 77, 201]]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_bigcode", "llama4"])
def test_questions_are_answered_as_they_are_alone(name, tmp_path):
    """Of gemma2 mlx-lm's own batches gave one row's mask to another's heads, or stopped; of llama4 none are made."""
    model = load_model(resolve_base(tiny_base(tmp_path / "base", name)))
    alone = [greedy_answers(model, [prompt], max_tokens=6)[0] for prompt in PROMPTS]
    for batch_size in (2, 4):
        assert greedy_answers(model, PROMPTS, max_tokens=6, batch_size=batch_size) == alone
    assert alone[0] == model.tokenizer.decode(model.generate(PROMPTS[0], max_tokens=6).token_ids)
