"""The tiny models are models that mlx-lm loads and runs, whatever their architecture and precision."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny_models import ARCHITECTURES, VOCABULARY


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_and_runs(on_cpu, tiny_model, architecture, bits):
    """On a CPU, which has a kernel for routers of one group per row, as MLX's CUDA build may not."""
    from mlx_lm import load

    model, tokenizer = load(str(tiny_model(architecture, bits=bits)))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "List 7 courses"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nList 7 courses<|im_end|>\n"
    assert 2 in tokenizer.eos_token_ids
    logits = np.array(model(mx.array([ids])).astype(mx.float32))
    assert logits.shape == (1, len(ids), VOCABULARY)
    assert np.isfinite(logits).all() and logits.std() > 0.1


def test_equal_calls_share_a_folder_and_other_seeds_differ(tiny_model):
    assert tiny_model("llama") == tiny_model("llama")
    other = tiny_model("llama", seed=1)
    assert (other / "model.safetensors").read_bytes() != (tiny_model("llama") / "model.safetensors").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "qwen3", "mixtral"])
def test_embeddings_are_tied_as_asked(tiny_model, architecture, tied):
    names = mx.load(str(tiny_model(architecture, tied=tied) / "model.safetensors"))
    assert ("lm_head.weight" in names) is not tied


def test_scripts_elsewhere_find_the_tiny_models():
    """Reproducers of faults say `import tiny_models`, with this folder on their path."""
    import helpers.tiny_models
    import tiny_models

    assert tiny_models.build_model is helpers.tiny_models.build_model
