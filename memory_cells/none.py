"""No memory: the feed-forward control that tells whether a task needs one.

    y = tanh(W x + b)

Carry: (), nothing. Give it to a recurrent script and everything but the memory stays the same.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import MemoryCell
from memory_cells.parts.dense import Dense


class NoMemory(MemoryCell):
    """A dense layer behind the memory's interface; see the module's docstring.

    Attributes:
      features: H, the size of the output.
    """

    def setup(self):
        self.dense = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return ()

    def __call__(self, carry, x):
        return carry, jnp.tanh(self.dense(x))

    def sequence(self, carry, xs, starts):
        return self(carry, xs)
