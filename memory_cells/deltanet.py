"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a matrix memory that replaces what a key stores.

    q, k, v = silu(conv(W x))                       causal convolution over time
    q, k <- q / |q|, k / |k|
    beta = beta_scale * sigmoid(W_beta x)           write strength, one per head
    S' = S + beta k (v - S^T k)^T                   delta rule: moves what is read under k towards v
    y  = W_o norm(S'^T q / sqrt(d))                 root mean square norm of each head

beta = 1 replaces the old value exactly, and leaves values under orthogonal keys untouched. With
beta_scale = 2, the transition I - beta k k^T can have negative eigenvalues, which tracking a state
such as a parity needs (Grazzi et al. 2024, arXiv 2411.12537).

The norm divides a read by its own size, so it magnifies the rounding of reads that are small next
to what the memory holds. Both ways to compute a sequence store and read with an error of 5e-7 of
the largest read. With inputs of size 1, outputs are accurate to 1e-6 of the largest. With inputs of
1e4, which no script has, values are erased down to their rounding: errors are 5e-4 with 32
features, and up to 0.3 with 8, whose heads have 2 channels.

Carry: S (B, heads, d, d), and the convolution's last inputs (B, K - 1, 3 H), zeros.
Cost per step: 8 H^2 + 6 H d floating-point operations per environment, for D = H.
Sequences: in chunks (see `parts/chunkwise.py`).
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import (
    check_beta_scale,
    check_conv_width,
    check_impl,
    check_num_heads,
)
from memory_cells.parts.chunkwise import delta_memory, in_pieces
from memory_cells.parts.dense import Dense
from memory_cells.parts.heads import l2_normalise, merge_heads, split_heads
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class DeltaNet(SequenceCell):
    """DeltaNet layer; see the module's docstring.

    Attributes:
      features: H, the size of the output; a multiple of `num_heads`.
      num_heads: independent memories.
      conv_width: K, the steps that the convolution sees; 0 leaves it out.
      beta_scale: upper limit of the write strength, 1 or 2.
      impl: "auto", "scan" or "parallel"; see `parts/chunkwise.py`.
    """

    num_heads: int = 4
    conv_width: int = 4
    beta_scale: int = 1
    impl: str = "auto"

    def __post_init__(self):
        check_num_heads("deltanet", self.features, self.num_heads)
        check_conv_width("deltanet", self.conv_width)
        check_impl("deltanet", self.impl)
        check_beta_scale("deltanet", self.beta_scale)
        super().__post_init__()

    def setup(self):
        self.qkv = Dense(3 * self.features, use_bias=False)
        self.conv = ShortConv(self.conv_width, use_bias=False)
        self.beta = Dense(self.num_heads, use_bias=False)
        self.norm = nn.RMSNorm(epsilon=1e-5)
        self.output = Dense(self.features, use_bias=False)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        width = self.features // self.num_heads
        memory = jnp.zeros((*batch, self.num_heads, width, width), jnp.float32)
        return memory, conv_buffer(self.conv_width, batch, 3 * self.features)

    @in_pieces
    def sequence(self, carry, xs, starts):
        memory, buffer = carry
        buffer, convolved = self.conv(buffer, self.qkv(xs), starts)
        qkv = jnp.split(nn.silu(convolved), 3, axis=-1)
        q, k, v = (split_heads(x, self.num_heads) for x in qkv)
        q = l2_normalise(q) / q.shape[-1] ** 0.5
        k = l2_normalise(k)
        beta = self.beta_scale * nn.sigmoid(self.beta(xs))
        memory, reads = delta_memory(memory, q, k, v, beta, None, starts, self.impl)
        return (memory, buffer), self.output(merge_heads(self.norm(reads)))
