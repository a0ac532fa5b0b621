"""What the matrix memories share around their recurrence: queries, keys and values, through a short convolution."""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.causal_conv import causal_conv
from memory_cells.slstm import uniform

IMPLS = ("auto", "scan", "parallel")


class QueryKeyValue(nn.Module):
    """q, k, v = conv(W x) of all heads, conv a causal convolution over time, one filter per channel.

    Without the convolution a linear recurrence hardly tells one step from the next: no copying of the input of 4 steps
    ago, for instance.
    """

    features: int
    num_heads: int
    conv_width: int

    @nn.compact
    def __call__(self, buffer, xs, starts):
        """buffer (B, K - 1, 3 H), xs (T, B, D), starts (T, B) -> buffer; q, k and v (T, B, heads, H / heads)."""
        ys = nn.Dense(3 * self.features, use_bias=False, name="project")(xs)
        if self.conv_width:
            kernel = self.param("conv_kernel", uniform(self.conv_width**-0.5), (self.conv_width, ys.shape[-1]))
            buffer, ys = causal_conv(kernel, buffer, ys, starts)
        return buffer, *(split_heads(y, self.num_heads) for y in jnp.split(ys, 3, axis=-1))

    @nn.nowrap
    def initialize_buffer(self, batch):
        return jnp.zeros((*batch, self.conv_width - 1, 3 * self.features)) if self.conv_width else ()


def split_heads(x, num_heads):
    """(..., H) -> (..., heads, H / heads)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x):
    """(..., heads, d) -> (..., heads * d)."""
    return x.reshape(*x.shape[:-2], -1)


def check_heads(owner, cell):
    """Refuse numbers of heads, widths of the convolution and forms that the cell cannot have.

    Raises:
      ValueError: names the value and what is valid.
    """
    if cell.num_heads < 1 or cell.features % cell.num_heads:
        raise ValueError(
            f"{owner} needs hidden_size to be a multiple of num_heads, got {cell.features} and {cell.num_heads}"
        )
    if cell.conv_width < 2 and cell.conv_width != 0:
        raise ValueError(f"{owner} needs conv_width to be 0 or at least 2, got {cell.conv_width}")
    if cell.impl not in IMPLS:
        raise ValueError(f"{owner} needs impl to be one of {', '.join(IMPLS)}, got {cell.impl!r}")
