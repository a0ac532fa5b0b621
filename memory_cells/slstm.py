"""sLSTM: the scalar-memory LSTM with exponential gates of xLSTM (Beck et al. 2024, arXiv 2405.04517, section 2.2).

Per head, with u = silu(conv(x)) a short causal convolution over time:

    i~ = W_i u + R_i h + b_i        f~ = W_f u + R_f h + b_f        gates see the convolved input
    z  = tanh(W_z x + R_z h + b_z)  o  = sigmoid(W_o x + R_o h + b_o)
    m' = max(logsigmoid(f~) + m, i~)                                stabiliser (eq. 15)
    i  = exp(i~ - m')               f  = exp(logsigmoid(f~) + m - m')     (eqs. 16, 17)
    c' = f * c + i * z              n' = f * n + i                  cell and normaliser (eqs. 8, 9)
    h' = o * c' / n'                y  = w * norm(h')               normalised within each head

W, R are block-diagonal over heads (memories mix within a head). The layer is the paper's figure 10 without residual and
feed-forward parts, as `sLSTMLayer` of the authors' package `xlstm`.
Carry: (c, n, m, h), each (B, H), and the convolution's last inputs (B, K - 1, H). m starts at -1e30, not 0: then the
first step gives m' = i~ exactly, for each environment by itself, and n' >= 1 whatever the input; a zero there gives nan
when one environment is reset while others run. A learned start instead has n = 1 and learns c, m and h: as if something
of value c had been read with log input gate m.
Cost per step: 8 H^2 (1 + 1 / heads) floating-point operations per environment; sequences are sequential.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.causal_conv import causal_conv
from memory_cells.parts.checks import check_conv_width, check_num_heads
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import uniform
from memory_cells.parts.recurrent_scan import recurrent_scan
from memory_cells.parts.short_conv import conv_buffer


class SLSTM(SequenceCell):
    """sLSTM layer; see the module's docstring.

    Attributes:
      features: H, the size of the states and of the output; a multiple of `num_heads`.
      num_heads: independent blocks of the recurrent weights.
      conv_width: K, the steps the gates' convolution sees; 0 leaves it out.
      learned_carry: learn the c, m and h that an episode starts with.
      depth: where in a stack the layer stands, from 0, the first, to 1, the last; late ones start with longer memories.
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
        # Zero as in the authors' code: a fresh cell is a gated sum over time; mixing is learned.
        shape = (self.num_heads, width, width)
        self.hidden = {name: self.param(f"hidden_{name}", nn.initializers.zeros, shape) for name in "ifzo"}
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (self.features,))
        if self.learned_carry:
            c, m, h = (self.param(f"initial_{name}", nn.initializers.zeros, (self.features,)) for name in "cmh")
            self.initial_offset = (c, 0.0, m, h), 0.0 if self.conv_width else ()

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        zeros = jnp.zeros((*batch, self.features))
        buffer = conv_buffer(self.conv_width, batch, self.features)
        n, m = (1.0, 0.0) if self.learned_carry else (0.0, -1e30)
        return (zeros, jnp.full_like(zeros, n), jnp.full_like(zeros, m), zeros), buffer

    def sequence(self, carry, xs, starts):
        state, buffer = carry
        initial, _ = self.initial_carry_like(xs)
        buffer, gates = self.inputs(buffer, xs, starts)
        # As full matrices with zeros between the heads: at these sizes one product is faster than one per head.
        params = tuple(jax.scipy.linalg.block_diag(*self.hidden[name]) for name in "ifzo")
        state, hs = recurrent_scan(project, step, params, state, gates, starts, initial)
        heads = hs.reshape(*hs.shape[:-1], self.num_heads, -1)
        heads = heads - heads.mean(axis=-1, keepdims=True)
        heads = heads * jax.lax.rsqrt((heads**2).mean(axis=-1, keepdims=True) + 1e-5)
        return (state, buffer), self.norm_scale * heads.reshape(hs.shape)


class GateInputs(nn.Module):
    """The input half of the four gates, for a whole sequence at once: everything that needs no recurrence."""

    features: int
    num_heads: int
    conv_width: int
    depth: float

    @nn.compact
    def __call__(self, buffer, xs, starts):
        """buffer (B, K - 1, H), xs (T, B, D), starts (T, B) -> buffer, gates i, f, z, o of (T, B, H) each."""
        if xs.shape[-1] != self.features:  # block-diagonal weights need as many inputs as features
            xs = Dense(self.features, name="embed")(xs)
        convolved = xs
        if self.conv_width:
            kernel = self.param("conv_kernel", uniform(0.5), (self.conv_width, self.features))
            bias = self.param("conv_bias", uniform(0.5), (self.features,))
            buffer, convolved = causal_conv(kernel, buffer, xs, starts)
            convolved = nn.silu(convolved + bias)
        width = self.features // self.num_heads
        weight_init = nn.initializers.normal((2 / (5 * self.features)) ** 0.5)
        gates = []
        for name, inputs in zip("ifzo", (convolved, convolved, xs, xs), strict=True):
            kernel = self.param(f"kernel_{name}", weight_init, (self.num_heads, width, width))
            bias_init = forget_bias_init(width, self.depth) if name == "f" else nn.initializers.zeros
            bias = self.param(f"bias_{name}", bias_init, (self.features,))
            gates.append(multiply_heads(kernel, inputs) + bias)
        return buffer, tuple(gates)


def forget_bias_init(width, depth):
    """From +5 (keeps for 150 steps) down to -7 (forgets at once) over a head's units, as in the authors' code."""
    slope = (jnp.arange(width) / max(width - 1, 1)) ** (0.3 + 1.3 * depth)
    return lambda key, shape, dtype=jnp.float32: jnp.tile(5.0 - 12.0 * slope, shape[0] // width).astype(dtype)


def multiply_heads(kernel, x):
    """x (..., heads * width) times the block-diagonal kernel (heads, width, width)."""
    heads = x.reshape(*x.shape[:-1], *kernel.shape[:2])
    return jnp.einsum("...hi,hio->...ho", heads, kernel).reshape(x.shape)


def project(params, state):
    """The recurrent half of the gates: R h for i, f, z and o, each (B, H)."""
    *_, h = state
    return tuple(h @ kernel for kernel in params)


def step(state, x, r):
    """One step from the input half `x` and the recurrent half `r` of the gates."""
    c, n, m, _ = state
    log_i = x[0] + r[0]
    log_f = nn.log_sigmoid(x[1] + r[1]) + m
    z = jnp.tanh(x[2] + r[2])
    o = nn.sigmoid(x[3] + r[3])
    # h does not depend on m (it cancels in c / n), so neither need its gradient.
    m = jax.lax.stop_gradient(jnp.maximum(log_f, log_i))
    i, f = jnp.exp(log_i - m), jnp.exp(log_f - m)
    c = f * c + i * z
    n = f * n + i
    h = o * c / n
    return (c, n, m, h), h
