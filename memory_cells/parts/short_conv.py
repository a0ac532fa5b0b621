"""A learned causal convolution over the last few steps, one filter per channel: what linear recurrences read through.

Without it they hardly tell one step from the next: copying the input of 4 steps ago, for instance, is out of reach.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.parts.causal_conv import causal_conv
from memory_cells.parts.initializers import uniform


class ShortConv(nn.Module):
    """(buffer (B, K - 1, D), xs (T, B, D), starts (T, B)) -> buffer, ys (T, B, D); see the module's docstring.

    Attributes:
      width: K; 0 leaves xs as they are.
      use_bias: add a bias per channel.
    """

    width: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, buffer, xs, starts):
        if not self.width:
            return buffer, xs
        init, channels = uniform(self.width**-0.5), xs.shape[-1]
        buffer, ys = causal_conv(self.param("kernel", init, (self.width, channels)), buffer, xs, starts)
        return buffer, ys + self.param("bias", init, (channels,)) if self.use_bias else ys


def conv_buffer(width, batch, channels):
    """The buffer at an episode's start: zeros; nothing where there is no convolution."""
    return jnp.zeros((*batch, width - 1, channels)) if width else ()
