"""Stable Hadamard memory (Le et al. 2024, arXiv 2410.10132).

A matrix whose entries are calibrated one by one at every step. With x layer-normalised and
m = `memory_size`:

    k = relu(W_k x) / (1e-5 + sum relu(W_k x)),  q likewise    key, query: weights of a mean, (m,)
    v = sigmoid(w_eta x) * W_v x                               value times write strength, (m,)
    C = 1 + tanh(theta_l (W_c x)^T)                            calibration in (0, 2), (m, m)
    M' = clip(C * M + v k^T)                                   C * M entry by entry
    y  = W_o (M' q) + b_o

theta_l is a random row of a learned table. Learning must see the same rows as acting did, so the
row depends on the number of the step in its episode, which the carry counts.

A product of many C is 1 in expectation only: mostly it is close to 0, and rarely it is huge. So are
M and the gradients. The clip bounds both: after 8192 equal inputs to a fresh cell, gradients are 1
with the clip and 1e27 without. It is not in the paper's equations, but the authors' code for
partially observed tasks clips at 100.

Carry: M (B, m, m), and the number of the episode's next step (B,), zeros.
Cost per step: m^2 hyperbolic tangents and about 12 m^2 other operations per environment.
Sequences: in chunks, each in a loop or in parallel (see `calibrated_memory`).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.carry import episode_steps, reset
from memory_cells.parts.checks import check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.linear_scan import linear_scan

CHUNK = 32  # steps; a product of that many C is at most 2^32, so the parallel form cannot overflow
COUNT_LIMIT = 2**20  # the count starts again here, before float32 runs out of integers


class SHM(SequenceCell):
    """Stable Hadamard memory; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      memory_size: m, the memory is an m x m matrix.
      num_theta: rows of the table of theta.
      clip: bound on the absolute values of the memory.
      impl: "auto", "scan" or "parallel"; see `calibrated_memory`.
    """

    memory_size: int = 32
    num_theta: int = 128
    clip: float = 100.0
    impl: str = "auto"

    def __post_init__(self):
        check_impl("shm", self.impl)
        for name in ("memory_size", "num_theta", "clip"):
            value = getattr(self, name)
            if value <= 0:
                raise ValueError(f"shm needs {name} to be greater than 0, got {value}")
        super().__post_init__()

    def setup(self):
        size = self.memory_size
        self.norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.key = Dense(size, use_bias=False)
        self.query = Dense(size, use_bias=False)
        self.value = Dense(size, use_bias=False)
        self.calibration = Dense(size, use_bias=False)
        self.strength = Dense(1, use_bias=False)
        theta_init = nn.initializers.xavier_uniform()
        self.theta = self.param("theta", theta_init, (self.num_theta, size))
        self.output = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        memory = jnp.zeros((*batch, self.memory_size, self.memory_size), jnp.float32)
        # The count is a float, so that the whole carry is differentiable.
        return memory, jnp.zeros(batch, jnp.float32)

    def sequence(self, carry, xs, starts):
        memory, count = carry
        steps = episode_steps(count, starts) % COUNT_LIMIT
        xs = self.norm(xs)
        inputs = (
            self.theta[random_rows(steps, self.num_theta)],
            self.calibration(xs),
            nn.sigmoid(self.strength(xs)) * self.value(xs),
            mean_weights(self.key(xs)),
            mean_weights(self.query(xs)),
        )
        memory, reads = calibrated_memory(memory, inputs, starts, self.clip, self.impl)
        count = (steps[-1] + 1) % COUNT_LIMIT
        return (memory, count), self.output(reads)


@partial(jax.jit, static_argnames="num_rows")  # by its name `harness/real.py` finds it
def random_rows(steps, num_rows):
    """A pseudo-random row in [0, num_rows) for each of the step numbers, always the same one."""

    def draw(step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return jax.random.randint(key, (), 0, num_rows)

    return jax.vmap(draw)(steps.astype(jnp.uint32).ravel()).reshape(steps.shape)


def mean_weights(x):
    x = nn.relu(x)
    return x / (1e-5 + x.sum(axis=-1, keepdims=True))


def calibrated_memory(memory, inputs, starts, clip, impl="auto"):
    """Write and read the memory over a sequence, with resets to zero.

    The gradient stores the memory before each chunk and recomputes those inside, which needs
    T / CHUNK + CHUNK matrices per environment. On a CPU this is faster than storing all of them.

    Args:
      memory: (B, m, m) before the first step.
      inputs: the tuple (theta, c, v, k, q), each (T, B, m).
      starts: (T, B) bool.
      clip: bound on the absolute values of the memory.
      impl: how to compute a chunk: "scan" in a loop, "parallel" with associative scans, "auto" the
        loop on a CPU, where it is 20 times faster, and the parallel form elsewhere.

    Returns:
      The memory after the last step, and reads (T, B, m).
    """
    if impl == "auto":
        impl = "scan" if jax.default_backend() == "cpu" else "parallel"
    if len(starts) == 1:  # acting: skip the overhead of a loop
        memory, read = step(clip, memory, jax.tree.map(lambda x: x[0], (inputs, starts)))
        return memory, read[None]
    num_chunks = -(-len(starts) // CHUNK)
    padding = -len(starts) % num_chunks

    def split(x):
        # Padding with zeros leaves the memory as it is: C = 1, and nothing is written.
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, -1, *x.shape[1:])

    chunk = partial(chunk_scan if impl == "scan" else chunk_parallel, clip)
    chunk = jax.checkpoint(chunk, prevent_cse=False)
    memory, reads = jax.lax.scan(chunk, memory, jax.tree.map(split, (inputs, starts)))
    return memory, reads.reshape(-1, *reads.shape[2:])[: len(starts)]


def chunk_scan(clip, memory, xs):
    return jax.lax.scan(jax.checkpoint(partial(step, clip), prevent_cse=False), memory, xs)


def step(clip, memory, x):
    (theta, c, v, k, q), start = x
    memory = reset(memory, jnp.zeros_like(memory), start)
    memory = (1.0 + jnp.tanh(outer(theta, c))) * memory + outer(v, k)
    memory = jnp.clip(memory, -clip, clip)
    return memory, jnp.einsum("bij,bj->bi", memory, q)


def chunk_parallel(clip, memory, xs):
    """Many steps at once.

    A new state is a constant where the clip acts, and linear in the old state elsewhere.
    """
    (theta, c, v, k, q), starts = xs
    a = 1.0 + jnp.tanh(outer(theta, c))
    b = outer(v, k)
    clipped = jax.lax.stop_gradient(clipped_scan(a, b, memory, starts, clip))
    is_linear = jnp.abs(clipped) < clip
    a = jnp.where(is_linear, a, 0.0)
    b = jnp.where(is_linear, b, clipped)
    memories = linear_scan(a, b, memory, starts, 0.0, "parallel")
    return memories[-1], jnp.einsum("tbij,tbj->tbi", memories, q)


def clipped_scan(a, b, state, starts, clip):
    """All states of s_t = clip(a_t s_(t-1) + b_t) for a_t >= 0, with resets to zero.

    A step maps s to clip(a s + b, low, high). Two such maps in a row are one of the same kind, so
    an associative scan computes all states.
    """
    started = jnp.cumsum(starts, axis=0)[..., None, None] > 0
    a = jnp.where(starts[..., None, None], 0.0, a)  # a start forgets

    def then(first, second):
        a_1, b_1, low_1, high_1 = first
        a_2, b_2, low_2, high_2 = second

        # Selects instead of multiplying: 0 * nan is nan, but a nan must end with its episode.
        def times_a_2(s):
            return jnp.where(a_2 == 0, 0.0, a_2 * s)

        low = jnp.clip(times_a_2(low_1) + b_2, low_2, high_2)
        high = jnp.clip(times_a_2(high_1) + b_2, low_2, high_2)
        return times_a_2(a_1), times_a_2(b_1) + b_2, low, high

    steps = a, b, jnp.full_like(a, -clip), jnp.full_like(a, clip)
    a, b, low, high = jax.lax.associative_scan(then, steps)
    return jnp.clip(a * jnp.where(started, 0.0, state) + b, low, high)


def outer(x, y):
    return x[..., :, None] * y[..., None, :]
