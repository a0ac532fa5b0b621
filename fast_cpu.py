"""What CPUs compute faster if it is written another way: the gradient of dense layers, and the optimizer's step."""

from functools import partial

import jax
import optax


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fast_dot_general(x, kernel, dimension_numbers, precision=None):
    """x (..., in), kernel (in, out) -> (..., out), for `nn.Dense(dot_general=fast_dot_general)` only.

    The gradient of the kernel is a sum over the rows of x. JAX writes it as a product that sums over the first axes of
    two matrices, which XLA's fast kernels for CPUs do not take. Here the smaller of the two is transposed first.
    """
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision)


def _forward(x, kernel, dimension_numbers, precision):
    return fast_dot_general(x, kernel, dimension_numbers, precision), (x, kernel)


def _backward(dimension_numbers, precision, saved, gradient):
    (x, kernel), matmul = saved, partial(jax.numpy.matmul, precision=precision)
    rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    is_smaller = x.shape[-1] <= gradient.shape[-1]
    kernel_gradient = matmul(rows.T, gradients) if is_smaller else matmul(gradients.T, rows).T
    return matmul(gradient, kernel.T), kernel_gradient


fast_dot_general.defvjp(_forward, _backward)


def flatten_small(optimizer, limit=2**15):
    """`optax.flatten(optimizer)` for networks of up to `limit` parameters, the optimizer as it is for larger ones.

    As one vector, small arrays are updated by a few operations instead of a few for each of them. Large arrays are
    faster each for itself: nothing is copied together, and the first updates do not wait for the last gradients.
    """
    flat = optax.flatten(optimizer)

    def choose(params):
        return flat if sum(x.size for x in jax.tree.leaves(params)) <= limit else optimizer

    def update(updates, state, params=None):
        return choose(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: choose(params).init(params), update)
