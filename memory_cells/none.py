"""No memory: the feed-forward control, which shows whether a task needs a memory.

    y = tanh(W x + b)

In a recurrent script it replaces the memory and nothing else. The previous action is a memory, too:
an agent that reads it can leave itself a note. The control without any memory is
`--cell none --no-prev-action`.

Carry: (), nothing.
Cost per step: 2 D H floating-point operations per environment.
Sequences: all steps at once.
"""

import flax.linen as nn
import jax.numpy as jnp

from memory_cells.masked_rnn import MemoryCell
from memory_cells.parts.dense import Dense


class NoMemory(MemoryCell):
    """A dense layer behind the interface of a memory; see the module's docstring.

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
