"""minGRU (Feng et al. 2024, arXiv 2410.01201): a GRU whose gates see only the input.

    u  = silu(conv(x))                    short causal convolution over time
    z  = sigmoid(W_z u)                   update gate: z = 0 keeps the old state
    n  = g(W_n u)                         candidate; g(v) = v + 0.5 for v >= 0, else sigmoid(v)
    h' = (1 - z) * h + z * n,   y = h'

The candidate is the positive one of the paper's log-space version. Log space itself is not needed:
with 0 < 1 - z < 1 the recurrence is stable. There are no biases, as in the reference
implementation. The convolution is not in the paper. Without it, a single layer cannot tell which
input came when: in the task 4-back of benchmark/recall.py it stays at 65 % after 1000 updates.

Carry: h (B, H), and the convolution's last inputs (B, K - 1, D), zeros.
Cost per step: 4 D H floating-point operations per environment.
Sequences: in a loop or in parallel (see `parts/linear_scan.py`).
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_conv_width, check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.linear_scan import linear_scan
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class MinGRU(SequenceCell):
    """minGRU; see the module's docstring.

    Attributes:
      features: H, the size of the state and of the output.
      conv_width: K, the steps that the convolution sees; 0 leaves it out, with u = x.
      impl: "auto", "scan" or "parallel"; see `parts/linear_scan.py`.
      learned_carry: learn the h that an episode starts with.
    """

    conv_width: int = 4
    impl: str = "auto"
    learned_carry: bool = False

    def __post_init__(self):
        check_impl("mingru", self.impl)
        check_conv_width("mingru", self.conv_width)
        super().__post_init__()

    def setup(self):
        self.conv = ShortConv(self.conv_width)
        self.input_z = Dense(self.features, use_bias=False)
        self.input_n = Dense(self.features, use_bias=False)
        if self.learned_carry:
            h = self.param("initial_h", nn.initializers.zeros, (self.features,))
            self.initial_offset = h, 0.0 if self.conv_width else ()

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        *batch, inputs = input_shape
        h = jnp.zeros((*batch, self.features), jnp.float32)
        return h, conv_buffer(self.conv_width, batch, inputs)

    def sequence(self, carry, xs, starts):
        h, buffer = carry
        initial, _ = self.initial_carry_like(xs)
        buffer, us = self.conv(buffer, xs, starts)
        us = nn.silu(us) if self.conv_width else us
        z = nn.sigmoid(self.input_z(us))
        n = positive(self.input_n(us))
        hs = linear_scan(1.0 - z, z * n, h, starts, initial, self.impl)
        return (hs[-1], buffer), hs


def positive(x):
    """The paper's g: positive, continuous, and linear for positive x."""
    return jnp.where(x >= 0, x + 0.5, nn.sigmoid(x))
