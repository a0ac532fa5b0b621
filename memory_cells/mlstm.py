"""mLSTM: xLSTM's LSTM with a matrix memory and exponential gates (Beck et al. 2024, section 2.3).

arXiv 2405.04517.

    a, z = W_up x                                   two branches of I = 2 H channels
    c = silu(conv(a))                               causal convolution over time
    q = W_q c,  k = W_k c,  v = W_v a               block-diagonal, blocks of 4 channels
    i~, f~ = W_i [q, k, v] + b_i, W_f [q, k, v] + b_f                      one of each per head
    m' = max(logsigmoid(f~) + m, i~)                stabiliser (eq. 15)
    i  = exp(i~ - m')               f = exp(logsigmoid(f~) + m - m')       (eqs. 16, 17)
    C' = f C + i v k^T / sqrt(d)    n' = f n + i k / sqrt(d)    memory, normaliser (eqs. 19, 20)
    h  = C' q / max(|n' . q|, exp(-m'))             read, per head of d channels (eq. 21)
    y  = W_down((norm(h) + s * c) * silu(z))        normalised within each head; s a learned skip

The layer is `mLSTMLayer` of the authors' package `xlstm`: the paper's figure 11 without the
residual connection and the layer norm before it, both of which `xlstm.py` adds. Unlike in sLSTM, no
gate sees h, so the layer is parallel over time.

Carry: C^T with n as its last column (B, heads, d, d + 1), m (B, heads), and the convolution's last
inputs (B, K - 1, I), all zeros.
Cost per step: 6 H I + 4 I d floating-point operations per environment.
Sequences: in chunks (see `parts/chunkwise.py`).
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import (
    check_at_least,
    check_conv_width,
    check_impl,
    check_num_heads,
)
from memory_cells.parts.chunkwise import GATED_CHUNK, gated_memory, in_pieces
from memory_cells.parts.dense import Dense
from memory_cells.parts.heads import merge_heads, split_heads
from memory_cells.parts.initializers import small_init, wang_init
from memory_cells.parts.short_conv import ShortConv, conv_buffer

BLOCK = 4  # channels that the projections to q, k and v mix


class MLSTM(SequenceCell):
    """mLSTM layer; see the module's docstring.

    Attributes:
      features: H, the size of the output; a multiple of `num_heads`.
      num_heads: independent matrix memories.
      conv_width: K, the steps that the convolution sees; 0 leaves it out.
      num_blocks: how many blocks the network has; the more, the smaller the output starts.
      impl: "auto", "scan" or "parallel"; see `parts/chunkwise.py`.
    """

    num_heads: int = 4
    conv_width: int = 4
    num_blocks: int = 1
    impl: str = "auto"

    def __post_init__(self):
        check_num_heads("mlstm", self.features, self.num_heads)
        check_conv_width("mlstm", self.conv_width)
        check_impl("mlstm", self.impl)
        check_at_least("mlstm", self, num_blocks=1)
        super().__post_init__()

    @property
    def inner(self):
        """I: twice the features, rounded up to a multiple of 64 as in the authors' code."""
        multiple = math.lcm(64, self.num_heads)
        return -(-2 * self.features // multiple) * multiple

    def setup(self):
        inner = self.inner
        weight_init = small_init(self.features)
        self.up = Dense(2 * inner, use_bias=False, kernel_init=weight_init)
        blocks = (inner // BLOCK, BLOCK, BLOCK)
        self.kernels = {name: self.param(f"kernel_{name}", weight_init, blocks) for name in "qkv"}
        self.conv = ShortConv(self.conv_width)
        self.input_gate = Dense(
            self.num_heads,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.normal(0.1),
        )
        self.forget_gate = Dense(
            self.num_heads,
            kernel_init=nn.initializers.zeros,
            bias_init=linspace_init(3.0, 6.0),
        )
        self.norm = nn.LayerNorm(
            epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
        )
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (inner,))
        self.skip = self.param("skip", nn.initializers.ones, (inner,))
        down_init = wang_init(self.features, self.num_blocks)
        self.down = Dense(self.features, use_bias=False, kernel_init=down_init)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        width = self.inner // self.num_heads
        memory = jnp.zeros((*batch, self.num_heads, width, width + 1), jnp.float32)
        m = jnp.zeros((*batch, self.num_heads), jnp.float32)
        return (memory, m), conv_buffer(self.conv_width, batch, self.inner)

    @partial(in_pieces, length=GATED_CHUNK)
    def sequence(self, carry, xs, starts):
        memory, buffer = carry
        a, z = jnp.split(self.up(xs), 2, axis=-1)
        buffer, c = self.conv(buffer, a, starts)
        c = nn.silu(c) if self.conv_width else c
        q = multiply_blocks(self.kernels["q"], c)
        k = multiply_blocks(self.kernels["k"], c)
        v = multiply_blocks(self.kernels["v"], a)
        gate_inputs = jnp.concatenate([q, k, v], axis=-1)
        log_i = self.input_gate(gate_inputs)
        log_f = nn.log_sigmoid(self.forget_gate(gate_inputs))
        q, k, v = (split_heads(x, self.num_heads) for x in (q, k, v))
        k = k / k.shape[-1] ** 0.5
        memory, hs = gated_memory(memory, q, k, v, log_f, log_i, starts, self.impl)
        hs = self.norm_scale * merge_heads(self.norm(hs)) + self.skip * c
        return (memory, buffer), self.down(hs * nn.silu(z))


@jax.custom_vjp
def multiply_blocks(kernel, x):
    """x (..., n * d) times the block-diagonal kernel (n, d, d), for small d.

    Written as multiplications and additions of whole arrays, as is the gradient of x. For a batch
    of such small matrix products, XLA transposes the operands first, which takes several times as
    long as the products.
    """
    blocks = x.reshape(-1, *kernel.shape[:2])
    products = (blocks[..., i : i + 1] * kernel[:, i] for i in range(kernel.shape[1]))
    return sum(products).reshape(x.shape)


def _multiply_blocks_forward(kernel, x):
    return multiply_blocks(kernel, x), (kernel, x)


def _multiply_blocks_backward(residuals, d_ys):
    kernel, x = residuals
    shape = (-1, *kernel.shape[:2])
    d_kernel = jnp.einsum("rni,rno->nio", x.reshape(shape), d_ys.reshape(shape))
    return d_kernel, multiply_blocks(kernel.swapaxes(1, 2), d_ys)


multiply_blocks.defvjp(_multiply_blocks_forward, _multiply_blocks_backward)


def linspace_init(first, last):
    """From `first` to `last` in equal steps."""
    return lambda key, shape, dtype=jnp.float32: jnp.linspace(first, last, *shape, dtype=dtype)
