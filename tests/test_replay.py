"""What is sampled is what was added: single steps, sequences, and episodes as they were seen."""

from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from replay import ItemReplay, SequenceReplay, Transition, as_seen


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
    replay = ItemReplay(buffer_size=9, batch_size=4)
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
        carry, batch, weight, indices = jax.jit(replay.sample)(buffer, key)
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
            buffer = replay.set_priorities(buffer, indices, jnp.ones((length, 200)))
    assert len(beginnings) == num_envs * (40 - 12) // num_steps + num_envs  # all there are


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
