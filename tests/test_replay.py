"""What is sampled is what was added: single steps, sequences, and episodes as they were seen."""

from operator import itemgetter
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from replay import (
    ItemReplay,
    SequenceReplay,
    Transition,
    as_lots,
    as_seen,
    joined,
    mean_of_steps,
)


class Inputs(NamedTuple):
    """What a memory reads."""

    obs: jax.Array
    action: jax.Array
    reward: jax.Array


def numbered(num_envs, first, num_steps, episode_length=5):
    """Transitions (T, N) of environments 1000 i + time; an episode has `episode_length` steps."""
    time = first + jnp.arange(num_steps)[:, None] + jnp.zeros((1, num_envs), int)
    number = 1000 * jnp.arange(num_envs) + time
    number = number.astype(jnp.float32)
    inputs = Inputs(number, number - 1, 10.0 * (number - 1))
    done = time % episode_length == episode_length - 1
    terminated = done & (time % 2 == 0)
    return Transition(
        inputs=inputs,
        start=time % episode_length == 0,
        action=number,
        reward=10.0 * number,
        next_obs=number + 0.5,
        terminated=terminated,
        done=done,
    )


@pytest.mark.parametrize(("added", "expected"), [(6, range(6)), (9, range(9)), (21, range(12, 21))])
def test_every_item_of_the_buffer_is_as_likely_as_another(added, expected):
    replay = ItemReplay(num_envs=1, buffer_size=9, batch_size=4)
    buffer = replay.init({"number": jnp.zeros(1, jnp.int32), "obs": jnp.zeros((1, 2))})
    for number in range(added):
        obs = jnp.full((1, 1, 2), number, jnp.float32)
        buffer = replay.add(buffer, {"number": jnp.full((1, 1), number), "obs": obs})
    batch = jax.vmap(replay.sample, (None, 0))(buffer, jax.random.split(jax.random.key(0), 25_000))
    numbers, counts = np.unique(batch["number"], return_counts=True)
    np.testing.assert_array_equal(numbers, expected)
    shares = counts / 100_000  # 0.005 is more than four standard deviations
    np.testing.assert_allclose(shares, 1 / len(expected), atol=0.005)
    np.testing.assert_array_equal(batch["obs"], jnp.stack([batch["number"]] * 2, axis=-1))


@pytest.mark.parametrize("prioritized", [False, True])
def test_sampled_sequences_are_pieces_of_what_was_added(prioritized):
    """1,000 sequences of a buffer that has been filled two and a half times."""
    num_envs, num_steps, length = 3, 4, 10
    sizes = {"buffer_size": 3 * 40, "batch_size": 200, "length": length}
    replay = SequenceReplay(num_envs, num_steps, **sizes, prioritized=prioritized)
    first = numbered(num_envs, 0, 1)
    buffer = replay.init(jnp.zeros((num_envs, 1)), jax.tree.map(itemgetter(0), first))
    add, total = jax.jit(replay.add), 100
    for time in range(0, total, num_steps):
        steps = numbered(num_envs, time, num_steps)
        buffer = add(buffer, steps.inputs.obs[0][:, None], steps)
    beginnings = set()
    for key in jax.random.split(jax.random.key(0), 5):
        sample = jax.jit(replay.sample)(buffer, key)
        carry, batch, weight, _ = sample
        assert batch.final.shape == (length + 1, 200) and weight.shape == (200,)
        for b in range(200):
            number, final = np.asarray(batch.inputs.obs[:, b]), np.asarray(batch.final[:, b])
            time = number[~final] % 1000
            # It begins where a chunk does, with its carry.
            assert carry[b, 0] == number[0] and number[0] % num_steps == 0
            assert (np.diff(time) == 1).all() and total - 40 <= time.min() and time.max() < total
            assert len(set(number // 1000)) == 1  # of one environment
            beginnings.add(number[0])
        if prioritized:
            buffer = replay.set_priorities(buffer, sample, jnp.ones((length, 200)))
    assert len(beginnings) == num_envs * (40 - 12) // num_steps + num_envs  # all there are


def test_items_of_several_steps_and_environments_wrap_anywhere():
    """Twelve at a time into a buffer of 27, and minibatches of more than it holds."""
    replay = ItemReplay(num_envs=3, buffer_size=27, batch_size=1000)
    buffer, add = replay.init(jnp.zeros(3, jnp.int32)), jax.jit(replay.add)
    for added in range(0, 84, 12):
        buffer = add(buffer, added + jnp.arange(12).reshape(4, 3))
    seen = np.asarray(jax.jit(replay.sample)(buffer, jax.random.key(0)))[0]
    assert set(seen) == set(range(84 - 27, 84))


@pytest.mark.parametrize("added", [5, 9, 13, 40])
def test_items_drawn_together_follow_each_other(added):
    replay = ItemReplay(num_envs=2, buffer_size=18, batch_size=4000, n_step=3)
    buffer = replay.init(jnp.zeros(2, jnp.int32))
    for number in range(added):
        buffer = replay.add(buffer, number + 1000 * jnp.arange(2)[None])
    steps = np.asarray(jax.jit(replay.sample)(buffer, jax.random.key(0)))
    assert steps.shape == (3, 4000)
    np.testing.assert_array_equal(steps, steps[0] + np.arange(3)[:, None])
    starts = range(max(0, added - 9), added - 2)
    assert set(steps[0]) == {number + env for number in starts for env in (0, 1000)}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_joined_steps_equal_brute_force(n, rng):
    batch_size, gamma = 60, 0.9
    done = rng.random((n, batch_size)) < 0.3
    terminated = done & (rng.random(done.shape) < 0.5)
    reward = rng.normal(size=done.shape)
    obs, next_obs = rng.normal(size=(2, *done.shape, 3))
    action = rng.integers(5, size=done.shape)
    steps = SimpleNamespace(
        obs={"eyes": obs},
        action=action,
        reward=jnp.asarray(reward),
        next_obs={"eyes": next_obs},
        terminated=terminated,
        done=jnp.asarray(done),
    )
    actual = joined(steps, gamma)
    np.testing.assert_array_equal(actual.obs["eyes"], obs[0])
    np.testing.assert_array_equal(actual.action, action[0])
    for b in range(batch_size):
        total, k = 0.0, 0
        while True:
            total += gamma**k * reward[k, b]
            k += 1
            if done[k - 1, b] or k == n:
                break
        np.testing.assert_allclose(actual.reward[b], total, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(actual.discount[b], gamma**k, rtol=1e-6)
        np.testing.assert_array_equal(actual.next_obs["eyes"][b], next_obs[k - 1, b])
        assert actual.terminated[b] == terminated[k - 1, b]


def test_nothing_is_sampled_before_it_is_written():
    items = ItemReplay(num_envs=1, buffer_size=8, batch_size=4)
    with pytest.raises(ValueError, match="holds 0 items of every environment, sampling needs at"):
        items.sample(items.init(jnp.zeros(1)), jax.random.key(0))
    for prioritized in (False, True):
        replay, buffer, add = sequences(1, 4, 2, prioritized=prioritized)
        message = "holds 1 chunks of every environment, sampling needs at least 2"
        buffer = add(buffer, 0)
        with pytest.raises(ValueError, match=message):
            replay.sample(buffer, jax.random.key(0))
        # A compiled program cannot refuse: the rows are no steps.
        sample = jax.jit(replay.sample)
        assert sample(buffer, jax.random.key(0)).batch.final.all()
        assert not sample(add(buffer, 1), jax.random.key(0)).batch.final[:-1].any()


# --- Priorities ----------------------------------------------------------------------------------


def sequences(num_envs, slots, chunks, **changes):
    """A replay of chunks of two steps, its empty buffer, and what adds chunk number i of each."""
    sizes = {"buffer_size": num_envs * (2 * slots + 1), "length": 2 * chunks - 1}
    replay = SequenceReplay(num_envs, 2, **sizes, **{"batch_size": 500} | changes)
    first = numbered(num_envs, 0, 1)
    buffer = replay.init(jnp.zeros((num_envs, 1)), jax.tree.map(itemgetter(0), first))

    @jax.jit
    def add(buffer, i):
        steps = numbered(num_envs, 2 * i, 2)
        return replay.add(buffer, steps.inputs.obs[0][:, None], steps)

    return replay, buffer, add


@pytest.mark.parametrize(
    ("num_envs", "slots", "chunks", "added"),
    [
        (3, 7, 3, 5),  # with room left
        (2, 5, 2, 5),  # full
        (2, 5, 2, 6),  # just begun anew
        (3, 7, 3, 25),  # filled three times and a half
        (1, 4, 1, 9),  # one environment, sequences of one chunk
        (2, 3, 3, 8),  # one sequence of every environment
    ],
)
def test_probabilities_and_weights_are_those_of_the_priorities(num_envs, slots, chunks, added, rng):
    """Against a table of all sequences, in numpy: some have priority 0, new ones the greatest."""
    exponents = {"priority_exponent": 0.7, "importance_exponent": 0.4}
    replay, buffer, add = sequences(num_envs, slots, chunks, prioritized=True, **exponents)
    sample, set_priorities = jax.jit(replay.sample), jax.jit(replay.set_priorities)
    errors = rng.exponential(3.737, size=(num_envs, added)).astype(np.float32)
    errors *= rng.random(errors.shape) < 0.7
    priorities, greatest = {}, 0.0
    for i in range(added):
        buffer = add(buffer, i)
        first = i - chunks + 1
        if first < 0:
            continue
        greatest = greatest or 1.0
        priorities |= {(env, first): greatest for env in range(num_envs)}
        for env in range(num_envs):
            priorities.pop((env, i - slots), None)  # what begins there was written over
        counts = dict.fromkeys(priorities, 0)
        for key in jax.random.split(jax.random.key(i), 10 if i == added - 1 else 1):
            drawn = sample(buffer, key)
            env, first = np.divmod(np.asarray(drawn.carry[:, 0]).astype(int), 1000)
            first //= 2
            for row in zip(env, first, strict=True):
                counts[row] += 1  # a KeyError, were it not valid
        p = np.array(list(priorities.values())) ** 0.7
        expected = p / p.sum() if p.any() else np.full(len(p), 1 / len(p))
        of = dict(zip(priorities, expected, strict=True))
        weight = np.array([of[row] for row in zip(env, first, strict=True)]) ** -0.4
        np.testing.assert_allclose(drawn.weight, weight / weight.max(), rtol=1e-4)
        if i < added - 1:
            buffer = set_priorities(buffer, drawn, errors[env, first] * jnp.ones((2, 1)))
            rows = set(zip(env, first, strict=True))
            priorities |= {row: errors[row] for row in rows}
            greatest = max(greatest, *(errors[row] for row in rows))
    shares = np.array(list(counts.values())) / 5000
    assert (shares[expected == 0] == 0).all()
    deviation = np.sqrt(expected * (1 - expected) / 5000)
    assert (np.abs(shares - expected) <= 4.5 * deviation).all()


def test_the_priority_is_of_errors_of_steps():
    """0.9 of the greatest and 0.1 of the mean; final rows and errors without a number are left."""
    replay, buffer, add = sequences(1, 12, 6, prioritized=True, priority_exponent=1.0)
    for i in range(12):
        buffer = add(buffer, i)
    sample = replay.sample(buffer, jax.random.key(0))
    final = np.asarray(sample.batch.final[2:-1])  # of rows that a burn-in of 2 leaves
    assert final.any() and not final.all(axis=0).any()
    error = np.where(final, 100.0, np.asarray(sample.batch.inputs.obs[2:-1]) % 7)
    after = replay.set_priorities(buffer, sample, jnp.asarray(error))
    steps = np.where(final, np.nan, error)
    expected = 0.9 * np.nanmax(steps, axis=0) + 0.1 * np.nanmean(steps, axis=0)
    np.testing.assert_allclose(after.priorities[sample.indices], expected, rtol=1e-6)
    np.testing.assert_allclose(after.greatest, max(1.0, expected.max()), rtol=1e-6)
    for bad in (np.nan, np.inf):
        other = replay.set_priorities(after, sample, jnp.asarray(error * 2).at[3].set(bad))
        hit = final[3]
        kept = np.where(hit, 2 * expected, expected)
        np.testing.assert_allclose(other.priorities[sample.indices], kept, rtol=1e-6)
        assert np.isfinite(other.greatest)
    none = sample._replace(batch=sample.batch._replace(final=jnp.ones_like(sample.batch.final)))
    np.testing.assert_array_equal(
        replay.set_priorities(after, none, jnp.asarray(error)).priorities, after.priorities
    )


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_priorities_of_any_size_give_finite_weights(size):
    replay, buffer, add = sequences(2, 8, 1, prioritized=True)
    for i in range(8):
        buffer = add(buffer, i)
    spread = jnp.float32(size) * jnp.array([[1.0], [0.5]]) * jnp.ones(8)
    sample = replay.sample(buffer._replace(priorities=spread), jax.random.key(0))
    assert np.isfinite(sample.weight).all() and sample.weight.max() == 1.0
    share = np.mean(np.asarray(sample.indices[0]) == 0)
    # Those below 1e-38 count as 0, those above 1e30 as 1e30.
    np.testing.assert_allclose(share, 2 / 3 if 1e-38 < size <= 1e30 else 0.5, atol=0.1)


def test_devices_share_the_scale_of_weights_and_the_greatest_priority():
    """Each draws from its own environments; the sum of the lots is the same on all of them."""
    replay, buffer, add = sequences(1, 8, 1, prioritized=True, priority_exponent=1.0)
    for i in range(8):
        buffer = add(buffer, i)
    spread = jnp.stack([jnp.ones((1, 8)), jnp.ones((1, 8)).at[0, :7].set(0.01)])
    buffers = jax.vmap(lambda x: buffer._replace(priorities=x))(spread)
    keys = jax.random.split(jax.random.key(0), 2)
    samples = jax.vmap(replay.sample, axis_name="devices")(buffers, keys)
    probability = jnp.stack([jnp.full(8, 1 / 8), spread[1, 0] / spread[1].sum()])
    drawn = jnp.take_along_axis(probability, samples.indices[1], axis=1)
    expected = (drawn / drawn.min()) ** -replay.importance_exponent
    np.testing.assert_allclose(samples.weight, expected, rtol=1e-4)
    error = jnp.ones(samples.batch.final[:, :-1].shape) * jnp.array([3.0, 7.0])[:, None, None]
    after = jax.vmap(replay.set_priorities, axis_name="devices")(buffers, samples, error)
    np.testing.assert_allclose(after.greatest, 7.0)


def test_the_mean_of_steps_on_two_devices_is_that_of_all_rows(rng):
    x, is_step = rng.normal(size=(2, 5, 3)), rng.random((2, 5, 3)) < [[[0.9]], [[0.2]]]
    means = jax.vmap(mean_of_steps, axis_name="devices")(x, is_step)
    np.testing.assert_allclose(means.mean(), x[is_step].mean(), rtol=1e-5)


def test_lots_of_100_000_priorities(rng):
    """What has priority 0 has no lot, what has a small one has at least one, the rest its share."""
    priorities = rng.exponential(size=100_000).astype(np.float32) ** 4
    priorities[::3] = 0.0
    lots = np.asarray(as_lots(jnp.asarray(priorities), jnp.ones(100_000, bool))).astype(np.int64)
    np.testing.assert_array_equal(lots > 0, priorities > 0)
    assert 2**30 * 0.999 < lots.sum() < 2**30 * 1.001
    expected = priorities.astype(float) / priorities.sum(dtype=float) * 2**30
    np.testing.assert_allclose(lots, expected, rtol=1e-3, atol=1.01)


# --- Episodes as they were seen -------------------------------------------------------------------


def test_what_was_seen_is_put_back_in_order():
    steps = numbered(2, 3, 9)
    seen = as_seen(steps)
    # 4 and 9 end an episode; what no longer fits is gone.
    expected = [3, 4, 4.5, 5, 6, 7, 8, 9, 9.5, 10]
    np.testing.assert_array_equal(seen.inputs.obs[:, 0], expected)
    np.testing.assert_array_equal(seen.inputs.obs[:, 1], np.array(expected) + 1000)
    rows = np.array(expected)
    is_final = rows % 1 == 0.5
    np.testing.assert_array_equal(seen.final[:, 0], is_final)
    np.testing.assert_array_equal(seen.start[:, 0], ~is_final & (rows % 5 == 0))
    np.testing.assert_array_equal(seen.terminated[:, 0][~is_final], rows[~is_final] == 4)
    done_before = np.ceil(rows) - 1
    np.testing.assert_array_equal(seen.inputs.action[:, 0], done_before)
    np.testing.assert_array_equal(seen.inputs.reward[:, 0], 10 * done_before)
    # No end within: the last row is what followed the last step.
    whole = as_seen(jax.tree.map(itemgetter(slice(2, 6)), steps))
    np.testing.assert_array_equal(whole.inputs.obs[:, 0], [5, 6, 7, 8, 8.5])
    np.testing.assert_array_equal(whole.final[:, 0], [False] * 4 + [True])
