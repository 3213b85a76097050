"""Whatever a PEFT folder holds, reading and converting it ends well or with one of our errors, and soon."""

import contextlib
import json
import re
import time
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.peft import base_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_adapters.adapters.peft_export import export_peft
from mlx_adapters.adapters.peft_import import import_peft
from mlx_adapters.checkpoints.originals import layout_of
from mlx_adapters.checkpoints.probing import Layout
from mlx_adapters.errors import AdapterError, FormatError
from mlx_adapters.fusion.peft_whole import whole_tensors
from mlx_adapters.models.layers import adaptable_layers, nn
from mlx_adapters.models.loading import load_module
from mlx_adapters.peft_format.conversion import convert
from mlx_adapters.peft_format.patterns import full_match
from mlx_adapters.peft_format.reading import PeftAdapter, read_peft, refuse_beyond_lora, refuse_unsaved
from mlx_adapters.peft_format.to_mlx import needs_untying
from mlx_adapters.peft_format.updates import lost_bits, regained, steps_of
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.storage import tensor_files

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
CASES = (
    "llama/patterns-rslora-dora",
    "llama/embeddings",
    "qwen3_moe/fused",
    "qwen3_moe/per-expert",
    "qwen2/ensure-tying",
    "qwen2/refused/tied-both-ends",
    "qwen2/refused/tied-both-to-save",
)
TYPES = [mx.float16, mx.bfloat16, mx.int32, mx.bool_, mx.uint8]
FUZZ = {"suppress_health_check": list(HealthCheck)}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
)
patterns = st.text(alphabet="()[]{}*+?.|^$\\abq_proj0123,:=!<", max_size=30)
pattern_maps = st.dictionaries(patterns, st.integers(-1, 9) | st.floats() | scalars, max_size=3)
pieces = st.sampled_from(
    [
        "base_model",
        "model",
        "layers",
        "0",
        "1",
        "9",
        "self_attn",
        "mlp",
        "experts",
        "q_proj",
        "down_proj",
        "gate",
        "w1",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_magnitude_vector",
        "weight",
        "bias",
        "default",
        "base_layer",
        "token_adapter",
        "trainable_tokens_delta",
        "modules_to_save",
        "embed_tokens",
        "lm_head",
        "",
        "é",
        "99999999",
    ]
)
names = st.lists(pieces, max_size=9).map(".".join) | st.text(max_size=30)


LAYOUTS: dict[int, Layout] = {}  # by the module that `bases` loaded


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    loaded = {}
    for arch in {case.split("/")[0] for case in CASES}:
        base = resolve_base(FIXTURES / arch / "base")
        loaded[arch] = load_module(base)[0]
        LAYOUTS[id(loaded[arch])] = layout_of(base, loaded[arch])
    return {case: loaded[case.split("/")[0]] for case in CASES}


@pytest.fixture(scope="module")
def sound() -> dict[str, tuple[dict, dict]]:
    def read(case: str) -> tuple[dict, dict]:
        tensors = mx.load(str(FIXTURES / case / "adapter_model.safetensors"))
        return json.loads((FIXTURES / case / "adapter_config.json").read_text()), tensors

    return {case: read(case) for case in CASES}


def take_in(peft: PeftAdapter, base: nn.Module, tie: bool = False) -> None:
    refuse_beyond_lora(peft)
    convert(peft, base, LAYOUTS[id(base)], "base", tie).adapter.check()


def take_in_tied(peft: PeftAdapter, base: nn.Module) -> None:
    take_in(peft, base, tie=True)


def take_whole(peft: PeftAdapter, base: nn.Module) -> None:
    """What `fuse --from-peft` does before it fuses."""
    refuse_unsaved(peft)
    needs_untying(peft, adaptable_layers(base))
    whole_tensors(peft, base, LAYOUTS[id(base)], False, False)


def attempt(folder: Path, config: dict, tensors: dict, base: nn.Module) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensor_files.write_safetensors(folder / "adapter_model.safetensors", tensors)
    start = time.monotonic()
    with contextlib.suppress(AdapterError):
        peft = read_peft(folder)
        for use in (take_in, take_in_tied, take_whole):
            with contextlib.suppress(AdapterError):
                use(peft, base)
    assert time.monotonic() - start < 20, "one folder may not hold up the program"


@settings(max_examples=700, **FUZZ)
@given(data=st.data())
def test_mutated_configs(data: st.DataObject, bases, sound, tmp_path_factory):
    case = data.draw(st.sampled_from(CASES))
    config, tensors = sound[case]
    config = dict(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(pattern_maps if "pattern" in key else patterns | values)
    attempt(tmp_path_factory.mktemp("fuzz"), config, tensors, bases[case])


def mutate(data: st.DataObject, tensors: dict) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["drop", "rename", "copy", "reshape", "cut", "type", "value"]))
    array = tensors[name]
    if how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[data.draw(names)] = tensors.pop(name)
    elif how == "copy":
        prefix = data.draw(st.sampled_from(["", "base_model.model.", "base_model.model.model.layers.0.mlp."]))
        tensors[prefix + data.draw(names)] = array
    elif how == "reshape":
        shape = data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (2, -1), (2, 2, -1)]))
        tensors[name] = array.reshape(shape) if array.size % 4 == 0 else array
    elif how == "cut":
        tensors[name] = array[data.draw(st.integers(0, 5)) :]
    elif how == "type":
        tensors[name] = array.astype(data.draw(st.sampled_from(TYPES)))
    else:
        tensors[name] = array * data.draw(st.sampled_from([mx.nan, mx.inf, 0.0, 1e30]))


@settings(max_examples=700, **FUZZ)
@given(data=st.data())
def test_mutated_tensors(data: st.DataObject, bases, sound, tmp_path_factory):
    case = data.draw(st.sampled_from(CASES))
    config, tensors = sound[case]
    tensors = dict(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        if tensors:
            mutate(data, tensors)
    attempt(tmp_path_factory.mktemp("fuzz"), config, tensors, bases[case])


@settings(max_examples=200, **FUZZ)
@given(position=st.integers(0, 1), cut=st.integers(0, 3000), noise=st.binary(max_size=40))
def test_mutated_bytes(position: int, cut: int, noise: bytes, bases, sound, tmp_path_factory):
    folder, case = tmp_path_factory.mktemp("fuzz"), CASES[0]
    for i, file in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        content = (FIXTURES / case / file).read_bytes()
        (folder / file).write_bytes(content[:cut] + noise + content[cut + len(noise) :] if i == position else content)
    try:
        peft = read_peft(folder)
        refuse_beyond_lora(peft)
        convert(peft, bases[case], LAYOUTS[id(bases[case])], "base").adapter.check()
    except AdapterError:
        pass


@settings(max_examples=1000, **FUZZ)
@given(pattern=patterns, text=st.text(alphabet="abq_proj01.", max_size=12))
def test_patterns_mean_what_re_means(pattern: str, text: str):
    try:
        expected = re.fullmatch(pattern, text) is not None
    except (re.error, RecursionError, OverflowError):
        with pytest.raises(AdapterError):
            full_match(pattern, text)
        return
    try:
        assert full_match(pattern, text) == expected
    except AdapterError as error:
        assert "cannot be followed" in error.message


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)*b", "((((a+)+)+)+)+b", "(a*)*(a*)*(a*)*b", "(.*.*.*.*.*)*b"])
def test_patterns_that_make_re_run_for_ages_do_not(pattern: str):
    start = time.monotonic()
    assert not full_match(pattern, "a" * 60)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("damaged", ["", "not base64!", "AAAA", 7, None])
def test_a_damaged_record_of_lost_bits_is_an_error(damaged):
    b = mx.random.normal((4, 8), key=mx.random.key(1))
    ratio = 1 / 3
    lost = lost_bits(b, b * ratio, ratio)
    assert mx.array_equal(regained(b * ratio, ratio, steps_of(lost, b.shape)), b)
    with pytest.raises(FormatError, match="is damaged") as caught:
        steps_of(damaged, b.shape)
    assert "import the adapter again" in caught.value.hint


def test_an_export_says_that_the_record_of_lost_bits_is_damaged(tmp_path: Path):
    folder = FIXTURES / "llama" / "patterns"
    adapter = import_peft(folder, base=base_of(folder), name="it")
    assert adapter.metadata["peft"]["lost"]
    for key in adapter.metadata["peft"]["lost"]:
        adapter.metadata["peft"]["lost"][key] = "AAAA"
    with pytest.raises(FormatError, match="is damaged"):
        export_peft(adapter, tmp_path / "out")
