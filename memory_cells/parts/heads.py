"""Helpers for memories with several heads."""

import jax


def split_heads(x, num_heads):
    """(..., H) -> (..., heads, H / heads)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x):
    """(..., heads, d) -> (..., heads * d)."""
    return x.reshape(*x.shape[:-2], -1)


def l2_normalise(x):
    """Vectors of unit length; 1e-6 keeps the gradient finite at zero."""
    return x * jax.lax.rsqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)
