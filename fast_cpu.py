"""What CPUs compute faster if it is written another way: gradients of dense and convolutional layers, the
optimizer's step.
"""

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


@partial(jax.custom_vjp, nondiff_argnums=range(2, 9))
def fast_conv(
    x, kernel, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision
):
    """x (N, H, W, in), kernel (h, w, in, out) -> (N, H', W', out), for nn.Conv(conv_general_dilated=fast_conv) only.

    JAX writes the gradients as convolutions whose arrays keep their order of axes. Where that is not the order above,
    XLA for CPUs transposes them, but not in loops, as training is one: there its slowest code computes them, 20 to 30
    times as long (github.com/jax-ml/jax/issues/12868). Here they are transposed first.
    """
    if (padding, *lhs_dilation, *rhs_dilation, feature_group_count) != ("VALID", 1, 1, 1, 1, 1):
        raise NotImplementedError("fast_conv is for convolutions of images without padding, dilation and groups")
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=dimension_numbers, precision=precision
    )


def _conv_forward(x, kernel, *how):
    return fast_conv(x, kernel, *how), (x, kernel)


def _conv_backward(strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, groups, precision, saved, gradient):
    (x, kernel), (height, width) = saved, saved[1].shape[:2]
    conv = partial(jax.lax.conv_general_dilated, dimension_numbers=dimension_numbers, precision=precision)
    unread = [(size - k) % stride for size, k, stride in zip(x.shape[1:3], (height, width), strides, strict=True)]
    read = x[:, : x.shape[1] - unread[0], : x.shape[2] - unread[1]]  # strides step over the last rows and columns
    images_as_features, gradient_as_kernel = read.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    kernel_gradient = conv(images_as_features, gradient_as_kernel, (1, 1), "VALID", rhs_dilation=strides)
    around = (height - 1, height - 1 + unread[0]), (width - 1, width - 1 + unread[1])
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return conv(gradient, turned, (1, 1), around, lhs_dilation=strides), kernel_gradient.transpose(1, 2, 0, 3)


fast_conv.defvjp(_conv_forward, _conv_backward)


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
