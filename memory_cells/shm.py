"""Stable Hadamard memory (Le et al. 2024, arXiv 2410.10132): a matrix whose every entry is calibrated at every step.

With x layer-normalised and m = `memory_size`:

    k = relu(W_k x) / (1e-5 + sum relu(W_k x)),  q likewise     key and query: weights of a mean, (m,)
    v = sigmoid(w_eta x) * W_v x                                value times write strength, (m,)
    C = 1 + tanh(theta_l (W_c x)^T)                             calibration, (m, m), in (0, 2)
    M' = clip(C * M + v k^T)                                    C * M entry by entry
    y  = W_o (M' q) + b_o

theta_l is a random row of a learned table. What is random must come out the same when acting and when learning, so the
row is drawn by the number of the episode's step, which the carry counts.
A product of many C is 1 in expectation only: it is close to 0 most of the time and rarely huge, and so are M and the
gradients. The clip, at 100 in the authors' code for partially observed tasks and not in the paper's equations, bounds
both (8192 equal inputs to a fresh cell: gradients of 1 with the clip, of 1e27 without).
Carry: M (B, m, m) and the episode's step (B,), both zeros. Cost per step: m^2 hyperbolic tangents and a dozen m^2
operations per environment. Sequences: see `calibrated_memory`.
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

CHUNK = 32  # steps; a product of as many C is at most 2^32: no overflow in the parallel form
COUNT_LIMIT = 2**20  # where the count begins again, before float32 runs out of integers


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
            if getattr(self, name) <= 0:
                raise ValueError(f"shm needs {name} to be greater than 0, got {getattr(self, name)}")
        super().__post_init__()

    def setup(self):
        size = self.memory_size
        self.norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
        self.key, self.query, self.value, self.calibration = (Dense(size, use_bias=False) for _ in range(4))
        self.strength = Dense(1, use_bias=False)
        self.theta = self.param("theta", nn.initializers.xavier_uniform(), (self.num_theta, size))
        self.output = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        batch = input_shape[:-1]
        # The count is a float: every number of a carry can then be differentiated, selected and saved like the others.
        return jnp.zeros((*batch, self.memory_size, self.memory_size)), jnp.zeros(batch)

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
        return (memory, (steps[-1] + 1) % COUNT_LIMIT), self.output(reads)


def random_rows(steps, num_rows):
    """For each of the step numbers a row in [0, num_rows): as good as random, always the same."""
    draw = lambda step: jax.random.randint(jax.random.fold_in(jax.random.key(0), step), (), 0, num_rows)  # noqa: E731
    return jax.vmap(draw)(steps.astype(jnp.uint32).ravel()).reshape(steps.shape)


def mean_weights(x):
    x = nn.relu(x)
    return x / (1e-5 + x.sum(axis=-1, keepdims=True))


def calibrated_memory(memory, inputs, starts, clip, impl="auto"):
    """Write and read the memory over a sequence, with resets to zero.

    The gradient keeps the memory before each chunk and computes those inside a second time: T / CHUNK + CHUNK matrices
    per environment, and on a CPU faster than to keep them all.

    Args:
      memory: (B, m, m) before the first step.
      inputs: theta, c, v, k, q of (T, B, m) each.
      starts: (T, B) bool.
      clip: bound on the absolute values of the memory.
      impl: how to go through a chunk: "scan" in a loop, "parallel" by associative scans, "auto" the loop on a CPU (it
        is 20 times faster there) and otherwise the parallel form.

    Returns:
      The memory after the last step, and reads (T, B, m).
    """
    if impl == "auto":
        impl = "scan" if jax.default_backend() == "cpu" else "parallel"
    if len(starts) == 1:  # acting: a loop of one step would only cost its overhead
        memory, read = step(clip, memory, jax.tree.map(lambda x: x[0], (inputs, starts)))
        return memory, read[None]
    num_chunks = -(-len(starts) // CHUNK)
    padding = -len(starts) % num_chunks

    def split(x):  # zeros calibrate with C = 1 and write nothing: padding leaves the memory as it is
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, -1, *x.shape[1:])

    chunk = jax.checkpoint(partial(chunk_scan if impl == "scan" else chunk_parallel, clip), prevent_cse=False)
    memory, reads = jax.lax.scan(chunk, memory, jax.tree.map(split, (inputs, starts)))
    return memory, reads.reshape(-1, *reads.shape[2:])[: len(starts)]


def chunk_scan(clip, memory, xs):
    return jax.lax.scan(jax.checkpoint(partial(step, clip), prevent_cse=False), memory, xs)


def step(clip, memory, x):
    (theta, c, v, k, q), start = x
    memory = reset(memory, jnp.zeros_like(memory), start)
    memory = jnp.clip((1.0 + jnp.tanh(outer(theta, c))) * memory + outer(v, k), -clip, clip)
    return memory, jnp.einsum("bij,bj->bi", memory, q)


def chunk_parallel(clip, memory, xs):
    """Many steps at once: where the clip acts the new state is a constant, and else linear in the old one."""
    (theta, c, v, k, q), starts = xs
    a, b = 1.0 + jnp.tanh(outer(theta, c)), outer(v, k)
    clipped = jax.lax.stop_gradient(clipped_scan(a, b, memory, starts, clip))
    is_linear = jnp.abs(clipped) < clip
    a, b = jnp.where(is_linear, a, 0.0), jnp.where(is_linear, b, clipped)
    memories = linear_scan(a, b, memory, starts, 0.0, "parallel")
    return memories[-1], jnp.einsum("tbij,tbj->tbi", memories, q)


def clipped_scan(a, b, state, starts, clip):
    """All states of s_t = clip(a_t s_(t-1) + b_t) for a_t >= 0, with resets to zero.

    A step maps s to clip(a s + b, low, high), and two such maps after one another are one of the same kind: hence an
    associative scan.
    """
    started = jnp.cumsum(starts, axis=0)[..., None, None] > 0
    a = jnp.where(starts[..., None, None], 0.0, a)  # a start forgets

    def then(first, second):
        a_1, b_1, low_1, high_1 = first
        a_2, b_2, low_2, high_2 = second
        # Selected: zero times inf or nan is nan, and a broken episode must not outlive its end.
        times = lambda s: jnp.where(a_2 == 0, 0.0, a_2 * s)  # noqa: E731
        low, high = (jnp.clip(times(bound) + b_2, low_2, high_2) for bound in (low_1, high_1))
        return times(a_1), times(b_1) + b_2, low, high

    steps = a, b, jnp.full_like(a, -clip), jnp.full_like(a, clip)
    a, b, low, high = jax.lax.associative_scan(then, steps)
    return jnp.clip(a * jnp.where(started, 0.0, state) + b, low, high)


def outer(x, y):
    return x[..., :, None] * y[..., None, :]
