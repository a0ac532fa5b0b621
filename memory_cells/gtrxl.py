"""GTrXL: the gated Transformer-XL (Parisotto et al. 2019, arXiv 1910.06764), with gates of the GRU type.

A block, with x_t its input, s running over t and the M steps before it in the same episode:

    q_t = W_q norm(x_t)    k_s = W_k norm(x_s)    v_s = W_v norm(x_s)
    a_t = W_o sum_s softmax_s[((q_t + u) . k_s + (q_t + v) . W_r p_(t-s)) / sqrt(d)] v_s      d = H / heads
    b   = gate(x, relu(a))
    y   = gate(b, relu(W_2 relu(W_1 norm(b) + b_1) + b_2))

    gate(x, a):   r = sigmoid(W_r a + U_r x)    z = sigmoid(W_z a + U_z x - b_g)
                  h = tanh(W_g a + U_g (r * x))
                  (1 - z) * x + z * h

Attention is that of Transformer-XL (Dai et al. 2019, arXiv 1901.02860, section 3.3): relative, by the sinusoids p of
the distance t - s. b_g > 0 starts every block close to the identity, so that a fresh agent is reactive and learns to
remember from there; the paper's section 3 has the reasons.
The paper stops the gradient at the memory. Here that is the caller's choice, by `detach`; otherwise gradients flow
through the window as through any other state, the same in one sequence as step by step.
Carry: per block its last M inputs (B, M, H), and the steps read of the episode (B,). L blocks reach back L * M steps.
Cost: see `band_attention.py`, and per step and block 2 H^2 (16 + 2 F) floating-point operations for an mlp of F H
units; the memory's keys and values cost 4 H^2 M per call.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.band_attention import append, band_attention, newest, start_times
from memory_cells.parts.checks import check_at_least, check_num_heads
from memory_cells.parts.dense import Dense

LayerNorm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class GTrXL(SequenceCell):
    """Gated Transformer-XL; see the module's docstring.

    Attributes:
      features: H, the size of the stream through the blocks and of the output; a multiple of `num_heads`.
      num_heads: parts of H that attend by themselves.
      num_blocks: L, attention and mlp on top of each other.
      memory_length: M, the steps before its own that a step sees in each block.
      gate_bias: initial b_g; a fresh gate lets about sigmoid(-b_g) of a block's output through.
      mlp_factor: F, units of the mlp over H.
    """

    num_heads: int = 4
    num_blocks: int = 2
    memory_length: int = 64
    gate_bias: float = 2.0
    mlp_factor: int = 2

    def __post_init__(self):
        check_num_heads("gtrxl", self.features, self.num_heads)
        check_at_least("gtrxl", self, num_blocks=1, memory_length=1, mlp_factor=1)
        super().__post_init__()

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        memory = jnp.zeros((*batch, self.memory_length, self.features))
        return (memory,) * self.num_blocks, jnp.zeros(batch)

    @nn.compact
    def sequence(self, carry, xs, starts):
        memories, age = carry
        began = start_times(age, starts)
        xs = xs.swapaxes(0, 1)  # (B, T, D), as band attention wants it
        if xs.shape[-1] != self.features:
            xs = Dense(self.features, name="embed")(xs)
        new_memories = []
        for index, memory in enumerate(memories):
            rows = append(memory, xs, began)
            new_memories.append(newest(rows, began))
            xs = Block(self.num_heads, self.gate_bias, self.mlp_factor, name=f"block_{index}")(rows, began)
        return (tuple(new_memories), len(starts) - began[:, -1]), xs.swapaxes(0, 1)


class Block(nn.Module):
    """Gated attention, gated mlp: rows (B, M + T, H), memory first, and start times (B, T) -> (B, T, H)."""

    num_heads: int
    gate_bias: float
    mlp_factor: int

    @nn.compact
    def __call__(self, rows, began):
        features, xs = rows.shape[-1], rows[:, -began.shape[1] :]
        attention = RelativeAttention(self.num_heads, features // self.num_heads, name="attention")
        attended = attention(LayerNorm(name="attention_norm")(rows), began)
        xs = Gate(self.gate_bias, name="attention_gate")(xs, nn.relu(attended))
        hidden = nn.relu(Dense(self.mlp_factor * features, name="mlp_in")(LayerNorm(name="mlp_norm")(xs)))
        return Gate(self.gate_bias, name="mlp_gate")(xs, nn.relu(Dense(features, name="mlp_out")(hidden)))


class RelativeAttention(nn.Module):
    """Transformer-XL's attention: rows (B, M + T, H), memory first, and start times (B, T) -> (B, T, H)."""

    num_heads: int
    head_size: int

    @nn.compact
    def __call__(self, rows, began):
        heads, (_, num_rows, features), steps = (self.num_heads, self.head_size), rows.shape, began.shape[1]

        def project(name, rows):
            """(..., rows, H) -> (..., heads, rows, d)"""
            return nn.DenseGeneral(heads, use_bias=False, name=name)(rows).swapaxes(-2, -3)

        queries, keys, values = project("query", rows[:, -steps:]), project("key", rows), project("value", rows)
        distances = np.arange(num_rows - steps, -1, -1)
        positions = project("position", jnp.asarray(sinusoids(distances, features), rows.dtype))  # (heads, M + 1, d)

        content_bias = self.param("content_bias", nn.initializers.normal(0.02), heads)[:, None]
        position_bias = self.param("position_bias", nn.initializers.normal(0.02), heads)[:, None]
        scale = self.head_size**-0.5
        by_distance = jnp.einsum("bhtd,hmd->bhtm", scale * (queries + position_bias), positions)
        ys = band_attention(scale * (queries + content_bias), keys, values, began, by_distance)
        return nn.DenseGeneral(features, axis=(1, 3), use_bias=False, name="out")(ys)


class Gate(nn.Module):
    """The paper's GRU-type gate, in place of a residual connection: stream x and a layer's output y -> stream."""

    bias: float

    @nn.compact
    def __call__(self, x, y):
        dense = partial(nn.Dense, x.shape[-1], use_bias=False)
        bias = self.param("bias", nn.initializers.constant(self.bias), (x.shape[-1],))
        r = nn.sigmoid(dense(name="w_r")(y) + dense(name="u_r")(x))
        z = nn.sigmoid(dense(name="w_z")(y) + dense(name="u_z")(x) - bias)
        h = jnp.tanh(dense(name="w_h")(y) + dense(name="u_h")(r * x))
        return (1.0 - z) * x + z * h


def sinusoids(positions, width):
    """(len(positions), width): the positions' sines at width / 2 frequencies from 1 down to 1 / 10000, then cosines."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[:, :width]
