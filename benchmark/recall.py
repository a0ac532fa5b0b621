"""How many updates every memory needs to learn two small tasks by supervised learning.

    recall    name the first symbol of the episode, at every step
    4-back    name the symbol of four steps ago

    python benchmark/recall.py                  # every cell, a minute or less each
    python benchmark/recall.py --cells gru s5

Inputs are sequences of 32 steps in batches of 32: four symbols and a bit that marks the start of an
episode, every 32 steps on average. The network is one layer of 64 features between a dense encoder
and a dense decoder. Adam learns at 3e-3, with gradients clipped to norm 1. A task is learned when
the accuracy over the last 20 updates is above 98 %. Every cell gets a file in benchmark/results.
"""

import argparse
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import results

from memory_cells import CELLS, MaskedRNN, make_cell
from memory_cells.parts.carry import episode_steps

STEPS = 32
BATCH = 32
FEATURES = 64
SYMBOLS = 4
BACK = 4
TASKS = ("recall", "4-back")
MOST = 1000  # updates


class Network(nn.Module):
    memory: MaskedRNN

    @nn.compact
    def __call__(self, xs, starts):
        xs = nn.Dense(FEATURES, kernel_init=nn.initializers.normal(1.0))(xs)
        _, ys = self.memory(self.memory.initialize_carry((BATCH, FEATURES)), xs, starts)
        return nn.Dense(SYMBOLS, kernel_init=nn.initializers.normal(FEATURES**-0.5))(ys)


def make_batch(task, key):
    """Inputs (T, B, 5), starts (T, B) and the symbols to name (T, B)."""
    symbol_key, start_key = jax.random.split(key)
    symbols = jax.random.randint(symbol_key, (STEPS, BATCH), 0, SYMBOLS)
    starts = (jax.random.uniform(start_key, (STEPS, BATCH)) < 1 / STEPS).at[0].set(True)
    steps = episode_steps(jnp.zeros(BATCH, int), starts)
    if task == "recall":
        targets = jnp.take_along_axis(symbols, jnp.arange(STEPS)[:, None] - steps, axis=0)
    else:  # before there was one, name symbol 0
        targets = jnp.where(steps >= BACK, jnp.roll(symbols, BACK, axis=0), 0)
    return (
        jnp.concatenate([jax.nn.one_hot(symbols, SYMBOLS), starts[..., None]], axis=-1),
        starts,
        targets,
    )


def learn(cell, task, most=MOST, **options):
    """Updates until the task is learned, None if it never is, and the accuracy of the last 20."""
    network = Network(MaskedRNN(make_cell(cell, FEATURES, **options)))
    key, init_key = jax.random.split(jax.random.key(0))
    params = network.init(init_key, *make_batch(task, init_key)[:2])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    opt_state = optimizer.init(params)

    def loss(params, batch):
        xs, starts, targets = batch
        logits = network.apply(params, xs, starts)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), (logits.argmax(axis=-1) == targets).mean()

    @jax.jit
    def update(params, opt_state, key):
        gradients, accuracy = jax.grad(loss, has_aux=True)(params, make_batch(task, key))
        changes, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, accuracy

    accuracies = []
    for updates in range(1, most + 1):
        params, opt_state, accuracy = update(params, opt_state, jax.random.fold_in(key, updates))
        accuracies.append(float(accuracy))
        if updates >= 20 and np.mean(accuracies[-20:]) > 0.98:
            return updates, np.mean(accuracies[-20:])
    return None, np.mean(accuracies[-20:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=[name for name in CELLS if name != "none"])
    args = parser.parse_args()
    print("| cell | recall | 4-back | seconds |\n|---|---|---|---|")
    for cell in args.cells:
        began = time.perf_counter()
        tasks = {task: as_result(*learn(cell, task, MOST)) for task in TASKS}
        seconds = time.perf_counter() - began
        words = [
            f"{task['updates']}" if task["learned"] else f"{task['accuracy']:.0%} at {MOST}"
            for task in tasks.values()
        ]
        print(f"| `{cell}` | {' | '.join(words)} | {seconds:.0f} |", flush=True)
        values = {"cell": cell, "tasks": tasks, "seconds": round(seconds, 1)}
        results.record(f"recall/{cell}", values, f"python benchmark/recall.py --cells {cell}")


def as_result(updates, accuracy):
    """What `learn` returns, as a result file has it."""
    learned = updates is not None
    return {
        "learned": learned,
        "updates": updates if learned else MOST,
        "accuracy": round(float(accuracy), 4),
    }


if __name__ == "__main__":
    main()
