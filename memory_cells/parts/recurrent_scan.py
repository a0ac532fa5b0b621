"""Backpropagation through time with the weight gradient taken once, after the loop.

In a recurrent cell only one product stands in the way of batching over time: the recurrent weights times the previous
state. Differentiating a scan also puts the *gradient* of those weights into the loop, as T products with an inner
dimension of B and T additions to a matrix of the weights' size. Here the backward loop only carries the state's
gradient; the weights' gradient is one product over all T * B rows when the loop is done. The numbers are the same.
benchmark/recurrent_scan.py measures the gain: on CPU up to 2 times for 4 to 16 environments, none for 64.
"""

from functools import partial

import jax
import jax.numpy as jnp

from memory_cells.parts.carry import reset


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrent_scan(project, step, params, carry, xs, starts, initial):
    """Run a recurrent cell over a sequence, with resets.

    Args:
      project: (params, carry) -> z. All of the recurrence's use of parameters, e.g. h @ W_h + b.
      step: (carry, x, z) -> (carry, y). The rest of the cell, free of parameters.
      params: the parameters of `project`.
      carry: the state before xs[0], leaves (B, ...).
      xs: per-step inputs, leaves (T, B, ...): the input projection of the whole sequence, computed beforehand.
        Keep one array per gate: slicing gates out of one array inside the loop keeps XLA from vectorising it
        (2.4 times slower on CPU).
      starts: (T, B) bool, the state is reset to `initial` before step t.
      initial: the state at an episode's start, leaves (B, ...).

    Returns:
      The state after the last step, and outputs with leading axes (T, B).
    """
    return _forward(project, step, params, carry, xs, starts, initial, keep=False)[0]


def _forward(project, step, params, carry, xs, starts, initial, keep=True):
    def body(carry, inputs):
        x, start = inputs
        carry = reset(carry, initial, start)
        z = project(params, carry)
        new_carry, y = step(carry, x, z)
        return new_carry, (y, (carry, z) if keep else None)

    if len(starts) == 1:  # acting: a loop of one step would only cost its overhead
        squeeze, expand = lambda a: a[0], lambda a: a[None]
        carry, out = body(carry, jax.tree.map(squeeze, (xs, starts)))
        ys, kept = jax.tree.map(expand, out)
    else:
        carry, (ys, kept) = jax.lax.scan(body, carry, (xs, starts))
    return (carry, ys), (params, xs, starts, kept)


def _backward(project, step, residuals, cotangents):
    params, xs, starts, (carries, zs) = residuals
    d_carry, d_ys = cotangents
    zeros = jax.tree.map(jnp.zeros_like, d_carry)

    def body(d_states, inputs):
        d_carry, d_initial = d_states
        carry, x, z, start, d_y = inputs
        _, pull_step = jax.vjp(step, carry, x, z)
        d_before, d_x, d_z = pull_step((d_carry, d_y))
        _, pull_project = jax.vjp(partial(project, params), carry)
        d_before = jax.tree.map(jnp.add, d_before, pull_project(d_z)[0])
        # Before a start stands `initial`. XLA removes its sum from the loop where nobody asks for it.
        d_initial = jax.tree.map(jnp.add, d_initial, reset(zeros, d_before, start))
        return (reset(d_before, zeros, start), d_initial), (d_x, d_z)

    inputs = (carries, xs, zs, starts, d_ys)
    (d_carry, d_initial), (d_xs, d_zs) = jax.lax.scan(body, (d_carry, zeros), inputs, reverse=True)

    rows = partial(jax.tree.map, lambda a: a.reshape(-1, *a.shape[2:]))  # (T, B, ...) -> (T * B, ...)
    _, pull_params = jax.vjp(lambda params: project(params, rows(carries)), params)
    return pull_params(rows(d_zs))[0], d_carry, d_xs, None, d_initial


recurrent_scan.defvjp(_forward, _backward)
