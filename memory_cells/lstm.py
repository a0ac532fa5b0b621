"""Long short-term memory (Hochreiter & Schmidhuber 1997), with the forget gate of Gers et al. 2000.

    i, f, o = sigmoid(W x + U h + b)                  input, forget and output gate
    g       = tanh(W_g x + U_g h + b_g)               candidate
    c' = f * c + i * g
    h' = o * tanh(c'),   y = h'

The forget bias starts at 1 (Jozefowicz et al. 2015, section 5). With 0, half of the memory is gone
after one step.

Carry: (c, h), each (B, H), zeros. The order is Flax's; PyTorch's is (h, c).
Cost per step: 8 H (D + H) floating-point operations per environment.
Sequences: in a loop.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import MemoryCell
from memory_cells.parts.dense import Dense
from memory_cells.parts.recurrent_scan import recurrent_scan


class LSTM(MemoryCell):
    """Long short-term memory; see the module's docstring.

    Attributes:
      features: H, the size of the state and of the output.
      forget_bias: initial b_f.
      learned_carry: learn the c and h that an episode starts with.
    """

    forget_bias: float = 1.0
    learned_carry: bool = False

    def setup(self):
        self.input_i = Dense(self.features)
        self.input_f = Dense(self.features, bias_init=nn.initializers.constant(self.forget_bias))
        self.input_g = Dense(self.features)
        self.input_o = Dense(self.features)
        orthogonal = nn.initializers.orthogonal()
        shape = (self.features, self.features)
        self.hidden = {name: self.param(f"hidden_{name}", orthogonal, shape) for name in "ifgo"}
        if self.learned_carry:
            zeros = nn.initializers.zeros
            c = self.param("initial_c", zeros, (self.features,))
            h = self.param("initial_h", zeros, (self.features,))
            self.initial_offset = (c, h)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], self.features), jnp.float32)
        return zeros, zeros

    def __call__(self, carry, x):
        return step(carry, self._inputs(x), project(self._params(), carry))

    def sequence(self, carry, xs, starts):
        initial = self.initial_carry_like(xs)
        params = self._params()
        inputs = self._inputs(xs)
        return recurrent_scan(project, step, params, carry, inputs, starts, initial)

    def _inputs(self, xs):
        return self.input_i(xs), self.input_f(xs), self.input_g(xs), self.input_o(xs)

    def _params(self):
        return tuple(self.hidden[name] for name in "ifgo")


def project(params, carry):
    """The recurrent half of the gates: U h for i, f, g and o, each (B, H)."""
    _, h = carry
    return tuple(h @ u for u in params)


def step(carry, x, u):
    """One step, from the input half `x` and the recurrent half `u` of the gates."""
    c, _ = carry
    i = nn.sigmoid(x[0] + u[0])
    f = nn.sigmoid(x[1] + u[1])
    g = jnp.tanh(x[2] + u[2])
    o = nn.sigmoid(x[3] + u[3])
    c = f * c + i * g
    h = o * jnp.tanh(c)
    return (c, h), h
