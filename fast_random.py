"""JAX's random numbers, the same ones, drawn faster on CPUs. To import this is enough, and `envs` does.

The bits come from a hash of key and counter, Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"). On CPUs JAX writes the rounds as a loop, whose turns XLA starts one by one. Written out
they are one operation, which alone would be worse: XLA would repeat it in everything that reads the bits, and compile
for minutes. The barrier at the end forbids that.
"""

import jax
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.interpreters import mlir

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry_2x32(key1, key2, x1, x2):
    """Two words of key and two of counter, uint32 of one shape, to two words of random bits of that shape."""
    keys = (key1, key2, key1 ^ key2 ^ np.uint32(0x1BD11BDA))
    x1, x2 = x1 + keys[0], x2 + keys[1]
    for i in range(5):
        for bits in ROTATIONS[i % 2]:
            x1 = x1 + x2
            x2 = x1 ^ ((x2 << np.uint32(bits)) | (x2 >> np.uint32(32 - bits)))
        x1, x2 = x1 + keys[(i + 1) % 3], x2 + keys[(i + 2) % 3] + np.uint32(i + 1)
    return jax.lax.optimization_barrier((x1, x2))


mlir.register_lowering(threefry2x32_p, mlir.lower_fun(threefry_2x32, multiple_results=True), platform="cpu")
