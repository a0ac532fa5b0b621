"""Initial values that several memories share."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def uniform(limit):
    """Uniform in [-limit, limit]."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def small_init(features):
    """Normal, as the authors initialise what leads into a layer of a stream of `features`."""
    return nn.initializers.normal((2 / (5 * features)) ** 0.5)


def wang_init(features, num_blocks):
    """Normal, as the authors initialise what leads out of a layer: smaller in deeper networks."""
    return nn.initializers.normal(2 / (num_blocks * features**0.5))


def log_rate_init(r_min, r_max):
    """log(-log |lambda|) for |lambda| distributed evenly over the ring's area; 0 and 1 themselves are left out."""

    def init(key, shape):
        squared = jax.random.uniform(key, shape, minval=r_min**2, maxval=r_max**2)
        return jnp.log(jnp.clip(-0.5 * jnp.log(squared), 1e-6, 20.0))

    return init


def log_phase_init(max_phase):
    """log of a phase evenly distributed up to `max_phase`."""
    return lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1e-6, maxval=max_phase))
