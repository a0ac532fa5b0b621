"""sLSTM: xLSTM's LSTM with a scalar memory and exponential gates (Beck et al. 2024, section 2.2).

arXiv 2405.04517. Per head, with u = silu(conv(x)), a short causal convolution over time:

    i~ = W_i u + R_i h + b_i        f~ = W_f u + R_f h + b_f        the gates see the convolution
    z  = tanh(W_z x + R_z h + b_z)  o  = sigmoid(W_o x + R_o h + b_o)
    m' = max(logsigmoid(f~) + m, i~)                                stabiliser (eq. 15)
    i  = exp(i~ - m')               f  = exp(logsigmoid(f~) + m - m')     (eqs. 16, 17)
    c' = f * c + i * z              n' = f * n + i                  cell and normaliser (eqs. 8, 9)
    h' = o * c' / n'                y  = w * norm(h')               normalised within each head

W and R are block-diagonal over the heads: memories mix within a head. The layer is `sLSTMLayer` of
the authors' package `xlstm`, the paper's figure 10 without its residual and feed-forward parts.

m starts at -1e30. Then the first step gives m' = i~ exactly, and n' >= 1 for any input. With m = 0,
i may underflow, so that n' is 0 and h' is nan; the authors' code avoids this only if all
environments start together. A learned start has n = 1 and learns c, m and h, as if a value c had
been read with log input gate m.

Carry: (c, n, m, h), each (B, H), and the convolution's last inputs (B, K - 1, H); zeros except m.
Cost per step: 8 H^2 (1 + 1 / heads) floating-point operations per environment.
Sequences: in a loop.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.causal_conv import causal_conv
from memory_cells.parts.checks import check_conv_width, check_num_heads
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import small_init, uniform
from memory_cells.parts.recurrent_scan import recurrent_scan
from memory_cells.parts.short_conv import conv_buffer


class SLSTM(SequenceCell):
    """sLSTM layer; see the module's docstring.

    Attributes:
      features: H, the size of the states and of the output; a multiple of `num_heads`.
      num_heads: independent blocks of the recurrent weights.
      conv_width: K, the steps that the convolution sees; 0 leaves it out.
      learned_carry: learn the c, m and h that an episode starts with.
      depth: position in a stack, from 0 for the first layer to 1 for the last. The memories of late
        layers start longer.
    """

    num_heads: int = 4
    conv_width: int = 4
    learned_carry: bool = False
    depth: float = 0.0

    def __post_init__(self):
        check_num_heads("slstm", self.features, self.num_heads)
        check_conv_width("slstm", self.conv_width)
        if not 0 <= self.depth <= 1:
            raise ValueError(f"slstm needs depth to be between 0 and 1, got {self.depth}")
        super().__post_init__()

    def setup(self):
        width = self.features // self.num_heads
        self.inputs = GateInputs(self.features, self.num_heads, self.conv_width, self.depth)
        # Zero as in the authors' code: a fresh cell is a gated sum over time, and learns to mix.
        zeros = nn.initializers.zeros
        shape = (self.num_heads, width, width)
        self.hidden = {name: self.param(f"hidden_{name}", zeros, shape) for name in "ifzo"}
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (self.features,))
        if self.learned_carry:
            c = self.param("initial_c", zeros, (self.features,))
            m = self.param("initial_m", zeros, (self.features,))
            h = self.param("initial_h", zeros, (self.features,))
            self.initial_offset = (c, 0.0, m, h), 0.0 if self.conv_width else ()

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        zeros = jnp.zeros((*batch, self.features), jnp.float32)
        buffer = conv_buffer(self.conv_width, batch, self.features)
        n, m = (1.0, 0.0) if self.learned_carry else (0.0, -1e30)
        return (zeros, jnp.full_like(zeros, n), jnp.full_like(zeros, m), zeros), buffer

    def sequence(self, carry, xs, starts):
        state, buffer = carry
        initial, _ = self.initial_carry_like(xs)
        buffer, gates = self.inputs(buffer, xs, starts)
        # Full matrices with zeros between the heads: one product is faster than one per head.
        params = tuple(jax.scipy.linalg.block_diag(*self.hidden[name]) for name in "ifzo")
        state, hs = recurrent_scan(project, step, params, state, gates, starts, initial)
        heads = hs.reshape(*hs.shape[:-1], self.num_heads, -1)
        heads = heads - heads.mean(axis=-1, keepdims=True)
        heads = heads * jax.lax.rsqrt((heads**2).mean(axis=-1, keepdims=True) + 1e-5)
        return (state, buffer), self.norm_scale * heads.reshape(hs.shape)


class GateInputs(nn.Module):
    """The input half of the four gates, for a whole sequence: everything without recurrence."""

    features: int
    num_heads: int
    conv_width: int
    depth: float

    @nn.compact
    def __call__(self, buffer, xs, starts):
        """Inputs to gates.

        Args:
          buffer: (B, K - 1, H), the last inputs of the convolution.
          xs: (T, B, D).
          starts: (T, B) bool.

        Returns:
          The buffer after the last step, and the gates i, f, z, o, each (T, B, H).
        """
        if xs.shape[-1] != self.features:  # block-diagonal weights need as many inputs as features
            xs = Dense(self.features, name="embed")(xs)
        convolved = xs
        if self.conv_width:
            shape = (self.conv_width, self.features)
            kernel = self.param("conv_kernel", uniform(0.5), shape, jnp.float32)
            bias = self.param("conv_bias", uniform(0.5), (self.features,), jnp.float32)
            buffer, convolved = causal_conv(kernel, buffer, xs, starts)
            convolved = nn.silu(convolved + bias)
        width = self.features // self.num_heads
        shape = (self.num_heads, width, width)
        sources = {"i": convolved, "f": convolved, "z": xs, "o": xs}
        gates = []
        for name, inputs in sources.items():
            kernel = self.param(f"kernel_{name}", small_init(self.features), shape, jnp.float32)
            zeros = nn.initializers.zeros
            bias_init = forget_bias_init(width, self.depth) if name == "f" else zeros
            bias = self.param(f"bias_{name}", bias_init, (self.features,), jnp.float32)
            gates.append(multiply_heads(kernel, inputs) + bias)
        return buffer, tuple(gates)


def forget_bias_init(width, depth):
    """From +5 (time constant of 150 steps) down to -7 (forgets at once) within each head.

    The values are those of the authors' code.
    """
    slope = (jnp.arange(width) / max(width - 1, 1)) ** (0.3 + 1.3 * depth)

    def init(key, shape, dtype=jnp.float32):
        return jnp.tile(5.0 - 12.0 * slope, shape[0] // width).astype(dtype)

    return init


def multiply_heads(kernel, x):
    """x (..., heads * width) times the block-diagonal kernel (heads, width, width)."""
    heads = x.reshape(*x.shape[:-1], *kernel.shape[:2])
    return jnp.einsum("...hi,hio->...ho", heads, kernel).reshape(x.shape)


def project(params, state):
    """The recurrent half of the gates: R h for i, f, z and o, each (B, H)."""
    *_, h = state
    return tuple(h @ kernel for kernel in params)


def step(state, x, r):
    """One step, from the input half `x` and the recurrent half `r` of the gates."""
    c, n, m, _ = state
    log_i = x[0] + r[0]
    log_f = nn.log_sigmoid(x[1] + r[1]) + m
    z = jnp.tanh(x[2] + r[2])
    o = nn.sigmoid(x[3] + r[3])
    # h does not depend on m, which cancels in c / n. So no gradient needs to flow through m.
    m = jax.lax.stop_gradient(jnp.maximum(log_f, log_i))
    i = jnp.exp(log_i - m)
    f = jnp.exp(log_f - m)
    c = f * c + i * z
    n = f * n + i
    h = o * c / n
    return (c, n, m, h), h
