"""Fast and forgetful memory (Morad et al. 2023, arXiv 2310.04128), as in the authors' PyTorch code.

    u  = (W_u x + b_u) * sigmoid(W_i x + b_i)    what is written, m numbers
    S' = exp(a + i b) * S + u                    complex (m, c); m decay rates a, c frequencies b
    z  = W_s [Re S', Im S'] + b_s
    g  = sigmoid(W_g x + b_g)
    y  = g * norm(z) + (1 - g) * (W_t x + b_t)   layer normalisation without parameters

Each u is written to c oscillators, whose phases tell its age, under its own decay rate. The rates
start evenly spaced: the fastest has a half life of one step, the slowest keeps 1 % after max_period
steps. These are the numbers of the authors' code, which computes them from the range of float64.

The periods start evenly spaced on a logarithmic scale: 2, 16, 128 and 1024. The authors' are 1,
342, 683 and 1024 (spacing="linear", min_period=1). But on whole steps a period of 1 tells nothing,
and the others do not resolve a few steps: in the task 4-back of benchmark/recall.py, four seeds
need more than 850 updates with them, and 91 to 101 with those here.

Carry: S (B, m, c) complex64, zeros.
Cost per step: 4 D (m + H) + 4 m c H floating-point operations per environment.
Sequences: in a loop or in parallel (see `parts/linear_scan.py`).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.linear_scan import linear_scan


class FFM(SequenceCell):
    """Fast and forgetful memory; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      memory_size: m, the number of decay rates and of inputs to the memory.
      context_size: c, the number of frequencies.
      min_period: shortest initial period, in steps.
      max_period: longest initial period, in steps.
      spacing: how the periods between them are spaced, "linear" or "log".
      impl: "auto", "scan" or "parallel"; see `parts/linear_scan.py`.
      learned_carry: learn the memory that an episode starts with.
    """

    memory_size: int = 32
    context_size: int = 4
    min_period: float = 2.0
    max_period: float = 1024.0
    spacing: str = "log"
    impl: str = "auto"
    learned_carry: bool = False

    def __post_init__(self):
        check_impl("ffm", self.impl)
        if self.memory_size < 1 or self.context_size < 1:
            raise ValueError(
                "ffm needs memory_size and context_size of at least 1, "
                f"got {self.memory_size} and {self.context_size}"
            )
        if not 0 < self.min_period <= self.max_period:
            raise ValueError(
                "ffm needs 0 < min_period <= max_period, "
                f"got {self.min_period} and {self.max_period}"
            )
        if self.spacing not in ("linear", "log"):
            raise ValueError(f"ffm needs spacing to be linear or log, got {self.spacing!r}")
        super().__post_init__()

    def setup(self):
        self.input = Dense(self.memory_size)
        self.input_gate = Dense(self.memory_size)
        self.through = Dense(self.features)
        self.output_gate = Dense(self.features)
        self.mix = Dense(self.features)
        self.normalise = nn.LayerNorm(
            epsilon=1e-5, use_bias=False, use_scale=False, use_fast_variance=False
        )
        self.a = self.param("a", self._a_init)
        self.b = self.param("b", self._b_init)
        if self.learned_carry:
            shape = (2, self.memory_size, self.context_size)
            pair = self.param("initial_memory", nn.initializers.zeros, shape)
            self.initial_offset = jax.lax.complex(*pair)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        shape = (*input_shape[:-1], self.memory_size, self.context_size)
        return jnp.zeros(shape, jnp.complex64)

    def sequence(self, carry, xs, starts):
        us = self.input(xs) * nn.sigmoid(self.input_gate(xs))
        rates = jnp.minimum(self.a, -1e-8)  # a positive rate would explode
        decay = jnp.exp(jax.lax.complex(*jnp.broadcast_arrays(rates[:, None], self.b)))
        inputs = jnp.broadcast_to(us[..., None], (*us.shape, self.context_size))
        inputs = inputs.astype(decay.dtype)
        initial = self.initial_carry_like(xs)
        states = linear_scan(decay, inputs, carry, starts, initial, self.impl)
        flat = states.reshape(*us.shape[:-1], -1)
        zs = self.mix(jnp.concatenate([flat.real, flat.imag], axis=-1))
        gates = nn.sigmoid(self.output_gate(xs))
        ys = gates * self.normalise(zs) + (1.0 - gates) * self.through(xs)
        return states[-1], ys

    @nn.nowrap
    def _a_init(self, key):
        fastest = -math.log(2) + 0.02
        slowest = math.log(0.01) / self.max_period
        return jnp.linspace(fastest, max(fastest, slowest), self.memory_size)

    @nn.nowrap
    def _b_init(self, key):
        space = jnp.linspace if self.spacing == "linear" else jnp.geomspace
        return 2 * jnp.pi / space(self.min_period, self.max_period, self.context_size)
