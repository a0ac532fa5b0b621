"""Operations on carries."""

import jax
import jax.numpy as jnp
import numpy as np
from memory_helpers import sequence, setup

from memory_cells import detach
from memory_cells.parts.carry import episode_steps


def test_detach_cuts_the_gradient():
    cell, params, carry, xs, starts = setup("gru")

    @jax.grad
    def gradient(carry):
        return sequence(cell, params, carry, xs, jnp.zeros_like(starts))[1].sum()

    @jax.grad
    def detached_gradient(carry):
        return sequence(cell, params, detach(carry), xs, jnp.zeros_like(starts))[1].sum()

    assert (gradient(carry) != 0).any()
    assert (detached_gradient(carry) == 0).all()


def test_steps_are_counted_within_episodes():
    starts = jnp.array([[False, True], [False, False], [True, False]])
    steps = episode_steps(jnp.array([5.0, 5.0]), starts)
    np.testing.assert_array_equal(steps, [[5, 0], [6, 1], [0, 2]])
