"""Adapters at run time: exact, many on one base, each where it belongs."""

import gc
import threading

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.adapters import distance, random_adapter

import mlx_adapters as ma
from mlx_adapters.errors import ConfigError, FormatError, IncompatibleError, ModelError, NotFoundError
from mlx_adapters.generation.live import LiveModel, load_model
from mlx_adapters.models import layers, loading, low_rank
from mlx_adapters.models.adapter import Adapter, write_adapter
from mlx_adapters.models.loading import load_model as load_plain_model
from mlx_adapters.models.metadata import AdapterConfig
from mlx_adapters.runtime.additions import MANY_TOKENS
from mlx_adapters.runtime.pool import AdapterPool
from mlx_adapters.runtime.sites import Concatenated
from mlx_adapters.sources.bases import resolve_base
from mlx_adapters.system import machine

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2"]
PAGE = 16_384  # bytes, on Apple silicon
TOKENS = [5, 9, 2, 77, 31, 6, 7, 8, 301, 44]


@pytest.fixture
def live(tiny_model):
    """A live llama with grouped products, as on a GPU."""
    model = load_model(tiny_model("llama"))
    model.pool = AdapterPool(model.module, group=True)
    return model


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "rwkv7"])
def test_output_is_mlx_lms_and_without_adapter_the_bases(tiny_model, tmp_path, architecture, kind, group):
    model = load_model(tiny_model(architecture))
    model.pool = AdapterPool(model.module, group=group)
    base = model.logits(TOKENS)
    adapter = random_adapter(model, kind)
    folder = write_adapter(adapter, tmp_path / "a")
    plain, _ = mlx_lm.load(str(tiny_model(architecture)), adapter_path=str(folder), model_config=model.base.config)
    plain.set_dtype(mx.float32)
    wanted = plain(mx.array([TOKENS]))[0]
    assert distance(wanted, base) > 1e-2
    model.attach(adapter)
    size = mx.abs(wanted).max().item()
    assert distance(model.logits(TOKENS), wanted) < 1e-5 * size
    assert distance(stepwise(model.module), stepwise(plain)) < 1e-5 * size
    model.use(None)
    assert mx.array_equal(model.logits(TOKENS), base)
    model.detach()
    assert mx.array_equal(model.logits(TOKENS), base)
    assert not any(isinstance(layer, layers.ADAPTED) for _, layer in model.module.named_modules())


def stepwise(module):
    """Logits of the tokens fed one by one through a cache, as decoding does."""
    cache = mlx_lm.models.cache.make_prompt_cache(module)
    return mx.concatenate([module(mx.array([[token]]), cache=cache)[0] for token in TOKENS])


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_quantized_base(tiny_model, bits, kind):
    model, reference = (load_model(tiny_model("llama", bits=bits), dense=False) for _ in range(2))
    model.module.set_dtype(mx.float32)
    model.pool = AdapterPool(model.module, group=True)
    reference.module.set_dtype(mx.float32)
    base = model.logits(TOKENS)
    adapter = random_adapter(model, kind)
    loading.dequantize_layers(reference.module, mx.float32)
    layers.attach(reference.module, adapter)
    model.attach(adapter)
    assert distance(model.logits(TOKENS), reference.module(mx.array([TOKENS]))[0]) < 2e-5
    model.detach()
    assert mx.array_equal(model.logits(TOKENS), base)


def test_grouping_keeps_the_base_in_memory_once(tiny_model):
    model = load_model(tiny_model("llama", hidden_size=256, intermediate_size=1024))
    adapter = random_adapter(model, rank=1, targets=("q_proj", "up_proj"))
    weights = {path: mx.array(np.array(layer.weight)) for path, layer in model.pool.layers.items()}
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    model.pool = AdapterPool(model.module, group=True)
    model.attach(adapter)
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() - before < 3 * model.pool.nbytes
    assert sorted(len(paths) for paths in model.pool._groups) == [2, 2, 3, 3]
    for path, layer in model.pool.layers.items():
        assert mx.array_equal(layer.weight, weights[path])


def test_groups_are_laid_together_as_they_are_read(tiny_model):
    folder = tiny_model("qwen3", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    wanted = loading.load_model(resolve_base(folder))
    mx.synchronize()
    size = mx.get_active_memory()
    del wanted
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    plain = loading.load_model(resolve_base(folder), together=True)
    assert mx.get_peak_memory() < 1.2 * size
    model, wanted = LiveModel(plain), load_model(folder)
    assert len(plain.together) == 8
    assert mx.array_equal(model.logits(TOKENS), wanted.logits(TOKENS))
    model.pool = AdapterPool(model.module, group=True, together=plain.together)
    adapter = random_adapter(model)
    mx.synchronize()
    before = mx.get_active_memory()
    model.attach(adapter)
    wanted.attach(adapter)
    mx.synchronize()
    assert mx.get_active_memory() - before < 0.1 * size
    assert distance(model.logits(TOKENS), wanted.logits(TOKENS)) < 1e-4


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_on_cuda_experts_have_a_rank_that_it_computes(rank, tiny_model, monkeypatch):
    model = load_model(tiny_model("qwen3_moe"))
    adapter = random_adapter(model, rank=rank)
    logits = []
    for cuda in (False, True):
        monkeypatch.setattr(low_rank, "on_cuda", lambda cuda=cuda: cuda)
        model.attach(adapter, name=str(cuda))
        logits.append(model.logits(TOKENS))
    ranks = [{f.a.shape[-2] for f in e.factors.values() if f.b.ndim == 3} for e in model.pool.attached.values()]
    assert ranks[-1] == {8} and mx.allclose(*logits, atol=1e-5)


def test_a_weight_unpacked_for_many_tokens_computes_the_same(tiny_model, monkeypatch):
    model = load_model(tiny_model("llama", bits=4), dense=False)
    model.pool = AdapterPool(model.module, group=True)
    model.attach(random_adapter(model))
    many = [3 + i % 400 for i in range(MANY_TOKENS + 40)]
    monkeypatch.setattr("mlx_adapters.runtime.unpacked.serves", lambda *_: False)  # the update is computed beside it
    wanted, unpacked = model.logits(many), []
    packed = [site for site in set(model.pool._sites.values()) if isinstance(site.product, Concatenated)]
    for site in packed:
        site.product.unpacks = True
    monkeypatch.setattr(mx, "dequantize", lambda *a, own=mx.dequantize, **k: (unpacked.append(1), own(*a, **k))[1])
    assert distance(model.logits(many), wanted) < 1e-4 * mx.abs(wanted).max().item()
    seen = len(unpacked)
    model.logits(many[:MANY_TOKENS])  # the embedding alone
    assert seen == sum(len(site.layers) for site in packed) + len(unpacked) - seen > 2


def held_by(model, size, before):
    """Whether MLX holds about `size` bytes of adapters more than `before`, and what the pool says.

    A GPU gives memory in whole pages.
    """
    gc.collect()
    mx.synchronize()
    held, pool = mx.get_active_memory() - before, model.pool
    arrays = sum(len(factors.arrays) for entry in pool.attached.values() for factors in entry.factors.values())
    pages = 2 * PAGE * arrays if mx.default_device() == mx.gpu else 0
    return 0.9 * size <= held <= 1.1 * size + pages and pool.nbytes <= 1.01 * size


def test_memory_of_many_adapters(tiny_model):
    model = load_model(tiny_model("llama", hidden_size=256, intermediate_size=1024))
    adapters = [random_adapter(model, seed=i) for i in range(8)]
    size = sum(w.nbytes for w in adapters[0].weights.values())
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    for adapter in adapters:
        model.attach(adapter)
    assert held_by(model, 8 * size, before)
    rows = [model.pool.get(adapters[0].name), model.pool.get(adapters[1].name)]
    rows_of(model, rows, mx.array([TOKENS] * 2))
    assert held_by(model, 9 * size, before)  # slot 0 is the base


def test_what_was_read_for_it_goes_as_it_is_taken(tiny_model):
    """An adapter given by the user keeps its weights; one that was read to be attached is never there twice."""
    model = load_model(tiny_model("llama"))
    adapter = random_adapter(model, seed=1)
    whole = dict(adapter.weights)
    model.attach(adapter, name="given")
    assert adapter.weights == whole
    model.pool.add("read", adapter, spent=True)
    assert adapter.weights == {}
    outputs = []
    for name in ("given", "read"):
        with model.pool.applied(model.pool.choose(name)):
            outputs.append(model.module(mx.array([TOKENS])))
    assert mx.array_equal(*outputs)


def test_what_is_detached_leaves_memory_at_once(tiny_model):
    """Whoever still holds its entry, and although the others lay in one stack with it."""
    model = load_model(tiny_model("llama", hidden_size=256, intermediate_size=1024))
    adapters = [random_adapter(model, rank=64, seed=i) for i in range(4)]
    size = sum(w.nbytes for w in adapters[0].weights.values())
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    for i, adapter in enumerate(adapters):
        model.attach(adapter, name=str(i))
    wanted = model.logits(TOKENS)
    entries = list(model.pool.attached.values())
    rows_of(model, entries, mx.array([TOKENS] * 4))
    for name in "01":
        model.detach(name)
    assert held_by(model, 2 * size, before) and len(entries) == 4
    assert mx.array_equal(model.logits(TOKENS), wanted)
    rows = rows_of(model, [*entries[2:], None], mx.array([TOKENS] * 3))
    assert distance(rows[1], wanted) < 1e-4


def test_nothing_is_held_between_calls(live):
    live.attach(random_adapter(live))
    groups = [site for site in set(live.pool._sites.values()) if len(site.paths) > 1]
    live.logits(TOKENS)
    assert all(group._held is None for group in groups)
    x = mx.ones((1, 2, 64))
    q = live.module.model.layers[0].self_attn.q_proj
    q(x)
    held = q._site._held
    assert set(held[1]) == {1, 2}
    del x, held
    gc.collect()
    assert q._site._held is None


def test_switching_scaling_and_mixing(live):
    a, b = random_adapter(live, rank=4, seed=1), random_adapter(live, "dora", rank=2, seed=2, targets=("q_proj",))
    live.attach(a, name="a")
    live.attach(b, name="b", use=False)
    assert [(i.name, i.weight) for i in live.adapters] == [("a", 1.0), ("b", None)]
    base, x = None, mx.random.normal((1, 3, 64))
    q = live.module.model.layers[1].self_attn.q_proj
    outputs = {}
    for name in (None, "a", "b"):
        live.use(name)
        outputs[name] = q(x)
    base = outputs[None]
    live.use({"a": 0.7, "b": 0.3})
    wanted = base + 0.7 * (outputs["a"] - base) + 0.3 * (outputs["b"] - base)
    assert distance(q(x), wanted) < 1e-5
    live.use("a", scale=0.5)
    assert distance(q(x), base + 0.5 * (outputs["a"] - base)) < 1e-5
    live.use("a")
    assert mx.array_equal(q(x), outputs["a"])
    live.detach("a")
    assert live.adapter is None and mx.array_equal(q(x), base)


def test_using_is_undone_and_takes_what_is_not_attached(live):
    base = live.logits(TOKENS)
    live.attach(random_adapter(live, seed=1), name="a")
    with_a = live.logits(TOKENS)
    other = random_adapter(live, seed=2)
    with live.using(other) as model:
        assert model is live and distance(live.logits(TOKENS), with_a) > 1e-3
        with live.using(None):
            assert mx.array_equal(live.logits(TOKENS), base)
    assert [info.name for info in live.adapters] == ["a"]
    assert mx.array_equal(live.logits(TOKENS), with_a)


def test_failed_attach_changes_nothing(live):
    live.attach(random_adapter(live, seed=1), name="a")
    before, names = live.logits(TOKENS), dict(live.module.named_modules()).keys()
    good = random_adapter(live, seed=2)
    key = next(iter(good.config.keys))
    misshapen = good.with_weights(good.weights | {f"{key}.lora_a": mx.zeros((3, 4))})
    renamed = Adapter(
        AdapterConfig(4, 2.0, ("model.layers.9.x",)), {f"model.layers.9.x.lora_{s}": mx.zeros((4, 4)) for s in "ab"}
    )
    foreign = Adapter(good.config, good.weights, {"base": {"name": "other", "fingerprint": "f" * 64}})
    for bad in (misshapen, renamed, foreign):
        with pytest.raises((IncompatibleError, FormatError)):
            live.attach(bad)
    with pytest.raises(NotFoundError, match="No adapter 'b'"):
        live.use("b")
    assert dict(live.module.named_modules()).keys() == names
    assert [info.name for info in live.adapters] == ["a"] and mx.array_equal(live.logits(TOKENS), before)
    live.attach(foreign, any_base=True)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fuse_in_place_and_back(tiny_model, architecture, kind):
    model = load_model(tiny_model(architecture))
    model.pool = AdapterPool(model.module, group=True)
    base = model.logits(TOKENS)
    model.attach(random_adapter(model, kind, targets=("q_proj", "v_proj", "o_proj")), name="a")
    attached = model.logits(TOKENS)
    model.fuse_in_place("a")
    assert type(model.module.model.layers[0].self_attn.q_proj) is nn.Linear
    assert distance(model.logits(TOKENS), attached) < 1e-5
    model.unfuse()
    assert mx.array_equal(model.logits(TOKENS), attached)
    model.fuse_in_place("a")
    model.use(None)
    assert mx.array_equal(model.logits(TOKENS), base)


def test_interleaved_streams_keep_adapter_and_seed(live):
    for i in (1, 2):
        live.attach(random_adapter(live, seed=i), name=str(i))
    options = {"max_tokens": 12, "temperature": 1.0}

    def begin(name, seed):
        live.use(name)
        return live.stream("List all", seed=seed, **options)

    jobs = [("1", 3), ("2", 4), (None, 5)]
    alone = [[r.token for r in begin(*job)] for job in jobs]
    together = [[] for _ in jobs]
    streams = [begin(*job) for job in jobs]
    while any(streams):
        for i, stream in enumerate(streams):
            if stream is not None:
                response = next(stream, None)
                live.use("2")
                if response is None:
                    streams[i] = None
                else:
                    together[i].append(response.token)
    assert together == alone and len({tuple(t) for t in alone}) == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_do_not_mix(live):
    names = ["1", "2", None]
    for i in (1, 2):
        live.attach(random_adapter(live, seed=i), name=str(i))
    wanted = {}
    for name in names:
        with live.using(name):
            wanted[name] = live.generate([5, 6, 7], max_tokens=8).token_ids
    failures = []

    def work(name):
        for _ in range(4):
            with live.using(name):
                if live.generate([5, 6, 7], max_tokens=8).token_ids != wanted[name]:
                    failures.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(set(map(tuple, wanted.values()))) == 3


def test_cache_is_bound_to_its_adapter(live):
    live.attach(random_adapter(live, seed=1), name="a")
    cache = live.new_cache()
    assert len(list(live.stream([5, 6, 7], max_tokens=3, cache=cache))) == 3
    assert cache.layers[0].offset in (5, 6)  # the last token may be in it or not yet
    live.use(None)
    with pytest.raises(IncompatibleError, match="another adapter"):
        live.stream([5], cache=cache)
    live.use("a")
    stream = live.stream([5], max_tokens=5, cache=cache)
    next(stream)
    live.detach("a")
    with pytest.raises(IncompatibleError, match="detached"):
        next(stream)


def rows_of(model, entries, tokens):
    with model.pool.routed(entries):
        logits = model.module(tokens)
        mx.eval(logits)
    return logits


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_has_its_own_adapter(tiny_model, architecture, group):
    model = load_model(tiny_model(architecture))
    model.pool = AdapterPool(model.module, group=group)
    embedding = "wte" if architecture == "gpt2" else "embed_tokens"
    targets = ["all", (embedding,), "all"]
    kinds = ["lora", "lora", "dora"]
    for i, (kind, target) in enumerate(zip(kinds, targets, strict=True)):
        model.attach(random_adapter(model, kind, rank=(4, 7, 2)[i], targets=target, seed=i), name=str(i))
    order = ["1", None, "0", "2", "0", "2", "1"]
    tokens = mx.array(np.random.default_rng(0).integers(0, 512, (len(order), 11)))
    rows = rows_of(model, [name and model.pool.get(name) for name in order], tokens)
    step = rows_of(model, [name and model.pool.get(name) for name in order], tokens[:, :1])
    for i, name in enumerate(order):
        model.use(name)
        assert distance(rows[i], model.logits(tokens[i])) < 1e-4
        assert distance(step[i], model.logits(tokens[i, :1])) < 1e-4
    model.detach("0")
    model.use("1")
    assert distance(model.logits(tokens[0]), rows[0]) < 1e-4


def test_public_load_model_takes_an_adapter(tiny_model, tmp_path):
    folder = tiny_model("qwen3")
    adapter = random_adapter(load_plain_model(resolve_base(folder)))
    path = write_adapter(adapter, tmp_path / "sql")
    model = ma.load_model(folder, path)
    assert isinstance(model, LiveModel) and "at work: random0: 1" in repr(model)
    assert 1 <= len(model.generate("hello", max_tokens=3).token_ids) <= 3


def test_ids_that_the_model_has_no_row_for_are_refused(tiny_model):
    """They would read foreign memory: on the CPU the process died."""
    model = load_model(tiny_model("llama"))
    for wrong in ([], [512], [-1], [10**12], [1.5], ["a"]):
        for work in (
            lambda ids: model.generate(ids, max_tokens=1),
            lambda ids: model.generate_batch([(ids, None)]),
            model.logits,
        ):
            with pytest.raises(ModelError):
                work(wrong)
    for text in ("\ud800", "caf\udcff"):
        with pytest.raises(ModelError, match="Unicode"):
            model.generate(text)
    for options in ({"temperature": float("nan")}, {"temperature": float("inf")}):
        with pytest.raises(ConfigError, match="temperature"):
            model.generate("a", **options)


def test_weights_and_adapters_in_memory_are_checked(live):
    adapter = random_adapter(live)
    name = next(iter(adapter.weights))
    for weights in (
        adapter.weights | {name: adapter.weights[name] * float("nan")},
        {key: value for key, value in adapter.weights.items() if key != name},
    ):
        with pytest.raises(FormatError):
            live.attach(adapter.with_weights(weights))
    assert live.adapters == ()
    live.attach(adapter, name="a")
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            live.use("a", scale=weight)


def test_factors_stay_laid_out_for_one_rows_products(tiny_model):
    """Alone, mixed, and as slots of a batch: bᵀ (on a GPU b) lies in one piece, or a row's product takes longer."""
    model = load_model(tiny_model("qwen2"))
    for i in range(2):
        model.attach(random_adapter(model, rank=2 + i, seed=i), name=str(i), use=False)

    def check():
        for site in set(model.pool._sites.values()):
            b = np.array(site.update.b, copy=False)
            embedding = isinstance(site.layers[0], layers.EMBEDDING)
            in_one_piece = b.flags.f_contiguous if machine.on_gpu() else b.flags.c_contiguous
            assert embedding or in_one_piece, (site.paths, b.shape, b.strides)

    for selection in ("0", {"0": 0.5, "1": 2.0}):
        model.use(selection)
        check()
    model.generate_batch([(TOKENS, "0"), (TOKENS, "1")], max_tokens=2)
    check()
    model.use("1")
    check()


def test_a_model_with_learned_positions_ends_with_them(tiny_model):
    """Beyond them it would read foreign memory."""
    model = load_model(tiny_model("gpt2"))
    for work in (lambda ids: model.generate(ids, max_tokens=1), lambda ids: model.generate_batch([(ids, None)])):
        with pytest.raises(ModelError, match="512 positions"):
            work([5] * 513)
    assert len(model.generate([5] * 508, max_tokens=30).token_ids) == 5
    assert model.generate_batch([([5] * 508, None)], max_tokens=30) == [model.generate([5] * 508, max_tokens=5).text]
    cache = model.new_cache()
    list(model.stream([5] * 500, max_tokens=1, cache=cache))
    read = cache.layers[0].offset
    with pytest.raises(ModelError, match="513 tokens"):
        list(model.stream([5] * (513 - read), cache=cache))
    assert len(list(model.stream([5] * (508 - read), max_tokens=30, cache=cache))) == 5
