"""A dense layer that treats all steps and environments as the rows of one matrix."""

import flax.linen as nn


class Dense(nn.Dense):
    """Flax's dense layer, (..., D) -> (..., features), computed on inputs of shape (rows, D).

    The numbers are the same, but the gradient of the kernel is faster. Given inputs (T, B, D), XLA
    transposes them first, which takes half of the layer's time on a CPU. Given (T * B, D), it does
    not.
    """

    def __call__(self, inputs):
        outputs = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return outputs.reshape(*inputs.shape[:-1], self.features)
