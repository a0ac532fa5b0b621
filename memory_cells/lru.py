"""Linear recurrent unit (Orvieto et al. 2023, arXiv 2303.06349, sections 3.2 to 3.4).

    u  = norm(x)                                      layer normalisation
    lambda = exp(-exp(nu) + i exp(theta))             |lambda| < 1 for any parameters
    h' = lambda * h + exp(gamma) * (B u)              complex, diagonal
    s  = Re(C h') + d * u
    y  = (W v + b) * sigmoid(V v + c),  v = gelu(s)   gated linear unit

This is the block of the paper's deep networks without its residual connection. The nonlinear
functions at both ends let the cell remember selectively: the recurrence itself treats all inputs
alike. B and C are complex matrices, stored as pairs of real ones.

gamma starts at log sqrt(1 - |lambda|^2), which gives states of unit size for white noise, and is
learned. lambda starts uniformly on the ring r_min <= |lambda| <= r_max with phases up to max_phase.
The paper starts from r_min = 0, r_max = 1 and phases up to 2 pi. The defaults here are half lives
of 7 to 700 steps, and phases up to pi: only real parts are read, for which a phase and its negative
are the same.

Carry: h (B, N) complex64, zeros.
Cost per step: 8 H N + 4 H^2 floating-point operations per environment.
Sequences: in a loop or in parallel (see `parts/linear_scan.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_impl, check_ring
from memory_cells.parts.dense import Dense
from memory_cells.parts.gated_linear_unit import GatedLinearUnit
from memory_cells.parts.initializers import log_phase_init, log_rate_init
from memory_cells.parts.linear_scan import linear_scan


class LRU(SequenceCell):
    """Linear recurrent unit; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      state_size: N, the number of complex states; 0 takes `features`.
      r_min: smallest initial |lambda|.
      r_max: largest initial |lambda|.
      max_phase: largest initial phase of lambda, in radians per step.
      norm: normalise the input; without it, u = x.
      glu: end with the gated linear unit; without it, y = s.
      impl: "auto", "scan" or "parallel"; see `parts/linear_scan.py`.
      learned_carry: learn the h that an episode starts with.
    """

    state_size: int = 0
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 3.14
    norm: bool = True
    glu: bool = True
    impl: str = "auto"
    learned_carry: bool = False

    def __post_init__(self):
        check_impl("lru", self.impl)
        if self.state_size < 0:
            raise ValueError(f"lru needs state_size to be 0 or more, got {self.state_size}")
        check_ring("lru", self.r_min, self.r_max, self.max_phase)
        super().__post_init__()

    def setup(self):
        features = self.features
        states = self.state_size or features
        self.embed = Dense(features)
        self.normalise = nn.LayerNorm(use_fast_variance=False)
        self.nu = self.param("nu", log_rate_init(self.r_min, self.r_max), (states,))
        self.theta = self.param("theta", log_phase_init(self.max_phase), (states,))
        self.gamma = self.param("gamma", self._gamma_init)
        B_init = nn.initializers.normal((2 * features) ** -0.5)
        C_init = nn.initializers.normal(states**-0.5)
        self.B = self.param("B", B_init, (2, features, states))  # real and imaginary part
        self.C = self.param("C", C_init, (2, states, features))
        self.d = self.param("d", nn.initializers.normal(1.0), (features,))
        self.output = GatedLinearUnit(features)
        if self.learned_carry:
            pair = self.param("initial_h", nn.initializers.zeros, (2, states))
            self.initial_offset = jax.lax.complex(*pair)

    @nn.nowrap
    def _gamma_init(self, key):
        """log sqrt(1 - |lambda|^2)."""
        return 0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(self.nu)))

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        shape = (*input_shape[:-1], self.state_size or self.features)
        return jnp.zeros(shape, jnp.complex64)

    def sequence(self, carry, xs, starts):
        if xs.shape[-1] != self.features:  # d * u needs as many inputs as features
            xs = self.embed(xs)
        if self.norm:
            xs = self.normalise(xs)
        decay = jnp.exp(jax.lax.complex(-jnp.exp(self.nu), jnp.exp(self.theta)))
        inputs = jnp.exp(self.gamma) * jax.lax.complex(xs @ self.B[0], xs @ self.B[1])
        initial = self.initial_carry_like(xs)
        hs = linear_scan(decay, inputs, carry, starts, initial, self.impl)
        ys = hs.real @ self.C[0] - hs.imag @ self.C[1] + self.d * xs
        return hs[-1], self.output(ys) if self.glu else ys
