"""Mamba's mixer, the selective state space layer S6 (Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and figure 3).

    u, g   = W_u x, W_g x                          I = expand * H channels each
    u      = silu(conv(u))                         short causal convolution over time
    dt     = softplus(W_dt (W_r u) + b_dt)         time step of each channel, through a bottleneck of dt_rank
    B, C   = W_B u, W_C u                          what is written and read, N numbers for all channels
    h'     = exp(dt * A) * h + (dt * u) B          A = -exp(A_log); h, A: N states for each channel
    y      = W_o ((h' C + D * u) * silu(g))

Normalisation and residual of the block around it are left to the caller.
Carry: h (B, N, I), zeros, and the convolution's last inputs (B, K - 1, I). Cost per step: 2 I (2 D + H + 6 N) + 2 I (2
dt_rank + K) floating-point operations per environment; sequences in chunks, each in parallel or in a loop, see
`selective_scan.py`. The states of a whole sequence, T B I N numbers, are never kept: the gradient recomputes those of a
chunk from its first.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_at_least, check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import uniform
from memory_cells.parts.selective_scan import selective_scan
from memory_cells.parts.short_conv import ShortConv, conv_buffer


class Mamba(SequenceCell):
    """Mamba's mixer; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      state_size: N, the states of each channel.
      expand: channels per feature.
      dt_rank: the width of the bottleneck before the time steps; 0 takes H / 16, rounded up.
      conv_width: K, the steps the convolution sees.
      chunk_size: steps of which all states are in memory at once.
      impl: "auto", "scan" or "parallel"; see `selective_scan.py`.
    """

    state_size: int = 16
    expand: int = 2
    dt_rank: int = 0
    conv_width: int = 4
    chunk_size: int = 32
    impl: str = "auto"

    def __post_init__(self):
        check_impl("mamba", self.impl)
        check_at_least("mamba", self, state_size=1, expand=1, dt_rank=0, conv_width=2, chunk_size=1)
        super().__post_init__()

    def setup(self):
        channels, rank = self.expand * self.features, self.dt_rank or math.ceil(self.features / 16)
        dense = lambda size: Dense(size, use_bias=False)  # noqa: E731
        self.input, self.gate = dense(channels), dense(channels)
        self.conv = ShortConv(self.conv_width)
        self.dt_in, self.write, self.read = dense(rank), dense(self.state_size), dense(self.state_size)
        self.dt_out = Dense(channels, kernel_init=uniform(rank**-0.5), bias_init=dt_bias_init)
        self.A_log = self.param("A_log", a_log_init, (channels, self.state_size))
        self.D = self.param("D", nn.initializers.ones, (channels,))
        self.output = dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch, channels = input_shape[:-1], self.expand * self.features
        return jnp.zeros((*batch, self.state_size, channels)), conv_buffer(self.conv_width, batch, channels)

    def sequence(self, carry, xs, starts):
        h, buffer = carry
        buffer, us = self.conv(buffer, self.input(xs), starts)
        us = nn.silu(us)
        dt = nn.softplus(self.dt_out(self.dt_in(us)))
        inputs = dt, dt * us, self.write(us), self.read(us), starts
        h, ys = selective_scan(-jnp.exp(self.A_log.T), h, inputs, self.chunk_size, self.impl)
        return (h, buffer), self.output((ys + self.D * us) * nn.silu(self.gate(xs)))


def dt_bias_init(key, shape, dtype):
    """The inverse softplus of time steps spread log-uniformly over 0.001 ... 0.1."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(0.001), math.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def a_log_init(key, shape):
    """A = -1 ... -N for the states of every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)
