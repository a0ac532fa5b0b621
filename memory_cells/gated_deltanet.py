"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): the delta rule with a decay.

    q, k, v = silu(conv(W x)),  q, k of unit length        as in DeltaNet (see `deltanet.py`)
    beta  = beta_scale * sigmoid(W_beta x)                 write strength, one per head
    alpha = exp(-A * softplus(W_alpha x + b))              decay, one per head, A > 0 learned
    S' = alpha S + beta k (v - alpha S^T k)^T              forgets, then replaces (section 3.1)
    y  = W_o (norm(S'^T q / sqrt(d)) * silu(W_g x))        root mean square norm of each head

The decay can clear the memory. A starts uniformly between 0.01 and 16, and softplus(b)
log-uniformly between 0.001 and 0.1, as in Mamba-2. So a fresh head forgets within a few steps, or
only after many thousands.

Inputs must be of size 1 or so for outputs to have all their digits; `deltanet.py` says why.

Carry: S (B, heads, d, d), and the convolution's last inputs (B, K - 1, 3 H), zeros.
Cost per step: 10 H^2 + 6 H d floating-point operations per environment, for D = H.
Sequences: in chunks (see `parts/chunkwise.py`).
"""

import flax.linen as nn
import jax
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
from memory_cells.parts.initializers import log_uniform_softplus
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class GatedDeltaNet(SequenceCell):
    """Gated DeltaNet layer; see the module's docstring.

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
        check_num_heads("gated_deltanet", self.features, self.num_heads)
        check_conv_width("gated_deltanet", self.conv_width)
        check_impl("gated_deltanet", self.impl)
        check_beta_scale("gated_deltanet", self.beta_scale)
        super().__post_init__()

    def setup(self):
        self.qkv = Dense(3 * self.features, use_bias=False)
        self.conv = ShortConv(self.conv_width, use_bias=False)
        self.beta = Dense(self.num_heads, use_bias=False)
        self.alpha = Dense(self.num_heads, bias_init=log_uniform_softplus(1e-3, 1e-1))
        self.log_A = self.param("log_A", log_of_uniform, (self.num_heads,))
        self.gate = Dense(self.features, use_bias=False)
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
        log_decay = -jnp.exp(self.log_A) * nn.softplus(self.alpha(xs))
        memory, reads = delta_memory(memory, q, k, v, beta, log_decay, starts, self.impl)
        ys = merge_heads(self.norm(reads)) * nn.silu(self.gate(xs))
        return (memory, buffer), self.output(ys)


def log_of_uniform(key, shape, dtype=jnp.float32):
    """log A, for A uniform between 0.01 and 16; the authors' lower limit of 0 could give -inf."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
