"""A server that guesses answers as one that does not, and says how much of it was right."""

import json
import re
import urllib.request

import pytest
from helpers.serving import running

from mlx_adapters.config.sampling import Drafting

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2, 3]}}, "required": ["a"], "additionalProperties": False}
PROMPT = "one two three one two three one two"
ASKED = [
    {},
    {"temperature": 1.0, "seed": 4, "n": 3},
    {"temperature": 0.8, "seed": 1, "top_k": 9, "frequency_penalty": 0.5, "min_tokens": 3},
    {"logprobs": 2, "ignore_eos": True},
    {"echo": True, "logprobs": 0, "max_tokens": 9},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}},
]


def answers(address, **fields):
    body = json.dumps({"model": "base", "prompt": PROMPT, "max_tokens": 24, "temperature": 0} | fields).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def told(tiny_model):
    """What a server without and two with guesses answer, a stop text among it, and the metrics of the last."""
    folder, answered = tiny_model("llama"), []
    for drafting in (None, Drafting(draft_model=str(folder), draft_tokens=3), Drafting(prompt_lookup=True)):
        with running(folder, [], drafting=drafting) as (address, _):
            each = [answers(address, **fields) for fields in ASKED]
            each.append(answers(address, stop=each[0]["choices"][0]["text"][6:9]))
            answered.append(each)
            metrics = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return answered, metrics


def test_answers_are_the_same(told):
    (plain, *guessing), _ = told
    for other in guessing:
        for one, two in zip(plain, other, strict=True):
            assert [c["text"] for c in two["choices"]] == [c["text"] for c in one["choices"]]
            assert [c["finish_reason"] for c in two["choices"]] == [c["finish_reason"] for c in one["choices"]]
            assert two["usage"]["completion_tokens"] == one["usage"]["completion_tokens"]
            for mine, theirs in zip(two["choices"], one["choices"], strict=True):
                if mine["logprobs"] is not None:
                    answered, wanted = (each["logprobs"]["token_logprobs"] for each in (mine, theirs))
                    assert answered == pytest.approx(wanted, abs=1e-3)


def test_usage_and_metrics_say_what_was_right(told):
    (plain, by_model, by_lookup), metrics = told
    details = [each[0]["usage"]["completion_tokens_details"] for each in (plain, by_model, by_lookup)]
    assert details[0]["accepted_prediction_tokens"] == details[0]["rejected_prediction_tokens"] == 0
    assert details[1]["accepted_prediction_tokens"] > 10 and details[1]["rejected_prediction_tokens"] == 0
    accepted = sum(each["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] for each in by_lookup)
    counted = re.search(r'^mlx_adapters_accepted_tokens_total\{model="base"\} (\d+)$', metrics, re.M)
    assert int(counted[1]) == accepted > 0 and "vllm:spec_decode_num_draft_tokens_total" in metrics
