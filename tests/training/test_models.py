"""Models that cannot be trained say so before anything is done.

Phi 3 small hides nothing of a whole text behind its mask on a CPU; MLX's CUDA build cannot compute it at all.
"""

import tempfile
from importlib.metadata import version

import pytest
from helpers.tiny_configs import tiny_base

from mlx_adapters import AdapterError, TrainConfig, estimate, train
from mlx_adapters.training.setup import cannot_train

ONE = TrainConfig(iterations=1, batch_size=1)


@pytest.mark.parametrize(
    "name, why",
    [
        ("deepseek_v41", "has no gradient on this device"),  # it chooses keys by scores that it would differentiate
        ("phi3small", "one function of a whole text, and another when it generates|mlx-lm cannot load"),
        ("olmo", "install ai2-olmo"),
        ("prism_hadamard_qwen35", "Unsupported Hadamard pack"),
    ],
)
def test_a_model_that_cannot_be_trained_says_why(name, why, tmp_path, home):
    (tmp_path / "train.jsonl").write_text('{"text": "How many students are there?"}\n' * 2)
    base = tiny_base(tmp_path / "base", name)
    for forecast in (True, False):
        with pytest.raises(AdapterError, match=why):
            train(base, tmp_path / "train.jsonl", name="a", training=ONE, forecast=forecast)
    if name == "deepseek_v41":
        with pytest.raises(AdapterError, match=why):
            estimate(base, tmp_path / "train.jsonl", training=ONE)
    assert not (home / "adapters" / "a").exists()


def test_a_kernel_that_another_process_was_writing_is_no_fault_of_the_model(monkeypatch):
    monkeypatch.delenv("MLX_PTX_CACHE_DIR", raising=False)
    error = cannot_train("Failed to load compiled Cf4Multiply kernel: .")
    assert "another process" in error.message and error.hint.startswith("run it again; if it ends so each time")
    assert error.hint.endswith(f"remove '{tempfile.gettempdir()}/mlx/{version('mlx')}/ptx'.")
