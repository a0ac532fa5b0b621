"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners") over a window.

    x = x + W_o attention(norm(x)) + b_o           softmax attention, scores q . k / sqrt(H / heads)
    x = x + W_2 gelu(W_1 norm(x) + b_1) + b_2      per block, gelu in its tanh form
    y = norm(x)                                    after the last block

A step sees itself and the C - 1 steps before it in its episode. Positions are counted within the
episode and have two forms:

    learned   GPT-2's own: the n-th step of an episode adds the n-th row of a table. All steps
              beyond the table add its last row, so order within the window is lost.
    rotary    (Su et al. 2021, arXiv 2104.09864): queries and keys are rotated by their time, so
              scores depend on the time between them only. Works in episodes of any length.

The cache holds keys before their rotation. They are then rotated by their place in the window, so
that angles stay small, however old the episode is.

Carry: per block the keys and values of the last C - 1 steps, each (B, heads, C - 1, H / heads), and
the steps read of the episode (B,), all zeros. With L blocks, a step can depend on the L * (C - 1)
steps before it.
Cost per step: 24 H^2 floating-point operations per environment and block, plus the attention (see
`parts/band_attention.py`).
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


class GPT2(SequenceCell):
    """GPT-2 over a rolling window; see the module's docstring.

    Attributes:
      features: H, the size of the stream through the blocks and of the output; a multiple of
        `num_heads`.
      num_heads: heads of the attention.
      num_blocks: L, blocks of attention and mlp on top of each other.
      context_length: C, how many steps a step sees in each block, itself included.
      positions: "rotary" or "learned".
      num_positions: rows of the table of learned positions.
    """

    num_heads: int = 4
    num_blocks: int = 2
    context_length: int = 64
    positions: str = "rotary"
    num_positions: int = 1024

    def __post_init__(self):
        check_num_heads("gpt2", self.features, self.num_heads)
        if self.positions not in ("rotary", "learned"):
            raise ValueError(
                f"gpt2 needs positions to be 'rotary' or 'learned', got {self.positions!r}"
            )
        if self.positions == "rotary" and self.features // self.num_heads % 2:
            raise ValueError(
                "gpt2 with rotary positions needs hidden_size to be an even multiple of num_heads, "
                f"got {self.features} and {self.num_heads}"
            )
        check_at_least("gpt2", self, num_blocks=1, context_length=2, num_positions=1)
        super().__post_init__()

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        head_size = self.features // self.num_heads
        shape = (*batch, self.num_heads, self.context_length - 1, head_size)
        rows = jnp.zeros(shape, jnp.float32)
        return ((rows, rows),) * self.num_blocks, jnp.zeros(batch, jnp.float32)

    @nn.compact
    def sequence(self, carry, xs, starts):
        caches, age = carry
        began = start_times(age, starts)
        xs = xs.swapaxes(0, 1)  # (B, T, D), the layout of band attention
        if xs.shape[-1] != self.features:
            xs = Dense(self.features, name="embed")(xs)
        if self.positions == "learned":
            shape = (self.num_positions, self.features)
            table = self.param("positions", nn.initializers.normal(0.02), shape)
            position = (jnp.arange(len(starts)) - began).astype(jnp.int32)
            xs += table[jnp.minimum(position, self.num_positions - 1)]
        is_rotary = self.positions == "rotary"
        new_caches = []
        for index, cache in enumerate(caches):
            block = Block(self.num_heads, self.num_blocks, is_rotary, name=f"block_{index}")
            cache, xs = block(cache, xs, began)
            new_caches.append(cache)
        age = len(starts) - began[:, -1]
        return (tuple(new_caches), age), LayerNorm(name="norm")(xs).swapaxes(0, 1)


class Block(nn.Module):
    """Attention and mlp: cache, xs (B, T, H) and start times (B, T) -> cache, ys (B, T, H)."""

    num_heads: int
    num_blocks: int
    is_rotary: bool

    @nn.compact
    def __call__(self, cache, xs, began):
        features = xs.shape[-1]
        head_size = features // self.num_heads
        # The stream sums the outputs of 2 L layers. Each starts smaller by the square root of that.
        out_scale = 0.02 / (2 * self.num_blocks) ** 0.5
        dense = partial(nn.DenseGeneral, kernel_init=nn.initializers.normal(0.02))
        dense_out = partial(nn.DenseGeneral, kernel_init=nn.initializers.normal(out_scale))

        normed = LayerNorm(name="attention_norm")(xs)

        def project(name):
            """(B, heads, T, H / heads)."""
            return dense((self.num_heads, head_size), name=name)(normed).swapaxes(1, 2)

        cached_keys, cached_values = cache
        queries = project("query")
        keys = append(cached_keys, project("key"), began)
        values = append(cached_values, project("value"), began)
        cache = newest(keys, began), newest(values, began)
        if self.is_rotary:
            # Times are counted from the oldest key on.
            queries = rotate(queries, keys.shape[-2] - queries.shape[-2])
            keys = rotate(keys, 0)
        attended = band_attention(queries * head_size**-0.5, keys, values, began)
        xs += dense_out(features, axis=(1, 3), name="out")(attended)

        hidden = dense(4 * features, name="mlp_in")(LayerNorm(name="mlp_norm")(xs))
        return cache, xs + dense_out(features, name="mlp_out")(nn.gelu(hidden, approximate=True))


def rotate(x, first):
    """Rotate pairs of channels of x (..., T, d) by the times first, first + 1, ...

    Channels i and i + d / 2 are a pair, of frequency 10000^(-2 i / d).
    """
    times = first + np.arange(x.shape[-2])
    half = x.shape[-1] // 2
    # In NumPy, so that angles are exact for large times even if x is float32.
    angles = times[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos = jnp.asarray(np.cos(angles), x.dtype)
    sin = jnp.asarray(np.sin(angles), x.dtype)
    a = x[..., :half]
    b = x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
