"""What a benchmark's prompts are made of."""

from dataclasses import replace

import pytest
from helpers.adapters import make_adapter

from mlx_adapters.benchmarking import run, worker
from mlx_adapters.benchmarking.schedule import BenchmarkConfig
from mlx_adapters.config.data import DataConfig
from mlx_adapters.config.mapping import to_mapping
from mlx_adapters.errors import FormatError
from mlx_adapters.generation.live import load_model
from mlx_adapters.sources.registry import register

OWN = DataConfig(prompt_column="ask", completion_column="say", chat_template="{{ messages[0].content }}|")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ask": "List all.", "say": "SELECT 1;", "x": 3}\n')
    return str(path)


def test_prompts_are_read_and_rendered_as_the_adapter_was_trained(tiny_model, rows):
    model = load_model(str(tiny_model("llama")))
    config = BenchmarkConfig(data=rows)
    with pytest.raises(FormatError, match="the row has 'ask', 'say', 'x'"):
        worker.prompts_for(model, config, DataConfig(), 6, 1)
    read = model.tokenizer.decode(worker.prompts_for(model, config, OWN, 6, 1)[0].tolist())
    assert read.startswith("List all.|")


def test_each_process_is_told_how(tiny_model, rows, monkeypatch):
    told = []
    monkeypatch.setattr(run, "run_worker", lambda _, config, own, *__: told.append(own) or {"error": "not run"})
    adapter = make_adapter(tiny_model("llama"))
    register(replace(adapter, metadata=adapter.metadata | {"training": to_mapping(OWN)}), "sql")
    run.benchmark(["base", "sql"], rounds=1, data=rows)
    assert told == [OWN, OWN]
