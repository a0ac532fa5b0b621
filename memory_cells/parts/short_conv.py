"""A learned causal convolution over the last few steps, with one filter per channel.

minGRU, Mamba and the matrix memories read their inputs through it. Without it they can hardly tell
how long ago an input came. For instance, minGRU does not learn to repeat the one of four steps ago.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.parts.causal_conv import causal_conv
from memory_cells.parts.initializers import uniform


class ShortConv(nn.Module):
    """(buffer (B, K - 1, D), xs (T, B, D), starts (T, B)) -> buffer, ys (T, B, D).

    Attributes:
      width: K; 0 returns xs unchanged.
      use_bias: add a bias per channel.
    """

    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, buffer, xs, starts):
        if not self.width:
            return buffer, xs
        init = uniform(self.width**-0.5)
        channels = xs.shape[-1]
        kernel = self.param("kernel", init, (self.width, channels), jnp.float32)
        buffer, ys = causal_conv(kernel, buffer, xs, starts)
        if self.use_bias:
            ys = ys + self.param("bias", init, (channels,), jnp.float32)
        return buffer, ys


def conv_buffer(width, batch, channels):
    """The buffer at the start of an episode: zeros, or () without a convolution."""
    return jnp.zeros((*batch, width - 1, channels), jnp.float32) if width else ()
