"""Initialisers that several memories share."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


def uniform(limit):
    """Uniform in [-limit, limit]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def log_uniform_softplus(low, high):
    """b, for softplus(b) log-uniform between `low` and `high`."""

    def init(key, shape, dtype=jnp.float32):
        y = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        return y + jnp.log(-jnp.expm1(-y))  # the inverse of softplus

    return init


def small_init(features):
    """xLSTM's initialiser for weights that read a stream of `features`: normal."""
    return nn.initializers.normal((2 / (5 * features)) ** 0.5)


def wang_init(features, num_blocks):
    """xLSTM's initialiser for weights that write to the stream: smaller in deeper networks."""
    return nn.initializers.normal(2 / (num_blocks * features**0.5))


def log_rate_init(r_min, r_max):
    """log(-log |lambda|), with lambda uniform over the area of the ring r_min <= |lambda| <= r_max.

    |lambda| is kept away from 0 and 1, where this is infinite.
    """

    def init(key, shape):
        squared = jax.random.uniform(key, shape, minval=r_min**2, maxval=r_max**2)
        return jnp.log(jnp.clip(-0.5 * jnp.log(squared), 1e-6, 20.0))

    return init


def log_phase_init(max_phase):
    """log of a phase that is uniform in (0, max_phase)."""

    def init(key, shape):
        return jnp.log(jax.random.uniform(key, shape, minval=1e-6, maxval=max_phase))

    return init
