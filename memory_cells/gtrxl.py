"""GTrXL: the gated Transformer-XL (Parisotto et al. 2019, arXiv 1910.06764), with GRU-type gates.

A block, with x_t its input and s running over t and the M steps before it in the same episode:

    q_t = W_q norm(x_t)    k_s = W_k norm(x_s)    v_s = W_v norm(x_s)       d = H / heads
    a_t = W_o sum_s softmax_s[((q_t + u) . k_s + (q_t + v) . W_r p_(t-s)) / sqrt(d)] v_s
    b   = gate(x, relu(a))
    y   = gate(b, relu(W_2 relu(W_1 norm(b) + b_1) + b_2))

    gate(x, a):   r = sigmoid(W_r a + U_r x)    z = sigmoid(W_z a + U_z x - b_g)
                  h = tanh(W_g a + U_g (r * x))
                  (1 - z) * x + z * h

Attention is that of Transformer-XL (Dai et al. 2019, arXiv 1901.02860, section 3.3): relative, with
sinusoids p of the distance t - s. With b_g > 0, every block starts close to the identity: a fresh
agent is reactive and learns to remember from there. Section 3 of the paper has the reasons.

The paper stops the gradient at the memory. Here the caller decides, with `detach`. Otherwise the
gradient flows through the window as through any other state, and does not depend on whether a
sequence is read at once or step by step.

Carry: per block its last M inputs (B, M, H), and the steps read of the episode (B,), all zeros.
With L blocks, a step can depend on the L * M steps before it.
Cost per step: 2 H^2 (16 + 2 F) floating-point operations per environment and block, for an mlp of
F H units, plus the attention (see `parts/band_attention.py`). Each call computes keys and values of
the memory again, for 4 H^2 M.
Sequences: in parallel within the window, in a loop over chunks.
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
      features: H, the size of the stream through the blocks and of the output; a multiple of
        `num_heads`.
      num_heads: heads of the attention.
      num_blocks: L, blocks of attention and mlp on top of each other.
      memory_length: M, how many steps before its own a step sees in each block.
      gate_bias: initial b_g; a fresh gate lets about sigmoid(-b_g) of a layer's output through.
      mlp_factor: F, the units of the mlp divided by H.
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
        memory = jnp.zeros((*batch, self.memory_length, self.features), jnp.float32)
        return (memory,) * self.num_blocks, jnp.zeros(batch, jnp.float32)

    @nn.compact
    def sequence(self, carry, xs, starts):
        memories, age = carry
        began = start_times(age, starts)
        xs = xs.swapaxes(0, 1)  # (B, T, D), the layout of band attention
        if xs.shape[-1] != self.features:
            xs = Dense(self.features, name="embed")(xs)
        new_memories = []
        for index, memory in enumerate(memories):
            rows = append(memory, xs, began)
            new_memories.append(newest(rows, began))
            block = Block(self.num_heads, self.gate_bias, self.mlp_factor, name=f"block_{index}")
            xs = block(rows, began)
        age = len(starts) - began[:, -1]
        return (tuple(new_memories), age), xs.swapaxes(0, 1)


class Block(nn.Module):
    """Gated attention and gated mlp.

    Reads rows (B, M + T, H), the memory first, and start times (B, T); returns (B, T, H).
    """

    num_heads: int
    gate_bias: float
    mlp_factor: int

    @nn.compact
    def __call__(self, rows, began):
        features = rows.shape[-1]
        xs = rows[:, -began.shape[1] :]
        attention = RelativeAttention(self.num_heads, features // self.num_heads, name="attention")
        attended = attention(LayerNorm(name="attention_norm")(rows), began)
        xs = Gate(self.gate_bias, name="attention_gate")(xs, nn.relu(attended))

        normed = LayerNorm(name="mlp_norm")(xs)
        hidden = nn.relu(Dense(self.mlp_factor * features, name="mlp_in")(normed))
        out = nn.relu(Dense(features, name="mlp_out")(hidden))
        return Gate(self.gate_bias, name="mlp_gate")(xs, out)


class RelativeAttention(nn.Module):
    """The attention of Transformer-XL.

    Reads rows (B, M + T, H), the memory first, and start times (B, T); returns (B, T, H).
    """

    num_heads: int
    head_size: int

    @nn.compact
    def __call__(self, rows, began):
        heads = (self.num_heads, self.head_size)
        _, num_rows, features = rows.shape
        steps = began.shape[1]

        def project(name, rows):
            """(..., rows, H) -> (..., heads, rows, d)."""
            return nn.DenseGeneral(heads, use_bias=False, name=name)(rows).swapaxes(-2, -3)

        queries = project("query", rows[:, -steps:])
        keys = project("key", rows)
        values = project("value", rows)
        distances = np.arange(num_rows - steps, -1, -1)
        waves = jnp.asarray(sinusoids(distances, features), rows.dtype)
        positions = project("position", waves)  # (heads, M + 1, d)

        normal = nn.initializers.normal(0.02)
        content_bias = self.param("content_bias", normal, heads, jnp.float32)[:, None]
        position_bias = self.param("position_bias", normal, heads, jnp.float32)[:, None]
        scale = self.head_size**-0.5
        position_queries = scale * (queries + position_bias)
        by_distance = jnp.einsum("bhtd,hmd->bhtm", position_queries, positions)
        content_queries = scale * (queries + content_bias)
        ys = band_attention(content_queries, keys, values, began, by_distance)
        return nn.DenseGeneral(features, axis=(1, 3), use_bias=False, name="out")(ys)


class Gate(nn.Module):
    """The paper's GRU-type gate, in place of a residual connection.

    Reads the stream x and the output y of a layer; returns the new stream.
    """

    bias: float

    @nn.compact
    def __call__(self, x, y):
        dense = partial(nn.Dense, x.shape[-1], use_bias=False)
        bias_init = nn.initializers.constant(self.bias)
        bias = self.param("bias", bias_init, (x.shape[-1],), jnp.float32)
        r = nn.sigmoid(dense(name="w_r")(y) + dense(name="u_r")(x))
        z = nn.sigmoid(dense(name="w_z")(y) + dense(name="u_z")(x) - bias)
        h = jnp.tanh(dense(name="w_h")(y) + dense(name="u_h")(r * x))
        return (1.0 - z) * x + z * h


def sinusoids(positions, width):
    """Sines, then cosines, of positions times 10000^(-2 i / width): (len(positions), width)."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[:, :width]
