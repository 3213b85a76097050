"""What a tree gives back is what reading anew gives, for every kind of cache of mlx-lm; and it keeps its limit."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.adapters import distance
from helpers.tiny_configs import make_model, tiny_config

from mlx_adapters.prompt_caches.probing import comes_back
from mlx_adapters.prompt_caches.tree import PrefixTree
from mlx_adapters.system.door import make_prompt_cache

# full, sliding, sliding beside full, chunked, latent, recurrent beside full, recurrent, both in one layer
KINDS = ["llama", "gemma3_text", "gpt_oss", "llama4", "deepseek_v3", "qwen3_5", "mamba2", "falcon_h1"]
# llama4 drops what is out of its chunk with the next call; others go on from where reading stopped: after 7 tokens, or
# at an end.
BY_TOKENS = ["llama", "deepseek_v3", "llama4"]
WINDOWS = ("sliding_window", "attention_chunk_size")


@pytest.fixture(scope="module")
def module_of():
    made = {}

    def module(name):
        if name not in made:
            config = tiny_config(name)
            for part in (config, config.get("text_config", {})):
                part |= {field: 16 for field in WINDOWS if field in part}
            mx.random.seed(1)
            made[name] = make_model(config)
            mx.eval(made[name].parameters())
        return made[name]

    return module


def read(module, tree, key, prompt, pieces=(7, 100)):
    """The logits after `prompt`, read after what the tree knows of it; and how much that was."""
    cache, known = tree.find(key, prompt[:-1])
    done = known
    for piece in pieces:
        part = prompt[done : min(done + piece, len(prompt) - 1)]
        if part:
            module(mx.array([part]), cache=cache)
            mx.eval([layer.state for layer in cache])
            done += len(part)
            tree.add(key, prompt[:done], cache)
    logits = module(mx.array([prompt[-1:]]), cache=cache)[0, -1]
    tree.add(key, prompt, cache)
    for token in (3, 4):  # who goes on changes nothing that others were given
        module(mx.array([[token]]), cache=cache)
    return logits, known


def cold(module, prompt, pieces=(7, 100)):
    return read(module, PrefixTree(lambda: make_prompt_cache(module), 0), None, prompt, pieces)[0]


@pytest.mark.parametrize("name", KINDS)
def test_it_gives_back_what_was_read(name, module_of):
    module, random = module_of(name), np.random.default_rng(0)
    assert comes_back(module, lambda: make_prompt_cache(module), together=False)
    tree = PrefixTree(lambda: make_prompt_cache(module), 1 << 30)
    first = random.integers(5, 200, 40).tolist()
    other = [*first[:20], *random.integers(5, 200, 12).tolist()]
    prompts = [first, first, [*first, 9, 8, 7], other, [*other, 5, 6], first[:12], [*first, 9, 8, 7, 6, 5], first[:25]]
    reused = []
    for prompt in prompts:
        logits, known = read(module, tree, "a", prompt)
        assert distance(logits, cold(module, prompt)) < 1e-4
        reused.append(known)
    by_tokens = name in BY_TOKENS
    assert reused == ([0, 39, 40, 20, 32, 11, 43, 24] if by_tokens else [0, 39, 40, 7, 32, 7, 43, 14])
    assert tree.by_moments == (not by_tokens or name == "llama4")
    assert tree.find("b", first)[1] == 0
    assert sum(node.nbytes for node in tree._order) == tree.nbytes > 0
    tree.drop("a")
    assert tree.nbytes == len(tree) == 0 and tree.find("a", first)[1] == 0


def test_parts_are_kept_once_and_the_limit_is_kept(module_of):
    module, random = module_of("llama"), np.random.default_rng(1)
    tree = PrefixTree(lambda: make_prompt_cache(module), 1 << 30)
    first = random.integers(5, 200, 50).tolist()
    read(module, tree, None, first)
    each = tree.nbytes // 50
    assert tree.nbytes == each * 50
    read(module, tree, None, [*first[:40], *random.integers(5, 200, 10).tolist()])
    assert tree.nbytes == each * 60 and tree._order.keys() >= {tree._roots[None].children[first[0]]}
    tree.limit = each * 100
    for number in range(40):
        prompt = [*first[: random.integers(1, 50)], *random.integers(5, 200, random.integers(2, 30)).tolist()]
        logits, _ = read(module, tree, number % 2, prompt)
        assert tree.nbytes <= tree.limit and sum(node.nbytes for node in tree._order) == tree.nbytes
        assert distance(logits, cold(module, prompt)) < 1e-4
    assert len(tree._roots) <= 3
    before = tree.nbytes
    read(module, tree, None, random.integers(5, 200, 150).tolist(), pieces=(200,))  # more than there may be
    assert tree.nbytes == before
    assert PrefixTree(lambda: make_prompt_cache(module), 0).find(None, first)[1] == 0


def test_what_was_used_last_stays(module_of):
    module = module_of("llama")
    tree = PrefixTree(lambda: make_prompt_cache(module), 1 << 30)
    prompts = [[100 + i, *range(5, 24)] for i in range(4)]
    for prompt in prompts[:3]:
        read(module, tree, None, prompt)
    tree.limit = tree.nbytes
    tree.find(None, prompts[0])
    read(module, tree, None, prompts[3])
    assert [tree.find(None, prompt)[1] for prompt in prompts] == [20, 0, 20, 20]
