"""A tree of the prompts that were read: what a new one begins with is not computed again.

A radix tree over tokens (as in SGLang's RadixAttention, arXiv 2312.07104). An edge holds its tokens' keys and values
once, however many prompts go on from there. Where a layer does not hold all tokens (a sliding window, a recurrent
state), copies of it stand where reading stopped, and a prompt goes on from the last of these. Nothing in the tree is
changed: who goes on from it gets arrays of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from mlx_adapters.prompt_caches.layers import arrays, bring_back, cut, fill, held, leaves, moment, nbytes
from mlx_adapters.system.door import mx


class Node:
    """An edge of `tokens` and where it ends.

    `held` has the keys and values of these tokens for each layer, None where it cannot tell tokens apart; `moments` the
    copies of such layers after the last token, None where nobody stopped.
    """

    def __init__(self, parent: "Node | None", tokens: np.ndarray, held: list[Any]) -> None:
        self.parent, self.tokens, self.held = parent, tokens, held
        self.moments: list[Any] | None = None
        self.children: dict[int, Node] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds."""
        return nbytes(self.held) + sum(nbytes(vars(layer)) for layer in self.moments or () if layer is not None)


class PrefixTree:
    """What was read with each `key`, in `limit` bytes at most: what was used least recently goes first.

    `make` gives an empty cache of the model. To be used from one thread.
    """

    def __init__(self, make: Callable[[], list[Any]], limit: int) -> None:
        self.make, self.limit, self.nbytes = make, limit, 0
        self.by_moments = False  # whether some prompt could only be kept as it was where its reading stopped
        self._roots: dict[Hashable, Node] = {}
        self._order: OrderedDict[Node, int] = OrderedDict()  # bytes; a node stands behind all those below it

    def __len__(self) -> int:
        return len(self._order)

    def known(self, key: Hashable, tokens: Sequence[int]) -> int:
        """How many of the first `tokens` need not be read."""
        return self._longest(key, tokens)[1]

    def find(self, key: Hashable, tokens: Sequence[int]) -> tuple[list[Any], int]:
        """A cache of the longest beginning of `tokens` that is known, and how many they are."""
        (path, length), cache = self._longest(key, tokens), self.make()
        for i, layer in enumerate(leaves(cache) if path else ()):
            if all(node.held[i] is not None for node in path):
                fill(layer, [node.held[i] for node in path], length)
            else:
                bring_back(layer, path[-1].moments[i])  # type: ignore[index]
        self._touch(path[-1] if path else None)
        return cache, length

    def _longest(self, key: Hashable, tokens: Sequence[int]) -> tuple[list[Node], int]:
        """The nodes of the longest beginning of `tokens` that can be gone on from, and its length."""
        path = self._path(key, np.asarray(tokens))
        told = [True for _ in path[0][0].held] if path else []  # layers of which every token so far is held
        best, length, read = 0, 0, 0
        for count, (node, common) in enumerate(path, start=1):
            told = [so_far and part is not None for so_far, part in zip(told, node.held, strict=True)]
            read += common
            whole = common == len(node.tokens) and node.moments is not None
            if all(told) or (whole and all(t or m is not None for t, m in zip(told, node.moments or (), strict=True))):
                best, length = count, read
        return [node for node, _ in path[:best]], length

    def add(self, key: Hashable, tokens: Sequence[int], cache: Sequence[Any]) -> None:
        """Keep what `cache` holds after these tokens, as far as it is not known yet."""
        given, layers = np.asarray(tokens), leaves(cache)
        if len(given) == 0 or self.limit <= 0:
            return
        path, parts = self._path(key, given), [held(layer) for layer in layers]
        known = sum(common for _, common in path)
        told = [part is not None and all(node.held[i] is not None for node, _ in path) for i, part in enumerate(parts)]
        self.by_moments = self.by_moments or not all(told)
        new = sum(nbytes(part) * (len(given) - known) // len(given) for part in parts)
        if new + sum(nbytes(vars(layer)) for t, layer in zip(told, layers, strict=True) if not t) > self.limit:
            return  # everything else would go for it
        end = path[-1][0] if path else self._roots.setdefault(key, Node(None, given[:0], []))
        if path and path[-1][1] < len(end.tokens) and not (known == len(given) and all(told)):
            end = self._split(end, path[-1][1])
        if known < len(given):
            below = Node(end, given[known:], [None if part is None else cut(part, known) for part in parts])
            end.children[int(given[known])] = end = below
        if not all(told) and end.moments is None:
            end.moments = [None if t else moment(layer) for t, layer in zip(told, layers, strict=True)]
        self._count(end)
        self._touch(end)
        while self.nbytes > self.limit:
            self._forget(next(iter(self._order)))

    def drop(self, key: Hashable) -> None:
        """Forget all that was read with this key."""
        root = self._roots.pop(key, None)
        below = list(root.children.values()) if root is not None else []
        while below:
            node = below.pop()
            below += node.children.values()
            self.nbytes -= self._order.pop(node)

    def clear(self) -> None:
        """Forget everything."""
        self._roots, self.nbytes = {}, 0
        self._order.clear()

    def _path(self, key: Hashable, tokens: np.ndarray) -> list[tuple[Node, int]]:
        """The nodes along `tokens`, with how many of their tokens are there: all, but for the last one."""
        node, path, read = self._roots.get(key), [], 0
        while node is not None and read < len(tokens):
            node = node.children.get(int(tokens[read]))
            if node is not None:
                path.append((node, _common(node.tokens, tokens[read:])))
                read += path[-1][1]
                if path[-1][1] < len(node.tokens):
                    break
        return path

    def _split(self, node: Node, at: int) -> Node:
        """The new node that ends after `at` tokens of this one, above it."""
        upper = Node(node.parent, node.tokens[:at], [part if part is None else cut(part, 0, at) for part in node.held])
        node.held = [part if part is None else cut(part, at) for part in node.held]
        node.parent.children[int(node.tokens[0])] = upper  # type: ignore[union-attr]
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[int(node.tokens[0])] = node
        self._count(node)
        self._count(upper)
        return upper

    def _count(self, node: Node) -> None:
        """Note how large it is now, and have it computed: what it was cut from is free then."""
        mx.async_eval(arrays(node.held), [arrays(vars(m)) for m in node.moments or () if m is not None])
        self.nbytes += node.nbytes - self._order.get(node, 0)
        self._order[node] = node.nbytes

    def _touch(self, node: Node | None) -> None:
        """Note that it was used, and with it what it goes on from: a node is always older than the one above it."""
        while node is not None and node.parent is not None:
            self._order.move_to_end(node)
            node = node.parent

    def _forget(self, node: Node) -> None:
        """Let the oldest go, from which nothing goes on."""
        self.nbytes -= self._order.pop(node)
        parent = node.parent
        assert parent is not None and not node.children
        del parent.children[int(node.tokens[0])]
        if parent.parent is None and not parent.children:
            self._roots = {key: root for key, root in self._roots.items() if root is not parent}


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
