"""A dense layer that multiplies all steps and environments as the rows of one matrix."""

import flax.linen as nn


class Dense(nn.Dense):
    """flax's dense layer, (..., D) -> (..., features), with two axes inside.

    The numbers are the same, but the gradient of the kernel over inputs (T, B, D) is not: there XLA first transposes
    them (on CPU half of the layer's time), and does not for inputs (T * B, D).
    """

    def __call__(self, inputs):
        outputs = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.reshape(*inputs.shape[:-1], self.features)
