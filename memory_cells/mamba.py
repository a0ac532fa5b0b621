"""Mamba's mixer, the selective state space layer S6 (Gu & Dao 2023, arXiv 2312.00752).

Algorithm 2 and figure 3 of the paper:

    u, g   = W_u x, W_g x                      I = expand * H channels each
    u      = silu(conv(u))                     short causal convolution over time
    dt     = softplus(W_dt (W_r u) + b_dt)     time step of each channel, of rank dt_rank
    B, C   = W_B u, W_C u                      weights of writing and reading, N for all channels
    h'     = exp(dt * A) * h + (dt * u) B      A = -exp(A_log); h, A: N states for each channel
    y      = W_o ((h' C + D * u) * silu(g))

The caller may add the normalisation and the residual connection of the block around the mixer.

Carry: h (B, N, I), and the convolution's last inputs (B, K - 1, I), zeros.
Cost per step: 2 I (2 D + H + 6 N) + 2 I (2 dt_rank + K) floating-point operations per environment.
Sequences: in chunks, each in a loop or in parallel (see `parts/selective_scan.py`). The T B N I
states of a sequence are never stored; the gradient recomputes those of a chunk from its first.
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_at_least, check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import log_uniform_softplus, uniform
from memory_cells.parts.selective_scan import selective_scan
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class Mamba(SequenceCell):
    """Mamba's mixer; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      state_size: N, the states of each channel.
      expand: channels per feature.
      dt_rank: rank of the projection to the time steps; 0 takes H / 16, rounded up.
      conv_width: K, the steps that the convolution sees.
      chunk_size: the number of steps whose states are in memory together.
      impl: "auto", "scan" or "parallel"; see `parts/selective_scan.py`.
    """

    state_size: int = 16
    expand: int = 2
    dt_rank: int = 0
    conv_width: int = 4
    chunk_size: int = 32
    impl: str = "auto"

    def __post_init__(self):
        check_impl("mamba", self.impl)
        limits = {"state_size": 1, "expand": 1, "dt_rank": 0, "conv_width": 2, "chunk_size": 1}
        check_at_least("mamba", self, **limits)
        super().__post_init__()

    def setup(self):
        channels = self.expand * self.features
        rank = self.dt_rank or math.ceil(self.features / 16)
        self.input = Dense(channels, use_bias=False)
        self.gate = Dense(channels, use_bias=False)
        self.conv = ShortConv(self.conv_width)
        self.dt_in = Dense(rank, use_bias=False)
        self.write = Dense(self.state_size, use_bias=False)
        self.read = Dense(self.state_size, use_bias=False)
        self.dt_out = Dense(
            channels,
            kernel_init=uniform(rank**-0.5),
            bias_init=log_uniform_softplus(0.001, 0.1),  # time steps from 0.001 to 0.1
        )
        self.A_log = self.param("A_log", a_log_init, (channels, self.state_size))
        self.D = self.param("D", nn.initializers.ones, (channels,))
        self.output = Dense(self.features, use_bias=False)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        channels = self.expand * self.features
        h = jnp.zeros((*batch, self.state_size, channels), jnp.float32)
        return h, conv_buffer(self.conv_width, batch, channels)

    def sequence(self, carry, xs, starts):
        h, buffer = carry
        buffer, us = self.conv(buffer, self.input(xs), starts)
        us = nn.silu(us)
        dt = nn.softplus(self.dt_out(self.dt_in(us)))
        inputs = dt, dt * us, self.write(us), self.read(us), starts
        A = -jnp.exp(self.A_log.T)
        h, ys = selective_scan(A, h, inputs, self.chunk_size, self.impl)
        return (h, buffer), self.output((ys + self.D * us) * nn.silu(self.gate(xs)))


def a_log_init(key, shape):
    """A = -1, -2, ..., -N for the states of every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
