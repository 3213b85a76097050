"""The principal directions of a stream are those of all of it, as far as they are remembered."""

import numpy as np
import pytest

from mlx_adapters.starts.directions import Directions, shared_out


@pytest.mark.parametrize("width", [6, 60])
def test_a_stream_in_parts_has_the_directions_of_the_whole(width):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((90, 5)) * [9, 5, 3, 2, 1] @ rng.standard_normal((5, width)) + 7 * rng.standard_normal(
        width
    )
    directions = Directions(5)
    for part in np.array_split(x, [13, 50]):
        directions.add(part)
    centered = x - x.mean(axis=0)
    _, s, vt = np.linalg.svd(centered, full_matrices=False)
    np.testing.assert_allclose(np.abs(directions.vectors @ vt[:5].T), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(directions.explained, s[:5] ** 2 / (s**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(directions.mean, x.mean(axis=0))


def test_no_direction_is_made_of_nothing():
    directions = Directions(4)
    directions.add(np.outer([1.0, 2, 5, 7], [3.0, 4, 0]))
    assert directions.vectors.shape == (1, 3)
    np.testing.assert_allclose(np.abs(directions.vectors[0]), [0.6, 0.8, 0])


def test_ranks_go_where_they_explain_most():
    shares = {"a": np.array([0.5, 0.3, 0.1, 0.05]), "b": np.array([0.2, 0.15, 0.01]), "c": np.array([0.0001])}
    assert shared_out(shares, 6, {"a": 4, "b": 4, "c": 4}) == {"a": 3, "b": 2, "c": 1}
    assert shared_out(shares, 6, {"a": 2, "b": 4, "c": 4}) == {"a": 2, "b": 3, "c": 1}
    assert shared_out(shares, 2, {"a": 4, "b": 4, "c": 4}) == {"a": 1, "b": 1, "c": 1}
