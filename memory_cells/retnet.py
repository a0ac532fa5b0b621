"""Retention of RetNet (Sun et al. 2023, arXiv 2307.08621, section 2).

Linear attention with a fixed decay per head:

    u = silu(conv(x))                              causal convolution over time, not in the paper
    q, k, v = W u
    q, k <- rotated by t * theta                   t the step of the episode, pairs of channels,
                                                   theta_j = 10000^(-2j/d)
    S' = gamma S + k v^T,  gamma = 1 - 2^(-5 - h)  in head h: half lives of 22, 44, 88, 177 steps
    y  = W_o (norm(S'^T q / sqrt(d)) * silu(W_g u))     normalised within each head

The products q . k depend on t through differences only, so the memory can tell how long ago
something was. In float32, angles are accurate to 0.01 up to t = 100 000.

These are the formulas of the paper. The authors' code, torchscale, differs from them: theta_j is
10000^(-2j / (d - 2)), the norm of a head does not subtract the mean, values may be wider than keys,
and weights start smaller (Xavier's, those of q, k, v and the gate times 2^-2.5). It also divides
reads by numbers that the norm takes out again, and pairs channels that are neighbours.

Carry: S (B, heads, d, d), the steps read of the episode t (B,), and the convolution's last inputs
(B, K - 1, D), all zeros.
Cost per step: 10 H^2 + 4 H d floating-point operations per environment, for D = H.
Sequences: in chunks (see `parts/chunkwise.py`).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.carry import episode_steps
from memory_cells.parts.checks import check_conv_width, check_impl, check_num_heads
from memory_cells.parts.chunkwise import in_pieces, linear_memory
from memory_cells.parts.dense import Dense
from memory_cells.parts.heads import merge_heads, split_heads
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class RetNet(SequenceCell):
    """Multi-scale retention; see the module's docstring.

    Attributes:
      features: H, the size of the output; an even multiple of `num_heads`.
      num_heads: independent memories, one decay each.
      conv_width: K, the steps that the convolution sees; 0 leaves it out, as in the paper.
      impl: "auto", "scan" or "parallel"; see `parts/chunkwise.py`.
    """

    num_heads: int = 4
    conv_width: int = 4
    impl: str = "auto"

    def __post_init__(self):
        check_num_heads("retnet", self.features, self.num_heads)
        check_conv_width("retnet", self.conv_width)
        check_impl("retnet", self.impl)
        if self.features // self.num_heads % 2:
            raise ValueError(
                "retnet needs hidden_size / num_heads to be even, "
                f"got {self.features} and {self.num_heads}"
            )
        super().__post_init__()

    def setup(self):
        self.conv = ShortConv(self.conv_width)
        self.qkv = Dense(3 * self.features, use_bias=False)
        self.gate = Dense(self.features, use_bias=False)
        self.norm = nn.LayerNorm(
            epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
        )
        self.output = Dense(self.features, use_bias=False)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        *batch, inputs = input_shape
        width = self.features // self.num_heads
        memory = jnp.zeros((*batch, self.num_heads, width, width), jnp.float32)
        # The count is a float, so that the whole carry is differentiable.
        count = jnp.zeros(batch, jnp.float32)
        return memory, count, conv_buffer(self.conv_width, batch, inputs)

    @in_pieces
    def sequence(self, carry, xs, starts):
        memory, count, buffer = carry
        buffer, us = self.conv(buffer, xs, starts)
        us = nn.silu(us) if self.conv_width else us
        qkv = jnp.split(self.qkv(us), 3, axis=-1)
        q, k, v = (split_heads(x, self.num_heads) for x in qkv)
        steps = episode_steps(count, starts)
        q = rotate(q, steps) / q.shape[-1] ** 0.5
        k = rotate(k, steps)
        gamma = 1.0 - 2.0 ** (-5.0 - np.arange(self.num_heads))
        log_decay = jnp.broadcast_to(np.log(gamma).astype(q.dtype), q.shape[:-1])
        memory, reads = linear_memory(memory, q, k, v, log_decay, starts, self.impl)
        ys = merge_heads(self.norm(reads)) * nn.silu(self.gate(us))
        return (memory, steps[-1] + 1, buffer), self.output(ys)


def rotate(x, steps):
    """Rotate pairs of channels of x (T, B, heads, d) by the angles steps (T, B) * theta_j.

    Channels j and j + d / 2 are a pair.
    """
    half = x.shape[-1] // 2
    theta = 10000.0 ** (-np.arange(half) / half)
    angles = (steps[..., None] * theta.astype(x.dtype))[..., None, :]
    cos = jnp.cos(angles)
    sin = jnp.sin(angles)
    a = x[..., :half]
    b = x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
