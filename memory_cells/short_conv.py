"""The short convolution in front of a linear recurrence, with its parameters: u = silu(conv(x) + b).

Such a recurrence adds up its inputs; the convolution lets a gate see a symbol together with those just before it.
"""

import flax.linen as nn
import jax

from memory_cells.causal_conv import causal_conv


def check_conv_width(owner, width):
    """Refuse a width that is no convolution and does not mean to leave it out either.

    Raises:
      ValueError: names the value and the valid ones.
    """
    if width < 2 and width != 0:
        raise ValueError(f"{owner} needs conv_width to be 0 or at least 2, got {width}")


class ShortConv(nn.Module):
    """buffer (B, K - 1, D), xs (T, B, D), starts (T, B) -> buffer, us (T, B, D); see `causal_conv`.

    Attributes:
      width: K, the steps it sees, the current one included.
    """

    width: int

    @nn.compact
    def __call__(self, buffer, xs, starts):
        # Uniform in +-1/sqrt(K), as PyTorch does and with it the authors of all cells that have such a convolution.
        init = lambda key, shape: jax.random.uniform(key, shape, minval=-1, maxval=1) * self.width**-0.5  # noqa: E731
        kernel = self.param("kernel", init, (self.width, xs.shape[-1]))
        buffer, us = causal_conv(kernel, buffer, xs, starts)
        return buffer, nn.silu(us + self.param("bias", init, (xs.shape[-1],)))
