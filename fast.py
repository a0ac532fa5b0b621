"""The same layers, optimizer steps and random numbers, which XLA compiles to fast CPU code.

Scripts use `Dense` and `Conv` like Flax's layers of these names. Parameters and results are the
same; to get the plain version, import the two from `flax.linen` instead.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.extend.random import threefry2x32_p
from jax.flatten_util import ravel_pytree
from jax.interpreters import mlir

# --- Dense layers --------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fast_dot_general(x, kernel, dimension_numbers, precision=None):
    """The product of a dense layer: x (..., in), kernel (in, out) -> (..., out).

    The gradient of the kernel is a sum over the rows of x. JAX writes it as a product that sums
    over the first axes of two matrices, which XLA's fast CPU kernels do not support. Here the
    smaller of the two is transposed first.
    """
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision)


def _dot_forward(x, kernel, dimension_numbers, precision):
    return fast_dot_general(x, kernel, dimension_numbers, precision), (x, kernel)


def _dot_backward(dimension_numbers, precision, saved, gradient):
    x, kernel = saved
    matmul = partial(jax.numpy.matmul, precision=precision)
    rows = x.reshape(-1, x.shape[-1])
    gradients = gradient.reshape(-1, gradient.shape[-1])
    if x.shape[-1] <= gradient.shape[-1]:
        kernel_gradient = matmul(rows.T, gradients)
    else:
        kernel_gradient = matmul(gradients.T, rows).T
    return matmul(gradient, kernel.T), kernel_gradient


fast_dot_general.defvjp(_dot_forward, _dot_backward)


class Dense(nn.Dense):
    """`flax.linen.Dense` with a gradient that is fast on CPUs."""

    dot_general: Callable | None = fast_dot_general


# --- Convolutions --------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=range(2, 9))
def fast_conv(
    x,
    kernel,
    strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    precision,
):
    """A convolution without padding: x (N, H, W, in), kernel (h, w, in, out) -> (N, H', W', out).

    JAX writes the gradients as convolutions whose arrays keep their order of axes. Where it is not
    the order above, XLA for CPUs transposes them, except inside loops, and training is a loop:
    there its slowest code computes them, which takes 20 to 30 times as long
    (github.com/jax-ml/jax/issues/12868). Here they are transposed first.
    """
    if (padding, *lhs_dilation, *rhs_dilation, feature_group_count) != ("VALID", 1, 1, 1, 1, 1):
        raise NotImplementedError("fast.Conv is for images, without padding, dilation and groups")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimension_numbers, precision=precision
    )


def _conv_forward(x, kernel, *how):
    return fast_conv(x, kernel, *how), (x, kernel)


def _conv_backward(
    strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    groups,
    precision,
    saved,
    gradient,
):
    x, kernel = saved
    height, width = kernel.shape[:2]
    conv = partial(
        jax.lax.conv_general_dilated, dimension_numbers=dimension_numbers, precision=precision
    )
    # Strides may step over the last rows and columns, which then have no gradient.
    unread_rows = (x.shape[1] - height) % strides[0]
    unread_columns = (x.shape[2] - width) % strides[1]
    read = x[:, : x.shape[1] - unread_rows, : x.shape[2] - unread_columns]
    images_as_features = read.transpose(3, 1, 2, 0)
    gradient_as_kernel = gradient.transpose(1, 2, 0, 3)
    kernel_gradient = conv(
        images_as_features, gradient_as_kernel, (1, 1), "VALID", rhs_dilation=strides
    )
    around = (height - 1, height - 1 + unread_rows), (width - 1, width - 1 + unread_columns)
    turned_kernel = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    x_gradient = conv(gradient, turned_kernel, (1, 1), around, lhs_dilation=strides)
    return x_gradient, kernel_gradient.transpose(1, 2, 0, 3)


fast_conv.defvjp(_conv_forward, _conv_backward)


class Conv(nn.Conv):
    """`flax.linen.Conv` with gradients that are fast on CPUs.

    It is for images, without padding, dilation and groups.
    """

    conv_general_dilated: Callable | None = fast_conv


# --- The optimizer's step ------------------------------------------------------------------------


SMALL = 2**15  # parameters of a network that is learned as one vector


def flatten_params(params, limit=SMALL):
    """Up to `limit` parameters as one vector, and the function that makes them a tree again.

    When many arrays are updated at once, XLA for CPUs divides them between threads, and in each of
    these gradient steps of about 0.1 ms waking a thread costs more than the updates. One array
    leaves nothing to divide. More than `limit` parameters stay as they are.
    """
    if sum(x.size for x in jax.tree.leaves(params)) > limit:
        return params, lambda params: params
    return ravel_pytree(params)


NO_LIMIT = 1e9  # of a norm: gradients from there on have diverged


def clip_by_global_norm(max_norm):
    """`optax.clip_by_global_norm`, but no operation at all where `max_norm` is no limit.

    The norm is known after the last gradient only: Adam would wait for it at every step, with which
    SACD trains 0.85 times as fast. A number that is being traced may be a limit.
    """
    if not isinstance(max_norm, jax.core.Tracer) and max_norm >= NO_LIMIT:
        return optax.identity()
    return optax.clip_by_global_norm(max_norm)


def flatten_small(optimizer, limit=SMALL):
    """`optax.flatten(optimizer)` for up to `limit` parameters, else the optimizer as it is.

    Many small arrays are updated faster as one vector, by a few operations instead of a few per
    array. Large arrays are faster one by one: nothing is copied together, and the first do not wait
    for the last gradient.
    """
    flat = optax.flatten(optimizer)

    def choose(params):
        size = sum(x.size for x in jax.tree.leaves(params))
        return flat if size <= limit else optimizer

    def init(params):
        return choose(params).init(params)

    def update(updates, state, params=None):
        return choose(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


# --- Random numbers ------------------------------------------------------------------------------

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry_2x32(key1, key2, x1, x2):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers").

    Two words of a key and two of a counter to two words of random bits, uint32 of one shape.
    """
    keys = (key1, key2, key1 ^ key2 ^ np.uint32(0x1BD11BDA))
    x1, x2 = x1 + keys[0], x2 + keys[1]
    for i in range(5):
        for bits in ROTATIONS[i % 2]:
            x1 = x1 + x2
            x2 = x1 ^ ((x2 << np.uint32(bits)) | (x2 >> np.uint32(32 - bits)))
        x1, x2 = x1 + keys[(i + 1) % 3], x2 + keys[(i + 2) % 3] + np.uint32(i + 1)
    # Without the barrier XLA would repeat the hash in everything that reads the bits, and compile
    # for minutes.
    return jax.lax.optimization_barrier((x1, x2))


def use_fast_random() -> None:
    """Let this process compute JAX's random bits, the same ones, by `threefry_2x32` on CPUs.

    JAX writes the rounds of this hash as a loop, whose turns XLA for CPUs starts one by one.
    Programs that were compiled before the call keep the loop.
    """
    lowering = mlir.lower_fun(threefry_2x32, multiple_results=True)
    mlir.register_lowering(threefry2x32_p, lowering, platform="cpu")
