"""Gated linear unit (Dauphin et al. 2017, arXiv 1612.08083) behind a GELU.

    u = gelu(x),   y = (W u + b) * sigmoid(V u + c)

The official S5 and LRU layers end with it: a linear recurrence alone cannot decide when to output
what.
"""

import flax.linen as nn

from memory_cells.parts.dense import Dense


class GatedLinearUnit(nn.Module):
    """(..., D) -> (..., features); see the module's docstring."""

    features: int

    @nn.compact
    def __call__(self, x):
        u = nn.gelu(x)
        value = Dense(self.features, name="value")(u)
        gate = nn.sigmoid(Dense(self.features, name="gate")(u))
        return value * gate
