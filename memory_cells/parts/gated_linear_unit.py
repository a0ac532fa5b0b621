"""Gated linear unit (Dauphin et al. 2017, arXiv 1612.08083) behind a GELU: what linear recurrences end with.

    u = gelu(x),   y = (W u + b) * sigmoid(V u + c)

A linear recurrence alone cannot decide what to put out when; the official S5 and LRU layers both end with this.
"""

import flax.linen as nn

from memory_cells.parts.dense import Dense


class GatedLinearUnit(nn.Module):
    """(..., D) -> (..., features); see the module's docstring."""

    features: int

    @nn.compact
    def __call__(self, x):
        u = nn.gelu(x)
        return Dense(self.features, name="value")(u) * nn.sigmoid(Dense(self.features, name="gate")(u))
