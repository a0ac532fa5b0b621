"""What is written another way for the sake of CPUs computes the same: a dense layer's gradient, an optimizer's step."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fast_cpu import fast_conv, fast_dot_general, flatten_small


def loss(kernel, x, dot_general):
    return jnp.sin(nn.Dense(kernel.shape[1], use_bias=False, dot_general=dot_general).apply(params(kernel), x)).sum()


def params(kernel):
    return {"params": {"kernel": kernel}}


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 3)])
@pytest.mark.parametrize("features", [1, 3, 7])
def test_values_and_gradients_are_those_of_dense(shape, features):
    x, kernel = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (3, features))
    ours, theirs = (jax.value_and_grad(loss, (0, 1))(kernel, x, f) for f in (fast_dot_general, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


def test_vmap_over_kernels_and_inputs():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 3)), jax.random.normal(jax.random.key(1), (2, 3, 7))
    for axes in ((0, 0, None), (0, None, None), (None, 0, None)):
        args = kernel if axes[0] == 0 else kernel[0], x if axes[1] == 0 else x[0]
        ours, theirs = (jax.vmap(jax.grad(loss, (0, 1)), axes)(*args, f) for f in (fast_dot_general, None))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("features", [3, 7])
def test_no_product_of_the_gradient_sums_over_two_first_axes(features):
    def products(dot_general):
        gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        text = gradient.lower(jnp.ones((4, features)), jnp.ones((9, 4)), dot_general).as_text()
        return set(re.findall(r"contracting_dims = \[(\d)\] x \[(\d)\]", text))

    assert ("0", "0") in products(None)
    assert products(fast_dot_general) == {("1", "0")}


def conv_loss(kernel, x, strides, conv):
    layer = nn.Conv(kernel.shape[-1], kernel.shape[:2], strides, "VALID", use_bias=False, conv_general_dilated=conv)
    return jnp.sin(layer.apply(params(kernel), x)).sum()


@pytest.mark.parametrize("shape", [(4, 11, 10, 3), (2, 3, 9, 12, 3), (8, 8, 3)])
@pytest.mark.parametrize(("size", "strides"), [((3, 3), (1, 1)), ((4, 2), (3, 2)), ((8, 8), (4, 4))])
def test_values_and_gradients_are_those_of_conv(shape, size, strides):
    x, kernel = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (*size, 3, 5))
    ours, theirs = (jax.value_and_grad(conv_loss, (0, 1))(kernel, x, strides, f) for f in (fast_conv, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)
    several = jnp.stack([kernel, 2.0 * kernel])  # as of several seeds
    ours, theirs = (
        jax.vmap(jax.grad(conv_loss), (0, None, None, None))(several, x, strides, f) for f in (fast_conv, None)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_convolutions_of_the_gradient_keep_the_order_of_axes_that_is_fast_in_loops():
    def orders(conv):
        gradient = jax.jit(jax.grad(conv_loss, (0, 1)), static_argnums=(2, 3))
        text = gradient.lower(jnp.ones((3, 3, 2, 4)), jnp.ones((5, 9, 9, 2)), (2, 2), conv).as_text()
        return set(re.findall(r"dim_numbers = (.*?), window", text))

    assert len(orders(None)) == 3 and orders(fast_conv) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def test_other_convolutions_are_refused():
    with pytest.raises(NotImplementedError, match="padding"):
        nn.Conv(4, (3, 3), conv_general_dilated=fast_conv).init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


@pytest.mark.parametrize(("limit", "is_flat"), [(12, True), (11, False)])
def test_an_optimizer_steps_alike_flat_or_not(limit, is_flat):
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    weights = {"bias": jnp.ones(3), "kernel": jnp.ones((3, 3))}

    def train(optimizer):
        params, state = weights, optimizer.init(weights)
        for scale in (1.0, -0.1, 3.0):
            gradients = {"bias": scale * jnp.arange(3.0), "kernel": scale * jnp.arange(9.0).reshape(3, 3)}
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    (ours, state), (theirs, _) = train(flatten_small(plain, limit)), train(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    assert {x.shape for x in jax.tree.leaves(state)} == ({(), (12,)} if is_flat else {(), (3,), (3, 3)})
