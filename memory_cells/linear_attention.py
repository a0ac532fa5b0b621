"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4).

Products of features take the place of the softmax:

    u = silu(conv(x))                          causal convolution over time, not in the paper
    q, k, v = W u
    phi(x) = elu(x) + 1                        feature map (eq. 7)
    S' = S + phi(k) v^T,  z' = z + phi(k)      memory and normaliser (eqs. 18, 19)
    y  = W_o (S'^T phi(q) / (z' . phi(q)))     read, per head (eq. 20)

It never forgets: a read is a weighted mean of all values of the episode.

Carry: S with z as its last column (B, heads, d, d + 1), and the convolution's last inputs
(B, K - 1, D), zeros.
Cost per step: 8 H^2 + 4 H d floating-point operations per environment, for D = H.
Sequences: in chunks (see `parts/chunkwise.py`).
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_conv_width, check_impl, check_num_heads
from memory_cells.parts.chunkwise import in_pieces, linear_memory
from memory_cells.parts.dense import Dense
from memory_cells.parts.heads import merge_heads, split_heads
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class LinearAttention(SequenceCell):
    """Linear attention; see the module's docstring.

    Attributes:
      features: H, the size of the output; a multiple of `num_heads`.
      num_heads: independent memories.
      conv_width: K, the steps that the convolution sees; 0 leaves it out, as in the paper.
      impl: "auto", "scan" or "parallel"; see `parts/chunkwise.py`.
    """

    num_heads: int = 4
    conv_width: int = 4
    impl: str = "auto"

    def __post_init__(self):
        check_num_heads("linear_attention", self.features, self.num_heads)
        check_conv_width("linear_attention", self.conv_width)
        check_impl("linear_attention", self.impl)
        super().__post_init__()

    def setup(self):
        self.conv = ShortConv(self.conv_width)
        self.qkv = Dense(3 * self.features, use_bias=False)
        self.output = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        *batch, inputs = input_shape
        width = self.features // self.num_heads
        memory = jnp.zeros((*batch, self.num_heads, width, width + 1), jnp.float32)
        return memory, conv_buffer(self.conv_width, batch, inputs)

    @in_pieces
    def sequence(self, carry, xs, starts):
        memory, buffer = carry
        buffer, us = self.conv(buffer, xs, starts)
        us = nn.silu(us) if self.conv_width else us
        qkv = jnp.split(self.qkv(us), 3, axis=-1)
        q, k, v = (split_heads(x, self.num_heads) for x in qkv)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)  # the ones sum up to z
        q = nn.elu(q) + 1
        k = nn.elu(k) + 1
        memory, reads = linear_memory(memory, q, k, v, None, starts, self.impl)
        means = reads[..., :-1] / (reads[..., -1:] + 1e-6)
        return (memory, buffer), self.output(merge_heads(means))
