"""Whole episodes: as many as were asked for, none of them favoured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import make, play


def zero_policy(memory, obs, *_):
    return memory, jnp.zeros(len(obs), jnp.int32)


def test_play_does_not_favour_short_episodes():
    env = make("test::Coin")
    played = jax.jit(lambda key: play(env, zero_policy, lambda _: (), key, 10, 4000))
    episodes = played(jax.random.key(0))
    assert episodes.returns.shape == episodes.lengths.shape == (4000,)
    np.testing.assert_array_equal(episodes.returns, episodes.lengths)
    assert set(np.unique(episodes.lengths)) == {1, 9}
    # The standard error is 0.06; the first to end would average 1.8.
    assert abs(float(episodes.returns.mean()) - 5.0) < 0.3


@pytest.mark.parametrize(("num_envs", "episodes"), [(4, 4), (4, 3), (4, 10), (1, 3)])
def test_play_plays_the_number_it_is_asked_for(num_envs, episodes):
    env, key = make("test::Counting"), jax.random.key(0)
    result = play(env, zero_policy, lambda _: (), key, num_envs, episodes)
    np.testing.assert_array_equal(result.lengths, np.full(episodes, 7))


def test_play_returns_what_the_environment_reports():
    """The second trial of a coin is as long as the first, and both make the return."""
    env = make("test::Coin", trials=2)
    episodes = play(env, zero_policy, lambda _: (), jax.random.key(0), num_envs=4, episodes=10)
    first, last = (episodes.reports[f"{trial}_trial_return"] for trial in ("first", "last"))
    assert first.shape == (10,) and set(np.unique(first)) == {1, 9}
    np.testing.assert_array_equal(first, last)
    np.testing.assert_array_equal(episodes.returns, 2 * first)
    assert not play(make("test::Coin"), zero_policy, lambda _: (), jax.random.key(0), 1, 1).reports


def test_episodes_differ_from_one_another():
    """Side by side and one after the other: each environment has keys of its own, and new ones."""
    env = make("test::Coin")
    played = jax.jit(lambda key: play(env, zero_policy, lambda _: (), key, 40, 160))
    lengths = np.asarray(played(jax.random.key(0)).lengths).reshape(4, 40)
    assert all(set(row) == {1, 9} for row in lengths)  # the others at the same time
    repeated = [(x == y).mean() for x, y in zip(lengths, lengths[1:], strict=False)]
    assert max(repeated) < 0.8
    other = np.asarray(played(jax.random.key(1)).lengths).reshape(4, 40)
    assert (other != lengths).any()


def test_play_hands_the_policy_what_a_memory_reads():
    """Start, previous action and previous reward are those of the step before: it checks them."""

    def policy(memory, obs, start, action, reward, key):
        steps, last_action, right = memory
        right &= (start == (obs[:, 1] == 0)) & (start | ((action == last_action) & (reward == 1.0)))
        action = (steps % 3) * jnp.ones(len(obs), jnp.int32)
        jax.debug.callback(lambda ok: seen.append(bool(ok)), right.all())
        return (steps + 1, action, right), action

    def initialize(num_envs):
        return jnp.int32(0), jnp.zeros(num_envs, jnp.int32), jnp.ones(num_envs, bool)

    seen = []
    play(make("test::Counting"), policy, initialize, jax.random.key(0), num_envs=2, episodes=4)
    jax.effects_barrier()
    assert len(seen) == 14 and all(seen)
