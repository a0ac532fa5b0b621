"""Time of the training pass of a memory: `recurrent_scan` beside differentiating a plain scan.

    python benchmark/recurrent_scan.py

Forward and backward pass over T = 128 steps, D = H = 128, with resets. Times are milliseconds,
medians of repetitions in turn.
"""

import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells import make_cell
from memory_cells.masked_rnn import MemoryCell, scan_steps

T = 128
D = 128
H = 128
REPEATS = 20


class FlaxGRU(MemoryCell):
    """flax's own GRU cell behind the same interface: plain scan, plain autodiff."""

    def setup(self):
        self.cell = nn.GRUCell(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.features))

    def __call__(self, carry, x):
        return self.cell(carry, x)


def training_pass(cell, batch, plain):
    key = jax.random.key(0)
    xs = jax.random.normal(key, (T, batch, D))
    starts = jax.random.bernoulli(key, 0.02, (T, batch))
    carry = cell.initialize_carry(key, (batch, D))
    params = cell.init(key, carry, xs[0])
    sequence = nn.apply(lambda c, *args: scan_steps(c, *args) if plain else c.sequence(*args), cell)

    @jax.jit
    def gradient(params, xs):
        return jax.grad(
            lambda params, xs: (sequence(params, carry, xs, starts)[1] ** 2).mean(), argnums=(0, 1)
        )(params, xs)

    return lambda: jax.block_until_ready(gradient(params, xs))


def main():
    print(f"{'cell':<10}{'B':>5}{'plain scan':>14}{'recurrent_scan':>16}{'ratio':>8}")
    for batch in (4, 16, 64):
        systems = {name: make_cell(name, H) for name in ("gru", "lstm", "slstm")}
        for name, cell in systems.items():
            passes = {
                "plain": training_pass(cell, batch, True),
                "fast": training_pass(cell, batch, False),
            }
            if name == "gru":
                passes["flax"] = training_pass(FlaxGRU(H), batch, True)
            times = {system: [] for system in passes}
            for repeat in range(REPEATS + 1):
                for system, run in passes.items():
                    start = time.perf_counter()
                    run()
                    if repeat:
                        times[system].append(1e3 * (time.perf_counter() - start))
            median = {system: statistics.median(values) for system, values in times.items()}
            for system, label in (("plain", name), ("flax", "flax gru")):
                if system in median:
                    slow = median[system]
                    fast = median["fast"]
                    print(f"{label:<10}{batch:>5}{slow:>14.1f}{fast:>16.1f}{slow / fast:>8.2f}")


if __name__ == "__main__":
    main()
