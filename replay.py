"""Replay buffers for off-policy learning, of single steps and of sequences, made of flashbax's.

    replay = ItemReplay(buffer_size, batch_size)
    buffer = replay.init(transition)                   # of N environments: leaves (N, ...)
    buffer = replay.add(buffer, transitions)           # T steps of N environments: (T, N, ...)
    batch = replay.sample(buffer, key)

    replay = SequenceReplay(num_envs, num_steps, buffer_size, batch_size, length)
    buffer = replay.init(carry, transition)            # of N environments: (N, ...)
    buffer = replay.add(buffer, carry, transitions)    # the carry before T steps, and the steps
    carry, batch, weight, indices = replay.sample(buffer, key)

A row of SequenceReplay's buffer is a chunk: the T steps that an environment makes between two
updates, and the carry that its memory had before them. A sampled sequence consists of as many
consecutive chunks of one environment as hold `length` steps.
  - It begins with a chunk, where the carry is known. Two sequences may overlap, by multiples of T.
  - It never runs from the newest chunk on to the oldest.
  - Episodes may begin and end within it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flashbax as fbx
import jax
import jax.numpy as jnp


def add_in_place(replay, buffer, items):
    """flashbax's `replay.add`, compiled so that it writes into the buffer instead of copying it.

    Without the barrier XLA would merge the writing with the reading of the next sample, and copy
    the whole buffer for that.
    """
    return jax.lax.optimization_barrier(replay.add(buffer, items))


# --- Single steps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemReplay:
    """Replay of single items: pure functions of a buffer's state."""

    buffer_size: int  # items
    batch_size: int

    @property
    def _buffer(self):
        return fbx.make_item_buffer(
            max_length=self.buffer_size,
            min_length=1,
            sample_batch_size=self.batch_size,
            add_sequences=True,
            add_batches=True,
        )

    def init(self, items):
        """An empty buffer for items with the shapes and dtypes of these, leaves (N, ...)."""
        return self._buffer.init(jax.tree.map(lambda x: x[0], items))

    def add(self, buffer, items):
        """The buffer with T steps of N environments added: items (T, N, ...)."""
        return add_in_place(self._buffer, buffer, items)

    def sample(self, buffer, key):
        """A minibatch (batch_size, ...), drawn with replacement; the buffer must not be empty.

        All n items are equally likely, up to a relative difference of n / 2^32. flashbax's own
        `sample` draws twice as many random bits; SAC trains 1.07 times as fast with this one.
        """
        size = jnp.where(buffer.is_full, self.buffer_size, buffer.current_index).astype(jnp.uint32)
        rows = jax.random.bits(key, (self.batch_size,), jnp.uint32) % size
        return jax.tree.map(lambda x: x[0, rows], buffer.experience)


# --- Sequences -----------------------------------------------------------------------------------


class Transition(NamedTuple):
    """A step of an environment, from obs[t] to next_obs[t], as the buffer stores it."""

    inputs: Any  # what the memory reads: obs[t], action[t - 1], reward[t - 1], as fields obs, ...
    start: jax.Array  # bool, obs[t] is the first of an episode: the memory is reset before it
    action: jax.Array  # action[t]
    reward: jax.Array  # float32, reward[t]
    next_obs: jax.Array  # the true next observation, not the one after an auto-reset
    terminated: jax.Array  # bool, the task is over at next_obs, which is worth nothing
    done: jax.Array  # bool, terminated or truncated: obs[t + 1] begins another episode


class Chunk(NamedTuple):
    """A row of the buffer."""

    carry: Any  # the memory before the first step
    steps: Transition  # (T, ...)


class Sequence(NamedTuple):
    """Observations in the order they were seen, rows (length + 1, B); `as_seen` draws an example.

    Each row is a step or final. The step of row t leads to the observation of row t + 1, always.
    The last row is only there for the row before it: what follows it is not in the sequence.
    """

    inputs: Any
    start: jax.Array
    action: jax.Array
    reward: jax.Array
    terminated: jax.Array
    final: jax.Array  # bool, no step begins in this row; action, reward and terminated mean nothing


class Sample(NamedTuple):
    """A minibatch of B sequences."""

    carry: Any  # (B, ...), the memory before the first row
    batch: Sequence  # (length + 1, B, ...)
    weight: jax.Array  # (B,) float32, corrects for prioritized sampling; 1 without it
    indices: Any  # for set_priorities; None without it


@dataclass(frozen=True)
class SequenceReplay:
    """Replay of sequences: pure functions of a buffer's state."""

    num_envs: int  # N
    num_steps: int  # T, steps of a chunk
    buffer_size: int  # steps of all environments together
    batch_size: int  # B, sequences
    length: int  # steps of a sequence
    prioritized: bool = False

    @property
    def _chunks(self):
        """Chunks of a sequence, rounded up."""
        return -(-self.length // self.num_steps)

    @property
    def _buffer(self):
        if self.prioritized:
            make = fbx.make_prioritised_trajectory_buffer
        else:
            make = fbx.make_trajectory_buffer
        return make(
            add_batch_size=self.num_envs,
            sample_batch_size=self.batch_size,
            sample_sequence_length=self._chunks,
            period=1,
            min_length_time_axis=self._chunks,
            max_length_time_axis=self.buffer_size // (self.num_envs * self.num_steps),
        )

    def init(self, carry, transition: Transition):
        """An empty buffer for carries and transitions (N, ...) with these shapes and dtypes."""

        def repeat(x):
            return jnp.broadcast_to(x[0], (self.num_steps, *x.shape[1:]))

        steps = jax.tree.map(repeat, transition)
        return self._buffer.init(Chunk(jax.tree.map(lambda x: x[0], carry), steps))

    def add(self, buffer, carry, transitions: Transition):
        """The buffer with one more chunk of every environment.

        Args:
          carry: the memories before the chunk, (N, ...).
          transitions: its steps, (T, N, ...).
        """
        chunk = Chunk(carry, jax.tree.map(lambda x: x.swapaxes(0, 1), transitions))
        return add_in_place(self._buffer, buffer, jax.tree.map(lambda x: x[:, None], chunk))

    def sample(self, buffer, key) -> Sample:
        """A minibatch; the buffer must hold `length` steps of every environment.

        With `prioritized`, weights are those of importance sampling with the exponent 0.6 of R2D2
        (Kapturowski et al. 2019), divided by the greatest of the minibatch.
        """
        sample = self._buffer.sample(buffer, key)
        weight = jnp.ones(self.batch_size)
        indices = None
        if self.prioritized:
            weight = sample.probabilities**-0.6
            indices = sample.indices
            weight /= weight.max()

        def join_chunks(x):
            """(B, chunks, T, ...) -> (length, B, ...)."""
            return x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1)[: self.length]

        carry, steps = sample.experience
        carry = jax.tree.map(lambda x: x[:, 0], carry)
        steps = jax.tree.map(join_chunks, steps)
        return Sample(carry, as_seen(steps), weight, indices)

    def set_priorities(self, buffer, indices, error):
        """The buffer with new priorities of sampled sequences; unchanged if not `prioritized`.

        The priority of a sequence is 0.9 of its greatest and 0.1 of its mean error (R2D2,
        section 2.3).

        Args:
          indices: `Sample.indices`.
          error: absolute errors (L, B) of L steps of every sequence.
        """
        if not self.prioritized:
            return buffer
        priorities = 0.9 * error.max(axis=0) + 0.1 * error.mean(axis=0)
        return self._buffer.set_priorities(buffer, indices, priorities)


def as_seen(steps: Transition) -> Sequence:
    """Put the observations of auto-resetting environments back in the order they were seen.

    An environment that resets itself shows p after c; in truth Z came after c, and then the episode
    was over. For five steps of which the third ends an episode:

        steps: (T, B), T = 5                  sequence: (T + 1, B)

        row  obs  start  next_obs  done       row  obs  start  final
         0    a     -       b       -          0    a     -      -
         1    b     -       c       -          1    b     -      -
         2    c     -       Z      yes         2    c     -      -
         3    p    yes      q       -          3    Z     -     yes
         4    q     -       r       -          4    p    yes     -
                                               5    q     -      -

    A final row holds an observation in which no step of the sequence begins, like Z. Its value may
    be bootstrapped from, but it has no action to learn about, so losses leave it out. Final rows
    are the last observations of episodes and, if it is not cut off, next_obs of the last step.

    Every final row moves the rows after it down by one, and what does not fit into T + 1 rows is
    dropped: here r. Without the end of the episode, r would be row 5, and final.
    """
    no = jnp.zeros_like(steps.done)
    yes = jnp.ones_like(steps.done)
    step_rows = Sequence(
        inputs=steps.inputs,
        start=steps.start,
        action=steps.action,
        reward=steps.reward,
        terminated=steps.terminated,
        final=no,
    )
    final_rows = step_rows._replace(
        inputs=steps.inputs._replace(
            obs=steps.next_obs,
            action=steps.action,
            reward=steps.reward,
        ),
        start=no,
        final=yes,
    )

    def in_turn(a, b):
        """Rows a[0], b[0], a[1], b[1], ..."""
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    # Every step is followed by a row that may be final; it exists if the episode ended there.
    exists = in_turn(yes, steps.done.at[-1].set(True))
    order = jnp.argsort(~exists, axis=0, stable=True)[: len(steps.done) + 1]
    select = jax.vmap(lambda x, order: x[order], in_axes=1, out_axes=1)
    return jax.tree.map(lambda a, b: select(in_turn(a, b), order), step_rows, final_rows)


def mean_of_steps(x, is_step):
    """The mean of x (L, B) over the rows in which a step begins, is_step; 0 if there is none."""
    return x.sum(where=is_step) / jnp.maximum(1, is_step.sum())
