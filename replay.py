"""Replay buffers for off-policy learning, of single steps and of sequences, made of flashbax's.

    replay = ItemReplay(num_envs, buffer_size, batch_size, n_step)
    buffer = replay.init(transition)                   # of N environments: leaves (N, ...)
    buffer = replay.add(buffer, transitions)           # T steps of N environments: (T, N, ...)
    batch = joined(replay.sample(buffer, key), gamma)  # n steps (n, B, ...) as one: (B, ...)

    replay = SequenceReplay(num_envs, num_steps, buffer_size, batch_size, length)
    buffer = replay.init(carry, blank_step(inputs, start))  # of N environments: (N, ...)
    buffer = replay.add(buffer, carry, transitions)    # the carry before T steps, and the steps
    carry, batch, weight, indices = replay.sample(buffer, key)

A row of SequenceReplay's buffer is a chunk: the T steps that an environment makes between two
updates, and the carry that its memory had before them. A sampled sequence consists of as many
consecutive chunks of one environment as hold `length` steps.
  - It begins with a chunk, where the carry is known. Two sequences may overlap, by multiples of T.
  - It never runs from the newest chunk on to the oldest, nor into what was never written.
  - Episodes may begin and end within it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import flashbax as fbx
import jax
import jax.numpy as jnp
import numpy as np

from harness.axes import DEVICES, axes_in_use, mean_over_devices


def add_in_place(replay, buffer, items):
    """flashbax's `replay.add`, compiled so that it writes into the buffer instead of copying it.

    Without the barrier XLA would merge the writing with the reading of the next sample, and copy
    the whole buffer for that.
    """
    return jax.lax.optimization_barrier(replay.add(buffer, items))


def make_buffer(num_envs: int, slots: int, needed: int):
    """flashbax's buffer of `slots` rows of each environment, sampled `needed` rows at a time."""
    return fbx.make_trajectory_buffer(
        add_batch_size=num_envs,
        sample_batch_size=1,  # flashbax's own `sample` is not used
        sample_sequence_length=needed,
        period=1,
        min_length_time_axis=needed,
        max_length_time_axis=slots,
    )


def num_written(buffer):
    """How much of flashbax's buffer was written, along its axis of time."""
    size = jax.tree.leaves(buffer.experience)[0].shape[1]
    return jnp.where(buffer.is_full, size, buffer.current_index)


def check_written(written, needed: int, unit: str) -> None:
    """Refuse to sample what was never written; within a compiled program there is no telling.

    Raises:
      ValueError: says how much is there and how much is needed.
    """
    if not isinstance(written, jax.core.Tracer) and written < needed:
        raise ValueError(f"the buffer holds {written} {unit}, sampling needs at least {needed}")


# --- Single steps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemReplay:
    """Replay of single items: pure functions of a buffer's state."""

    num_envs: int  # N
    buffer_size: int  # items of all environments together
    batch_size: int  # B
    n_step: int = 1  # n, consecutive items of an environment that are drawn together

    @classmethod
    def of(cls, config):
        """The replay of a script's config."""
        return cls(
            num_envs=config.num_envs,
            buffer_size=config.buffer_size,
            batch_size=config.batch_size,
            n_step=config.n_step,
        )

    @property
    def _buffer(self):
        return make_buffer(self.num_envs, self.buffer_size // self.num_envs, needed=self.n_step)

    def init(self, items):
        """An empty buffer for items (N, ...) with these shapes and dtypes: (N, slots, ...)."""
        return self._buffer.init(jax.tree.map(lambda x: x[0], items))

    def add(self, buffer, items):
        """The buffer with T steps of N environments added: items (T, N, ...)."""
        items = jax.tree.map(lambda x: x.swapaxes(0, 1), items)
        return add_in_place(self._buffer, buffer, items)

    def sample(self, buffer, key):
        """A minibatch (n, B, ...), drawn with replacement; every environment needs n items.

        All starts are equally likely, up to a relative difference of their number / 2^32. The n
        items never run from the newest on to the oldest. flashbax's own `sample` draws twice as
        many random bits; SAC trains 1.07 times as fast with this one.
        """
        written = num_written(buffer)
        check_written(written, self.n_step, "items of every environment")
        num_starts = written - self.n_step + 1
        size = (num_starts * self.num_envs).astype(jnp.uint32)
        rows = jax.random.bits(key, (self.batch_size,), jnp.uint32) % size
        slot, env = jnp.divmod(rows, self.num_envs)
        if self.n_step == 1:  # any slot: which one is the oldest does not matter
            return jax.tree.map(lambda x: x[env, slot][None], buffer.experience)
        slots = self.buffer_size // self.num_envs
        oldest = jnp.where(buffer.is_full, buffer.current_index, 0)
        following = (oldest + slot + jnp.arange(self.n_step)[:, None]) % slots
        return jax.tree.map(lambda x: x[env, following], buffer.experience)


class Joined(NamedTuple):
    """A minibatch (B, ...) of steps, each joined with up to n - 1 more of its episode."""

    obs: Any  # of the first step
    action: jax.Array  # likewise
    reward: jax.Array  # the sum of all rewards, discounted
    next_obs: Any  # of the last step: n steps later, or the last observation of the episode
    terminated: jax.Array  # likewise
    discount: jax.Array  # gamma^k for k steps: what the value of next_obs counts


def joined(steps, gamma: float) -> Joined:
    """Consecutive steps as one. Nothing is joined beyond the end of an episode.

    Args:
      steps: (n, B, ...) with the fields obs, action, reward, next_obs, terminated, and done.
      gamma: discount per step.
    """
    n, batch_size = steps.done.shape
    alone = Joined(
        obs=jax.tree.map(lambda x: x[0], steps.obs),
        action=steps.action[0],
        reward=steps.reward[0],
        next_obs=jax.tree.map(lambda x: x[0], steps.next_obs),
        terminated=steps.terminated[0],
        discount=jnp.full(batch_size, gamma, jnp.float32),
    )
    if n == 1:  # to gather this one as the last would cost DQN a twentieth of its speed
        return alone
    discounts = jnp.float32(gamma ** np.arange(n + 1))
    last = steps.done.at[-1].set(True).argmax(axis=0)
    is_joined = jnp.arange(n)[:, None] <= last
    rewards = discounts[:-1, None] * steps.reward

    def of_last(x):
        return x[last, jnp.arange(batch_size)]

    return alone._replace(
        reward=rewards.sum(axis=0, where=is_joined),
        next_obs=jax.tree.map(of_last, steps.next_obs),
        terminated=of_last(steps.terminated),
        discount=discounts[1:][last],
    )


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


def blank_step(inputs, start) -> Transition:
    """A step with the shapes and dtypes of those that begin with these inputs (N, ...)."""
    return Transition(
        inputs=inputs,
        start=start,
        action=inputs.action,
        reward=inputs.reward,
        next_obs=inputs.obs,
        terminated=start,
        done=start,
    )


class Chunk(NamedTuple):
    """A row of the buffer."""

    carry: Any  # the memory before the first step
    steps: Transition  # (T, ...)


class Buffer(NamedTuple):
    """Chunks of N environments, each in a slot, and how likely a sequence begins with them."""

    chunks: Any  # flashbax's: leaves (N, slots, ...) of a Chunk, and where the next one goes
    priorities: Any  # (N, slots) float32, raised to their exponent; None unless `prioritized`
    greatest: Any  # () float32, the greatest of them so far, 0 at first; None unless `prioritized`


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
    indices: Any  # (B,) environment and (B,) slot of the first chunk


@dataclass(frozen=True)
class SequenceReplay:
    """Replay of sequences: pure functions of a buffer's state."""

    num_envs: int  # N
    num_steps: int  # T, steps of a chunk
    buffer_size: int  # steps of all environments together
    batch_size: int  # B, sequences
    length: int  # steps of a sequence
    prioritized: bool = False
    priority_exponent: float = 0.9  # 0: all sequences are equally likely
    importance_exponent: float = 0.6  # 0: all weights are 1

    @classmethod
    def of(cls, config, **options):
        """The replay of a script's config, whose sequences begin with `burn_in` steps."""
        return cls(
            num_envs=config.num_envs,
            num_steps=config.num_steps,
            buffer_size=config.buffer_size,
            batch_size=config.batch_size,
            length=config.burn_in + config.sequence_length,
            **options,
        )

    @property
    def _chunks(self):
        """Chunks of a sequence, rounded up."""
        return -(-self.length // self.num_steps)

    @property
    def _slots(self):
        """Chunks of an environment that the buffer has room for."""
        return self.buffer_size // (self.num_envs * self.num_steps)

    @property
    def _buffer(self):
        return make_buffer(self.num_envs, self._slots, needed=self._chunks)

    def init(self, carry, transition: Transition) -> Buffer:
        """An empty buffer for carries and transitions (N, ...) with these shapes and dtypes."""

        def repeat(x):
            return jnp.broadcast_to(x[0], (self.num_steps, *x.shape[1:]))

        steps = jax.tree.map(repeat, transition)
        chunks = self._buffer.init(Chunk(jax.tree.map(lambda x: x[0], carry), steps))
        if not self.prioritized:
            return Buffer(chunks, None, None)
        priorities = jnp.zeros((self.num_envs, self._slots), jnp.float32)
        return Buffer(chunks, priorities, jnp.float32(0.0))

    def add(self, buffer: Buffer, carry, transitions: Transition) -> Buffer:
        """The buffer with one more chunk of every environment.

        The sequences that it completes get the greatest priority so far: all are drawn soon.

        Args:
          carry: the memories before the chunk, (N, ...).
          transitions: its steps, (T, N, ...).
        """
        chunk = Chunk(carry, jax.tree.map(lambda x: x.swapaxes(0, 1), transitions))
        items = jax.tree.map(lambda x: x[:, None], chunk)
        chunks = add_in_place(self._buffer, buffer.chunks, items)
        if not self.prioritized:
            return buffer._replace(chunks=chunks)
        # With too few chunks for a sequence this slot is beyond them, and set again before its use.
        first = (buffer.chunks.current_index - self._chunks + 1) % self._slots
        priority = jnp.where(buffer.greatest > 0.0, buffer.greatest, 1.0)
        return buffer._replace(
            chunks=chunks,
            priorities=buffer.priorities.at[:, first].set(priority),
            greatest=priority,
        )

    def sample(self, buffer: Buffer, key) -> Sample:
        """A minibatch, drawn with replacement; the buffer must hold `length` steps of every env.

        With `prioritized`, the probability of a sequence is P = p^a / sum(p^a), where p is its
        priority and a `priority_exponent`. Its weight is P^-b, where b is `importance_exponent`,
        divided by the greatest of the minibatch (Schaul et al. 2016, arXiv 1511.05952).
        """
        written = num_written(buffer.chunks)
        check_written(written, self._chunks, "chunks of every environment")
        oldest = jnp.where(buffer.chunks.is_full, buffer.chunks.current_index, 0)
        num_starts = written - self._chunks + 1  # of every environment, from the oldest slot on
        if self.prioritized:
            age = (jnp.arange(self._slots) - oldest) % self._slots
            lots = as_lots(buffer.priorities, age < num_starts).reshape(-1)
            ends = lots.cumsum(dtype=jnp.uint32)
            lot = jax.random.randint(key, (self.batch_size,), 0, ends[-1], jnp.uint32)
            row = jnp.searchsorted(ends, lot, side="right")
            env, slot = row // self._slots, row % self._slots
            drawn = lots[row].astype(jnp.float32)
            least = jax.lax.pmin(drawn.min(), axes_in_use(DEVICES))
            weight = (drawn / least) ** -self.importance_exponent
        else:
            env_key, slot_key = jax.random.split(key)
            env = jax.random.randint(env_key, (self.batch_size,), 0, self.num_envs)
            start = jax.random.randint(slot_key, (self.batch_size,), 0, num_starts)
            slot = (oldest + start) % self._slots
            weight = jnp.ones(self.batch_size, jnp.float32)

        def join_chunks(x):
            """(B, chunks, T, ...) -> (length, B, ...)."""
            return x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1)[: self.length]

        following = (slot[:, None] + jnp.arange(self._chunks)) % self._slots
        carry, steps = buffer.chunks.experience
        carry = jax.tree.map(lambda x: x[env, slot], carry)
        steps = jax.tree.map(lambda x: join_chunks(x[env[:, None], following]), steps)
        batch = as_seen(steps)
        # Rows that were never written are no steps: nothing is learned from them.
        batch = batch._replace(final=batch.final | (num_starts <= 0))
        return Sample(carry, batch, weight, (env, slot))

    def set_priorities(self, buffer: Buffer, sample: Sample, error) -> Buffer:
        """The buffer with new priorities of sampled sequences; unchanged if not `prioritized`.

        The priority of a sequence is 0.9 of its greatest and 0.1 of its mean error (R2D2,
        section 2.3). It stays as it was if there is none, or if an error is not finite.

        Args:
          error: absolute errors (L, B) of the last rows of `sample`, without the very last.
            Those of final rows do not count.
        """
        if not self.prioritized:
            return buffer
        is_step = ~sample.batch.final[-1 - len(error) : -1]
        greatest = error.max(axis=0, where=is_step, initial=0.0)
        mean = error.mean(axis=0, where=is_step)
        priority = (0.9 * greatest + 0.1 * mean) ** self.priority_exponent
        is_known = jnp.isfinite(priority)
        priority = jnp.where(is_known, priority, buffer.priorities[sample.indices])
        greatest = jnp.maximum(buffer.greatest, priority.max(where=is_known, initial=0.0))
        return buffer._replace(
            priorities=buffer.priorities.at[sample.indices].set(priority),
            greatest=jax.lax.pmax(greatest, axes_in_use(DEVICES)),
        )


def as_lots(priorities, is_valid):
    """Whole numbers, uint32, in proportion to the valid priorities; their sum is about 2^30.

    Sums of whole numbers are exact, those of floats are not: a number below the sum, drawn at
    random, never falls to a priority of 0. If all valid priorities are 0, they count as equal.
    """
    priorities = jnp.where(is_valid, jnp.minimum(priorities, 1e30), 0.0)  # finite sums
    smallest = jnp.finfo(jnp.float32).tiny
    any_share = priorities.sum() >= smallest
    priorities = jnp.where(any_share, priorities, is_valid.astype(jnp.float32))
    shares = priorities / jnp.maximum(priorities.sum(), smallest)
    return jnp.ceil(shares * 2**30).astype(jnp.uint32)


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


def n_step_targets(batch: Sequence, next_value, gamma: float, n_step: int):
    """Up to n rewards and the value after them, for all rows but the last: (L, B).

    With n = 2, y[t] = r[t] + gamma * r[t + 1] + gamma^2 * V(s[t + 2]): a reward and the discounted
    one-step target of the next row. The last step of an episode or of the sequence has no next
    row, so it takes the value instead, and the targets before it have fewer rewards.

    Args:
      batch: rows (L + 1, B).
      next_value: of the observation that a row's step leads to, (L, B).
    """
    rows = jax.tree.map(lambda x: x[:-1], batch)
    is_last_step = batch.final[1:].at[-1].set(True)
    future = next_value
    for _ in range(n_step):
        targets = rows.reward + gamma * jnp.where(rows.terminated, 0.0, future)
        future = jnp.where(is_last_step, next_value, jnp.roll(targets, -1, axis=0))
    return targets


def mean_of_steps(x, is_step):
    """The mean of x (L, B) over the rows in which a step begins, is_step; 0 if there is none.

    On devices that share a seed each one's sum is divided by their mean number of such rows: the
    mean over the devices is that over all rows.
    """
    number = mean_over_devices(is_step.sum().astype(jnp.float32))
    return x.sum(where=is_step) / jnp.where(number > 0, number, 1.0)
