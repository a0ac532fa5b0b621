"""Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), in the form of PyTorch, cuDNN and Flax.

    r  = sigmoid(W_r x + b_r + U_r h)                 reset gate
    z  = sigmoid(W_z x + b_z + U_z h)                 retain gate: z = 1 keeps the old state
    n  = tanh(W_n x + b_n + r * (U_n h + c_n))        candidate
    h' = (1 - z) * n + z * h,   y = h'

Cho et al. apply r before U_n (their equation 8). Here r is applied after U_n, so that one product
computes the recurrent half of all gates.

Carry: h (B, H), zeros.
Cost per step: 6 H (D + H) floating-point operations per environment.
Sequences: in a loop.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import MemoryCell
from memory_cells.parts.dense import Dense
from memory_cells.parts.recurrent_scan import recurrent_scan


class GRU(MemoryCell):
    """Gated recurrent unit; see the module's docstring.

    Attributes:
      features: H, the size of the state and of the output.
      retain_bias: initial b_z; with 1, a fresh cell forgets more slowly.
      learned_carry: learn the h that an episode starts with.
    """

    retain_bias: float = 0.0
    learned_carry: bool = False

    def setup(self):
        self.input_r = Dense(self.features)
        self.input_z = Dense(self.features, bias_init=nn.initializers.constant(self.retain_bias))
        self.input_n = Dense(self.features)
        orthogonal = nn.initializers.orthogonal()
        zeros = nn.initializers.zeros
        shape = (self.features, self.features)
        self.hidden = {name: self.param(f"hidden_{name}", orthogonal, shape) for name in "rzn"}
        self.hidden_bias = self.param("hidden_bias_n", zeros, (self.features,))
        if self.learned_carry:
            self.initial_offset = self.param("initial_h", zeros, (self.features,))

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features), jnp.float32)

    def __call__(self, carry, x):
        return step(carry, self._inputs(x), project(self._params(), carry))

    def sequence(self, carry, xs, starts):
        initial = self.initial_carry_like(xs)
        params = self._params()
        inputs = self._inputs(xs)
        return recurrent_scan(project, step, params, carry, inputs, starts, initial)

    def _inputs(self, xs):
        return self.input_r(xs), self.input_z(xs), self.input_n(xs)

    def _params(self):
        return self.hidden["r"], self.hidden["z"], self.hidden["n"], self.hidden_bias


def project(params, h):
    """The recurrent half of the gates: U_r h, U_z h and U_n h + c_n, each (B, H)."""
    u_r, u_z, u_n, c_n = params
    return h @ u_r, h @ u_z, h @ u_n + c_n


def step(h, x, u):
    """One step, from the input half `x` and the recurrent half `u` of the gates.

    Returns:
      h', as the carry and as the output.
    """
    r = nn.sigmoid(x[0] + u[0])
    z = nn.sigmoid(x[1] + u[1])
    n = jnp.tanh(x[2] + r * u[2])
    h = (1.0 - z) * n + z * h
    return h, h
