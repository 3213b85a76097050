"""Where every number of a model goes in a GGUF file: as in the files that real llama.cpp computed the same from.

`scripts/check_gguf.py lock` wrote the fixture.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_models import GGUF_MODELS, layout_of
from helpers.tiny_configs import make_model, tiny_config

from mlx_adapters.errors import ConfigError
from mlx_adapters.gguf_format.architectures import architecture_of
from mlx_adapters.gguf_format.hyperparameters import settings_of
from mlx_adapters.gguf_format.tensors import Layout

LAYOUTS = json.loads((Path(__file__).parents[1] / "fixtures" / "gguf_layouts.json").read_text())


@pytest.mark.parametrize("name", sorted(GGUF_MODELS))
def test_a_file_is_laid_out_as_llama_cpp_read_it(name):
    seen, expected = layout_of(name), LAYOUTS[name]
    assert seen["architecture"] == expected["architecture"]
    assert seen["values"].keys() == expected["values"].keys()
    for key, value in expected["values"].items():
        assert seen["values"][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    assert seen["tensors"].keys() == expected["tensors"].keys()
    for tensor, numbers in expected["tensors"].items():
        np.testing.assert_allclose(seen["tensors"][tensor], numbers, rtol=1e-4, err_msg=tensor)


def context(kind: str, **config) -> int:
    """The context length that a file of such a model names, of a config that says this of it."""
    made = {key: value for key, value in tiny_config(kind).items() if key != "max_position_embeddings"}
    module = make_model(made)
    return Layout(architecture_of(module), module, settings_of(module, made | config)).values["context_length"]


def test_the_context_is_the_config_s_or_what_transformers_takes_for_granted():
    assert context("llama", max_position_embeddings=777) == 777
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert context("llama", max_position_embeddings=777, rope_scaling=yarn) == 2048
    assert context("gemma3_text") == 131_072  # (mlx-lm's code would say 32768)
    with pytest.raises(ConfigError, match=r"how many tokens this model reads.*config\.json") as caught:
        context("llama", model_type="a_type_of_its_own")
    assert "max_position_embeddings" in caught.value.hint
