"""Samples of spaces reach everything that the space contains, and nothing else."""

import jax
import numpy as np

from envs import Box, Discrete


def test_samples_cover_the_space():
    keys = jax.random.split(jax.random.key(0), 2000)
    actions = np.asarray(jax.vmap(Discrete(3).sample)(keys))
    assert np.bincount(actions).min() > 550 and actions.max() == 2 and actions.dtype == np.int32
    low, high = np.array([-1.0, 0.0]), np.array([1.0, 4.0])
    points = np.asarray(jax.vmap(Box(low, high, (2,)).sample)(keys))
    assert (points >= low).all() and (points <= high).all() and points.dtype == np.float32
    np.testing.assert_allclose(points.min(axis=0), low, atol=0.01 * (high - low).max())
    np.testing.assert_allclose(points.max(axis=0), high, atol=0.01 * (high - low).max())
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.1
