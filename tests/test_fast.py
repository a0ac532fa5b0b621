"""What is fast on CPUs computes the same: layers, gradients, optimizer steps, random numbers."""

import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_same
from jax.extend.random import threefry2x32_p

import fast
from algorithms import rsac, rsacd, sac, sacd
from fast import fast_conv, fast_dot_general, flatten_params, flatten_small

# --- Dense layers --------------------------------------------------------------------------------


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def loss(kernel, x, dot_general):
    layer = nn.Dense(kernel.shape[1], use_bias=False, dot_general=dot_general)
    return jnp.sin(layer.apply(params(kernel), x)).sum()


def params(kernel):
    return {"params": {"kernel": kernel}}


@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 3)])
@pytest.mark.parametrize("features", [1, 3, 7])
def test_values_and_gradients_are_those_of_dense(shape, features):
    x, kernel = normal(0, shape), normal(1, (3, features))
    gradient = jax.value_and_grad(loss, (0, 1))
    ours, theirs = (gradient(kernel, x, product) for product in (fast_dot_general, None))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_vmap_over_kernels_and_inputs():
    x, kernel = normal(0, (2, 5, 3)), normal(1, (2, 3, 7))
    for axes in ((0, 0, None), (0, None, None), (None, 0, None)):
        args = kernel if axes[0] == 0 else kernel[0], x if axes[1] == 0 else x[0]
        gradient = jax.vmap(jax.grad(loss, (0, 1)), axes)
        ours, theirs = (gradient(*args, product) for product in (fast_dot_general, None))
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("features", [3, 7])
def test_no_product_of_the_gradient_sums_over_two_first_axes(features):
    def products(dot_general):
        gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
        text = gradient.lower(jnp.ones((4, features)), jnp.ones((9, 4)), dot_general).as_text()
        return set(re.findall(r"contracting_dims = \[(\d)\] x \[(\d)\]", text))

    assert ("0", "0") in products(None)
    assert products(fast_dot_general) == {("1", "0")}


# --- Convolutions --------------------------------------------------------------------------------


def conv_loss(kernel, x, strides, conv):
    shape = kernel.shape[-1], kernel.shape[:2]
    layer = nn.Conv(*shape, strides, "VALID", use_bias=False, conv_general_dilated=conv)
    return jnp.sin(layer.apply(params(kernel), x)).sum()


@pytest.mark.parametrize("shape", [(4, 11, 10, 3), (2, 3, 9, 12, 3), (8, 8, 3)])
@pytest.mark.parametrize(
    ("size", "strides"), [((3, 3), (1, 1)), ((4, 2), (3, 2)), ((8, 8), (4, 4))]
)
def test_values_and_gradients_are_those_of_conv(shape, size, strides):
    x, kernel = normal(0, shape), normal(1, (*size, 3, 5))
    gradient = jax.value_and_grad(conv_loss, (0, 1))
    ours, theirs = (gradient(kernel, x, strides, conv) for conv in (fast_conv, None))
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    several = jnp.stack([kernel, 2.0 * kernel])  # as of several seeds
    gradient = jax.vmap(jax.grad(conv_loss), (0, None, None, None))
    ours, theirs = (gradient(several, x, strides, conv) for conv in (fast_conv, None))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_convolutions_of_the_gradient_keep_the_order_of_axes_that_is_fast_in_loops():
    def orders(conv):
        gradient = jax.jit(jax.grad(conv_loss, (0, 1)), static_argnums=(2, 3))
        args = jnp.ones((3, 3, 2, 4)), jnp.ones((5, 9, 9, 2))
        text = gradient.lower(*args, (2, 2), conv).as_text()
        return set(re.findall(r"dim_numbers = (.*?), window", text))

    assert len(orders(None)) == 3
    assert orders(fast_conv) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


def test_other_convolutions_are_refused():
    layer = fast.Conv(4, (3, 3))
    with pytest.raises(NotImplementedError, match="padding"):
        layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))


# --- Layers --------------------------------------------------------------------------------------


def test_layers_have_the_parameters_and_results_of_those_of_flax():
    """So that swapping one import gives the plain version of a script."""
    x = normal(0, (2, 9, 9, 3))
    for ours, theirs in (
        (fast.Dense(5), nn.Dense(5)),
        (fast.Conv(5, (3, 3), (2, 2), "VALID"), nn.Conv(5, (3, 3), (2, 2), "VALID")),
    ):
        weights = ours.init(jax.random.key(1), x)
        assert_same(weights, theirs.init(jax.random.key(1), x))
        np.testing.assert_array_equal(ours.apply(weights, x), theirs.apply(weights, x))


def test_layers_stay_in_float32_under_x64():
    def everything(key, x):
        def loss(weights, x, layer):
            return layer.apply(weights, x).sum()

        layers = fast.Dense(5), fast.Conv(5, (3, 3), (2, 2), "VALID")
        weights = [layer.init(key, x) for layer in layers]
        gradient = jax.value_and_grad(loss, (0, 1))
        return weights, [gradient(w, x, layer) for w, layer in zip(weights, layers, strict=True)]

    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((2, 9, 9, 3), jnp.float32)
        shapes = jax.eval_shape(everything, jax.random.key(0), x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"float32"}


def test_layers_have_gradients_that_are_fast():
    assert fast.Dense(1).dot_general is fast_dot_general
    assert fast.Conv(1, (1, 1)).conv_general_dilated is fast_conv


# --- The optimizer's step ------------------------------------------------------------------------


def test_only_a_limit_clips():
    unlimited = fast.clip_by_global_norm(fast.NO_LIMIT)
    gradients = {"a": jnp.array([3e8, 4e8]), "b": jnp.zeros(2)}
    updates, _ = unlimited.update(gradients, unlimited.init(gradients))
    assert updates is gradients
    for script in (sac, rsac, sacd, rsacd):
        assert script.Config.max_grad_norm == fast.NO_LIMIT

    for max_norm in (0.5, jnp.float32(0.5)):
        limited = fast.clip_by_global_norm(max_norm)
        updates, _ = limited.update(gradients, limited.init(gradients))
        assert_close(updates, {"a": np.array([0.3, 0.4]), "b": np.zeros(2)}, rtol=1e-6)


def test_a_traced_norm_is_a_limit():
    @jax.jit
    def clipped(max_norm, gradient):
        optimizer = fast.clip_by_global_norm(max_norm)
        return optimizer.update(gradient, optimizer.init(gradient))[0]

    gradient = np.array([3e9, 4e9], np.float32)
    for max_norm in (5.0, fast.NO_LIMIT):
        assert_close(clipped(max_norm, gradient), gradient * (max_norm / 5e9), rtol=1e-6)


@pytest.mark.parametrize(("limit", "is_flat"), [(12, True), (11, False)])
def test_an_optimizer_steps_alike_flat_or_not(limit, is_flat):
    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    weights = {"bias": jnp.ones(3), "kernel": jnp.ones((3, 3))}

    def train(optimizer):
        params, state = weights, optimizer.init(weights)
        for scale in (1.0, -0.1, 3.0):
            gradients = {"bias": jnp.arange(3.0), "kernel": jnp.arange(9.0).reshape(3, 3)}
            gradients = jax.tree.map(lambda x, scale=scale: scale * x, gradients)
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    (ours, state), (theirs, _) = train(flatten_small(plain, limit)), train(plain)
    assert_close(ours, theirs, rtol=1e-6)
    shapes = {x.shape for x in jax.tree.leaves(state)}
    assert shapes == ({(), (12,)} if is_flat else {(), (3,), (3, 3)})


@pytest.mark.parametrize(("limit", "is_flat"), [(12, True), (11, False)])
def test_flat_parameters_learn_alike(limit, is_flat):
    optimizer = flatten_small(optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)), limit)
    params = {"bias": jnp.arange(3.0), "kernel": jnp.arange(9.0).reshape(3, 3)}

    def loss(params):
        return jnp.square(params["bias"] @ params["kernel"] - 1.0).sum()

    flat, unflatten = flatten_params(params, limit)
    assert (len(jax.tree.leaves(flat)) == 1) == is_flat
    state = flat_state = optimizer.init(params)  # the same state for both
    for _ in range(3):
        changes, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, changes)
        gradients = jax.grad(lambda flat: loss(unflatten(flat)))(flat)
        changes, flat_state = optimizer.update(gradients, flat_state, flat)
        flat = optax.apply_updates(flat, changes)
    assert_close(unflatten(flat), params, rtol=1e-6)
    assert_close(flat_state, state, rtol=1e-6)


# --- Random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "bits"),
    [  # the known answers of Random123, the authors' library
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, bits):
    words = [np.array([word], np.uint32) for word in (*key, *counter)]
    assert tuple(int(x[0]) for x in jax.jit(threefry2x32_p.bind)(*words)) == bits


DRAWS = """
import hashlib, jax, jax.numpy as jnp
keys = jax.random.split(jax.random.key(7), 5)
draws = [
    jax.random.key_data(keys),
    jax.random.normal(keys[0], (3, 5)),
    jax.random.bits(keys[1], (0, 2)),
    jax.vmap(lambda k: jax.random.permutation(k, 9))(keys),
    jax.random.uniform(jax.random.fold_in(keys[2], 3)),
    jax.jit(jax.vmap(lambda k: jax.random.categorical(k, jnp.arange(4.0))))(keys),
]
with jax.enable_x64(True):
    draws.append(jax.random.normal(keys[3], (3,), "float64"))
print(hashlib.sha256(b"".join(jax.device_get(x).tobytes() for x in draws)).hexdigest())
"""


def test_draws_are_those_of_jax_alone():
    def run(code):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert run(DRAWS) == run("import fast\nfast.use_fast_random()\n" + DRAWS) != ""


# Without the barrier of `threefry_2x32` this compiles for more than a minute.
NO_LOOP = """
import fast, jax
draw = jax.vmap(lambda key: jax.random.uniform(key, (4,)))
def has_loop():
    many = jax.jit(lambda key: draw(jax.random.split(jax.random.split(key)[1], 64)))
    return " while(" in many.lower(jax.random.key(0)).compile().as_text()
assert has_loop()  # importing alone changes nothing
fast.use_fast_random()
assert not has_loop()
"""


def test_no_loop_and_no_long_compilation():
    environment = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", NO_LOOP]
    subprocess.run(command, check=True, timeout=100, env=os.environ | environment)
