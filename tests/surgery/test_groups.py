"""A model whose layers on one input are laid together is read once, to where it stays."""

import gc
import os
import shutil
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_adapters.errors import NotFoundError
from mlx_adapters.generation import live
from mlx_adapters.models import loading
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.surgery import groups


def bits_of(module):
    return {name: np.array(array.view(mx.uint8)) for name, array in tree_flatten(module.parameters())}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mixtral"])
def test_it_holds_what_mlx_lm_reads_and_nothing_is_in_memory_twice(architecture, bits, tiny_model):
    base = resolve_base(tiny_model(architecture, bits=bits))
    expected = loading.load_module(base)[0]
    mx.eval(expected.parameters())
    with groups.Origins() as origins:
        module = loading.load_module(base)[0]
    mx.synchronize()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with groups.reading_into_place(module, dict(loading.adaptable_layers(module)), origins) as finish:
        laid = finish()
    size = sum(array.nbytes for _, array in tree_flatten(module.parameters()))
    assert mx.get_peak_memory() - before <= size + 4096
    own, theirs = bits_of(module), bits_of(expected)
    assert own.keys() == theirs.keys() and all(np.array_equal(own[name], theirs[name]) for name in own)
    assert laid and all(len(paths) > 1 for paths in laid)
    for paths, arrays in laid.items():
        whole = np.concatenate([theirs[f"{path}.weight"] for path in paths])
        assert np.array_equal(np.array(arrays["weight"].view(mx.uint8)), whole)


def test_garbage_is_not_searched_for_while_a_model_is_loaded_and_is_again_afterwards(tiny_model):
    seen = []
    loading.load_model(resolve_base(tiny_model()), meanwhile=lambda: seen.append(gc.isenabled()))
    assert seen == [False] and gc.isenabled()
    with pytest.raises(NotFoundError):
        live.load_model(tiny_model(), "nothing")
    assert gc.isenabled()


def test_a_tokenizer_is_loaded_while_weights_are_read(tiny_model, monkeypatch):
    begun, load, read = threading.Event(), loading.load_tokenizer_of, groups._read

    def read_later(wanted):
        assert begun.wait(60)
        return read(wanted)

    def load_and_tell(*given):
        begun.set()
        return load(*given)

    monkeypatch.setattr(loading, "set_precision", lambda *given: None)  # as on a GPU: weights stay those of files
    monkeypatch.setattr(groups, "_read", read_later)
    monkeypatch.setattr(loading, "load_tokenizer_of", load_and_tell)
    model = loading.load_model(resolve_base(tiny_model()))
    assert model.tokenizer.encode("a") == load(model.base).encode("a")


def test_what_was_changed_after_it_was_read_is_not_read_again(tiny_model):
    path = str(next(tiny_model().glob("*.safetensors")))
    with groups.Origins() as origins:
        arrays = mx.load(path)
    one, other = arrays["model.layers.0.self_attn.k_proj.weight"], arrays["model.layers.0.self_attn.v_proj.weight"]
    with groups.begin_reading({"both": origins.of([one, other])}) as reading:
        read = reading()["both"]
    assert np.array_equal(np.array(read), np.concatenate([one, other]))  # evaluated by now
    assert not origins.of([one])
    with groups.Origins() as origins:
        arrays = mx.load(path)
    other = arrays["model.layers.0.self_attn.v_proj.weight"]
    assert origins.of([other]) and not origins.of([other + 0]) and not origins.of([mx.load(path)["model.norm.weight"]])
    other += 1  # the same object
    assert not origins.of([other])


def test_a_file_that_became_shorter_is_told_of(tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(next(tiny_model().glob("*.safetensors")), path)
    with groups.Origins() as origins:
        arrays = mx.load(str(path))
    wanted = {name: origins.of([array]) for name, array in arrays.items()}
    assert all(wanted.values())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OSError, match="shorter than it was"), groups.begin_reading(wanted) as reading:
        reading()


def test_an_adapter_is_read_while_weights_are_and_without_one_no_more_of_them(tiny_model, monkeypatch):
    begun, reads, go = [], threading.Event(), threading.Event()

    def read(wanted):
        begun.append(wanted)
        reads.set()
        assert go.wait(60)
        return {}

    def absent(adapter):
        assert reads.wait(60)
        raise NotFoundError("There is no adapter.")

    monkeypatch.setattr(loading, "set_precision", lambda *given: None)  # as on a GPU: weights stay those of files
    monkeypatch.setattr(groups, "BATCH", 1)
    monkeypatch.setattr(groups, "_read", read)
    monkeypatch.setattr(live, "load_adapter", absent)
    with pytest.raises(NotFoundError):
        live.load_model(tiny_model(), "absent")
    go.set()
    groups._readers().submit(int).result()
    assert 0 < len(begun) <= groups.READERS


def test_a_file_that_is_replaced_meanwhile_is_told_of(tiny_model, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_model(), folder)
    with groups.Origins() as origins:
        module = loading.load_module(resolve_base(folder))[0]
    path = next(folder.glob("*.safetensors"))
    shutil.copy(path, tmp_path / "other")
    (tmp_path / "other").replace(path)
    reading = groups.reading_into_place(module, dict(loading.adaptable_layers(module)), origins)
    with pytest.raises(OSError, match="changed while it was read"), reading as finish:
        finish()
