"""A prompt cache in a file: mlx-lm reads it, and nothing goes on from one that is not its own."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from helpers.adapters import distance, random_adapter
from helpers.tiny_configs import tiny_base
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

import mlx_adapters as ma
from mlx_adapters.cli import cli
from mlx_adapters.errors import FormatError, IncompatibleError, ModelError, NotFoundError
from mlx_adapters.generation.chat import Chat
from mlx_adapters.generation.live import LiveModel, load_model
from mlx_adapters.prompt_caches.layers import leaves


def talk(model, cache, prompt, tokens=6):
    """(answer's tokens, the cache after it, how much of the prompt was known)."""
    cache, rest = model.going_on(cache, prompt)
    written = [step.token for step in model.stream(rest, cache=cache, max_tokens=tokens)]
    return written, cache, len(prompt) - len(rest)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_5", "mamba2"])
def test_what_is_written_is_read(name, tmp_path):
    model = load_model(tiny_base(tmp_path / "base", name))
    prompt = np.random.default_rng(0).integers(5, 200, 30).tolist()
    written, cache, _ = talk(model, None, prompt)
    assert cache.tokens == [*prompt, *written]
    model.save_cache(cache, tmp_path / "kept.safetensors")
    model.save_cache(cache, tmp_path / "kept")  # any name will do here
    again = model.load_cache(tmp_path / "kept")
    assert again.tokens == cache.tokens
    following = [*prompt, *written, 7, 8, 9]
    expected = talk(model, None, following)[0]
    for kept in (again, cache):
        answered, _, known = talk(model, kept, following)
        assert answered == expected and known == len(following) - 3
    theirs = load_prompt_cache(str(tmp_path / "kept.safetensors"))
    logits = model.module(mx.array([[7, 8, 9]]), cache=theirs)[0, -1]
    assert distance(logits, model.logits(following)[-1]) < 1e-4
    for other in ([*prompt[:20], 3, 4, 5], prompt[:10]):  # begins alike: cut where that is exact, else read anew
        answered, _, known = talk(model, model.load_cache(tmp_path / "kept"), other)
        assert answered == talk(model, None, other)[0]
        assert known == (min(20, len(other) - 1) if name == "llama" else 0)


def test_a_chat_goes_on_where_no_layer_counts_tokens(tmp_path):
    model = load_model(tiny_base(tmp_path / "base", "mamba2"))
    assert not any(hasattr(layer, "offset") for layer in leaves(model.new_layers()))
    chat = Chat(model)
    for text in ("a b c d", "e f", "g h i"):
        tokens = chat._encode([*chat.messages, {"role": "user", "content": text}])
        expected = model.generate(tokens, max_tokens=5).text
        assert "".join(chat.ask(text, max_tokens=5)) == expected


def test_it_is_empty_when_a_step_was_stopped(tiny_model, monkeypatch):
    model = load_model(tiny_model("llama"))
    cache = model.new_cache()
    steps = model.stream([5, 6, 7], cache=cache, max_tokens=9)
    first = next(steps).token
    steps.close()
    assert cache.tokens == [5, 6, 7, first]
    steps = model.stream([8, 9], cache=cache, max_tokens=9)
    next(steps)
    monkeypatch.setattr(model.pool, "applied", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert cache.tokens == [] and all(layer.empty() for layer in cache.layers)


def test_what_is_not_its_own_is_refused(tiny_model, tmp_path):
    model, path = load_model(tiny_model("llama")), tmp_path / "kept.safetensors"
    for i in range(2):
        model.attach(random_adapter(model, seed=i), name=str(i), use=False)
    model.use("0")
    _, cache, _ = talk(model, None, list(range(5, 30)))
    model.save_cache(cache, path)
    model.load_cache(path)
    for selection in (None, "1", {"0": 0.5}):
        model.use(selection)
        with pytest.raises(IncompatibleError, match="another adapter"):
            model.load_cache(path)
    other = load_model(tiny_model("llama", bits=4))
    with pytest.raises(IncompatibleError, match="another base"):
        other.load_cache(path)
    model.use("0")
    with pytest.raises(NotFoundError):
        model.load_cache(tmp_path / "nothing")
    whole = path.read_bytes()
    size_of_header = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size_of_header])
    record = json.loads(header["__metadata__"]["0.mlx_adapters"])
    for change in (
        {"0.mlx_adapters": "no JSON"},
        {"0.mlx_adapters": json.dumps(record | {"tokens": [1, 2]})},
        {"0.mlx_adapters": json.dumps({"of": record["of"]})},
        {"1.0": "RotatingKVCache"},
        {"1.0": "copy"},
        {"2.1.1": "anything"},
    ):
        text = json.dumps(header | {"__metadata__": header["__metadata__"] | change}).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size_of_header :])
        with pytest.raises(FormatError):
            model.load_cache(path)
    beyond = {"0.mlx_adapters": json.dumps(record | {"tokens": [10**6] * len(record["tokens"])})}
    text = json.dumps(header | {"__metadata__": header["__metadata__"] | beyond}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size_of_header :])
    with pytest.raises(ModelError, match="has no token 1000000"):  # penalties would write where it would lie
        model.load_cache(path)
    for name, tensor in header.items():
        if name.startswith("0.0"):  # keys of other heads, as large
            batch, heads, length, size = tensor["shape"]
            text = json.dumps(header | {name: tensor | {"shape": [batch, heads * 2, length, size // 2]}}).encode()
            text += b" " * (-len(text) % 8)
            path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size_of_header :])
            with pytest.raises(FormatError):
                model.load_cache(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(FormatError):
        model.load_cache(path)
    layers = make_prompt_cache(model.module)
    model.module(mx.array([[5, 6]]), cache=layers)
    save_prompt_cache(str(path), layers, {"model": "x", "tokenizer_config": "{}"})
    with pytest.raises(FormatError, match="does not say of which tokens"):
        model.load_cache(path)


def test_generate_and_chat_keep_what_they_read(tiny_model, tmp_path, monkeypatch):
    base, path, read = str(tiny_model("llama")), tmp_path / "kept", []
    going_on = LiveModel.going_on
    monkeypatch.setattr(LiveModel, "going_on", lambda *given: read.append(going_on(*given)) or read[-1])

    def run(*arguments, **more):
        options = ("--base", base, "--max-tokens", "4", "--prompt-cache", str(path))
        result = CliRunner().invoke(cli, [*arguments, *options], **more)
        return result.exit_code, result.stdout

    plain = CliRunner().invoke(cli, ["generate", "Go on.", "--base", base, "--max-tokens", "4"]).stdout
    answers = [run("generate", "Go on."), run("generate", "Go on."), run("generate", "Go on.", "--json")]
    assert answers[0] == answers[1] == (0, plain) and len(read[0][1]) > 1 and len(read[1][1]) == 1
    assert json.loads(answers[2][1])["prompt_tokens"] == len(read[0][1])
    code, text = run("chat", input="Go on.\nAnd then?\n")
    assert code == 0 and text.startswith(plain.rstrip("\n")) and len(read[3][1]) == 1
    assert len(load_model(base).load_cache(path).tokens) > len(read[0][1]) + 4
    assert run("generate", "Go on.", "--dtype", "bfloat16")[0] == 1


def test_penalties_see_what_was_read_before(tmp_path):
    """An answer that goes on from a cache is that of the whole prompt, penalties included, with guesses too."""
    folder = tiny_base(tmp_path / "base", "llama")
    prompt = [*range(5, 300), *range(20, 30)]  # what the model says is mostly among the first
    hard = {"repetition_penalty": 1.9, "penalty_window": None, "max_tokens": 12, "ignore_eos": True}
    windowed = hard | {"penalty_window": 290}
    for drafting in (None, ma.Drafting(prompt_lookup=True)):
        model = load_model(folder, drafting=drafting)
        for how in (hard, windowed):
            whole = [step.token for step in model.stream(prompt, **how)]
            cache = model.new_cache()
            list(model.stream(prompt[:295], cache=cache, max_tokens=1))
            cache, rest = model.going_on(cache, prompt)
            assert len(rest) == 10
            assert [step.token for step in model.stream(rest, cache=cache, **how)] == whole
    assert whole != [step.token for step in model.stream(prompt, max_tokens=12, ignore_eos=True)]


def test_with_guesses_a_cache_of_few_bits_is_so_from_the_beginning(tiny_model):
    folder = tiny_model("llama", head_dim=64)
    kv = ma.CacheQuantization(kv_bits=8, kv_group_size=32)
    plain, guessing = (load_model(folder, drafting=d, kv=kv) for d in (None, ma.Drafting(prompt_lookup=True)))
    kinds = [{type(layer).__name__ for layer in model.new_layers()} for model in (plain, guessing)]
    assert kinds == [{"KVCache"}, {"QuantizedKVCache"}]
