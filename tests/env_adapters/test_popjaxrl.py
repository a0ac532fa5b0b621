"""Every task of popjaxrl against popgym, step by step from the same hidden state; how it begins."""

import functools
import re

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import popgym  # noqa: F401  (registers its environments)
import pytest
from helpers import check_conformance

from env_adapters.popjaxrl import GAMES, POPGYM_NAMES, SHIPS
from envs import Discrete, make

POPGYM = {ours: theirs for theirs, ours in POPGYM_NAMES.items()}
CONTROL = "CartPole", "Pendulum"


def popgym_env(env_id):
    family, level = re.fullmatch("(.*)(Easy|Medium|Hard)", env_id).groups()
    return gymnasium.make(f"popgym-{POPGYM.get(family, family)}{level}-v0").unwrapped


class Dice:
    """Stands in for numpy's generator: hands out numbers drawn beforehand."""

    def __init__(self, numbers):
        self.numbers = iter(np.asarray(numbers))

    def random(self):
        return next(self.numbers)

    def normal(self, loc, scale):
        return loc + scale * next(self.numbers)


def hidden_state(env, env_id):
    """What popgym has dealt, as `Game.begin` takes it."""
    if "CountRecall" in env_id:
        return tuple(env.deck_idx_type[deck.idx[::-1]] for deck in (env.value_deck, env.query_deck))
    if "Concentration" in env_id:
        return env.state
    if "HigherLower" in env_id:
        return env.deck.ranks_idx[env.deck.idx[::-1]]
    if "Battleship" in env_id:
        return env.board.astype(bool)
    if "Minesweeper" in env_id:
        return env.hidden_grid.astype(np.int32)
    if "Bandit" in env_id:
        return env.bandits
    if any(name in env_id for name in CONTROL):
        return np.asarray(env.state, np.float32)
    return env.deck.suits_idx[env.deck.idx[::-1]]


def expert(env, env_id, hidden, time, rng):
    """The best action, or one that leads far, from popgym's own state; None if there is none."""
    if "Autoencode" in env_id:
        return int(env.deck.suits_idx[env.deck["system"][-1]]) if env.mode == 0 else 0
    if "RepeatPrevious" in env_id:
        return int(hidden[max(time + 1 - env.k, 0)])
    if "RepeatFirst" in env_id:
        return int(hidden[0])
    if "CountRecall" in env_id:
        return int(env.counts[env.query])
    if "HigherLower" in env_id:
        return int(hidden[time + 1] < hidden[time])
    if "Concentration" in env_id:
        closed = [card for card in range(len(hidden)) if card not in env.deck["face_up_idx"]]
        if not env.deck["in_play_idx"]:
            return closed[0]
        first = env.deck["in_play_idx"][0]
        return next(card for card in closed if card != first and hidden[card] == hidden[first])
    if "Battleship" in env_id:
        return rng.permutation(np.argwhere(hidden & (env.guesses == 0)))[0]
    if "Minesweeper" in env_id:
        return rng.permutation(np.argwhere(env.hidden_grid == 0))[0]
    if "CartPole" in env_id:
        x, x_dot, theta, theta_dot = env.state
        return int(theta + 0.5 * theta_dot + 0.05 * x + 0.1 * x_dot > 0)
    return None


def as_shown(obs, space):
    """popgym's observation as ours has it: numbers as one-hot vectors."""
    if isinstance(space, gymnasium.spaces.Box):
        return np.asarray(obs, np.float32)
    spaces = space.spaces if isinstance(space, gymnasium.spaces.Tuple) else [space]
    sizes = np.concatenate(
        [np.atleast_1d(getattr(s, "nvec", getattr(s, "n", None))) for s in spaces]
    )
    return np.concatenate(
        [np.eye(int(n))[int(value)] for value, n in zip(np.ravel(obs), sizes, strict=True)]
    )


def play_popgym(env_id, seed, skill, keys):
    """An episode: hidden state, first observation, and the columns of every step.

    The columns are obs, action, reward, terminated, truncated, and the physics before the step.
    """
    env, rng = popgym_env(env_id), np.random.default_rng(seed)
    env.action_space.seed(seed)
    is_noisy, is_control = "Noisy" in env_id, any(name in env_id for name in CONTROL)
    draw = functools.partial(jax.random.normal, shape=(2,)) if is_noisy else jax.random.uniform
    numbers = jax.device_get(jax.jit(jax.vmap(draw))(keys))
    if is_noisy:  # the first number is for the first observation
        env.reset(seed=seed)
        physics = np.asarray(env.state, np.float32)
        if "CartPole" in env_id:
            first = env.state[[0, 2]]
        else:
            first = [np.cos(env.state[0]), np.sin(env.state[0])]
        env.np_random = Dice(numbers)
        obs = env.add_noise_to_obs(np.asarray(first, np.float32))
    else:
        obs, _ = env.reset(seed=seed)
        physics = np.asarray(env.state, np.float32) if is_control else None
        env.np_random = Dice(numbers[1:])
    hidden, steps = (physics if is_control else hidden_state(env, env_id)), []
    first_obs, ends = as_shown(obs, env.observation_space), False
    while not ends:
        action = expert(env, env_id, hidden, len(steps), rng) if rng.random() < skill else None
        action = env.action_space.sample() if action is None else action
        physics = np.asarray(env.state, np.float32) if is_control else np.zeros(())
        if is_control:
            env.state = physics.astype(np.float64)  # so that rounding does not add up
        obs, reward, terminated, truncated, _ = env.step(action)
        if hasattr(env.action_space, "nvec"):
            action = action[0] * env.action_space.nvec[1] + action[1]
        ends = terminated or truncated
        obs = as_shown(obs, env.observation_space)
        steps.append((obs, action, reward, terminated, truncated and not terminated, physics))
    return hidden, first_obs, [np.stack(column) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize("env_id", GAMES)
def test_conformance(env_id):
    check_conformance(make(f"popjaxrl::{env_id}"))


@pytest.mark.parametrize("env_id", GAMES)
def test_as_popgym(env_id):
    """An episode by an expert, one by half an expert, one by chance: the same to their ends."""
    game, is_control = GAMES[env_id](), any(name in env_id for name in CONTROL)
    keys = jax.random.split(jax.random.key(7), (3, game.max_steps + 1))
    theirs = [play_popgym(env_id, seed, 1 - seed / 2, keys[seed]) for seed in range(3)]
    hidden = jax.tree.map(lambda *x: np.stack(x), *[episode[0] for episode in theirs])

    def padded(x):
        return np.concatenate([x, np.zeros((game.max_steps - len(x), *x.shape[1:]), x.dtype)])

    actions = np.stack([padded(columns[1]) for _, _, columns in theirs])
    physics = np.stack([padded(columns[5]) for _, _, columns in theirs])

    @jax.jit
    @jax.vmap
    def run(keys, hidden, actions, physics):
        def step(state, inputs):
            key, action, physics = inputs
            state = (state[0], physics) if is_control else state
            obs, state, *rest = game.step(key, state, action.astype(game.action_space.dtype))
            return jax.tree.map(jnp.asarray, state), (obs, *rest)

        obs, state = game.begin(keys[0], hidden)
        return obs, jax.lax.scan(step, state, (keys[1:], actions, physics))[1]

    first_obs, ours = jax.device_get(run(keys, jax.tree.map(jnp.asarray, hidden), actions, physics))
    for episode, (_, their_first_obs, columns) in enumerate(theirs):
        obs, _, reward, terminated, truncated, _ = columns
        steps = len(obs)
        our_obs, our_reward, our_terminated, our_truncated = (x[episode][:steps] for x in ours)
        np.testing.assert_allclose(first_obs[episode], their_first_obs, atol=1e-6)
        np.testing.assert_allclose(our_obs, obs, rtol=0, atol=2e-6 if is_control else 0)
        np.testing.assert_allclose(our_reward, reward, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(our_terminated, terminated)
        np.testing.assert_array_equal(our_truncated & ~our_terminated, truncated)
    is_solved = not any(name in env_id for name in (*CONTROL, "Bandit", "HigherLower"))
    assert not is_solved or abs(theirs[0][2][2].sum() - 1.0) < 1e-6  # the expert saw the whole game
    assert max(len(episode[2][0]) for episode in theirs) <= game.max_steps
    assert "StatelessCartPole" not in env_id or len(theirs[0][2][0]) == game.max_steps


@pytest.mark.parametrize("env_id", GAMES)
def test_spaces_are_those_of_popgym(env_id):
    env, oracle = make(f"popjaxrl::{env_id}"), popgym_env(env_id)
    if isinstance(env.action_space, Discrete):
        space = oracle.action_space
        sizes = space.nvec if hasattr(space, "nvec") else [space.n]
        assert env.action_space.n == np.prod(sizes)
    else:
        np.testing.assert_array_equal(env.action_space.high, oracle.action_space.high)
    if isinstance(oracle.observation_space, gymnasium.spaces.Box):
        np.testing.assert_allclose(
            np.broadcast_to(env.observation_space.high, 2), oracle.observation_space.high
        )
        np.testing.assert_allclose(
            np.broadcast_to(env.observation_space.low, 2), oracle.observation_space.low
        )
    obs, _ = jax.eval_shape(env.reset, jax.random.key(0))
    assert (
        obs.shape
        == env.observation_space.shape
        == as_shown(oracle.reset()[0], oracle.observation_space).shape
    )


# --- How episodes begin --------------------------------------------------------------------------


def deals(env_id, number):
    return jax.device_get(
        jax.jit(jax.vmap(GAMES[env_id]().deal))(jax.random.split(jax.random.key(0), number))
    )


@pytest.mark.parametrize(
    ("env_id", "size", "kinds"), [("RepeatFirstEasy", 52, 4), ("HigherLowerMedium", 104, 13)]
)
def test_decks_are_shuffled(env_id, size, kinds):
    decks = deals(env_id, 4000)
    assert decks.shape == (4000, size)
    for kind in range(kinds):
        assert ((decks == kind).sum(axis=1) == size // kinds).all()
        places = (decks == kind).mean(axis=0)  # of 4000: a standard deviation of at most 0.007
        assert np.abs(places - 1 / kinds).max() < 0.035
    followers = (decks[:, 0] == decks[:, 1]).mean()
    assert abs(followers - (size // kinds - 1) / (size - 1)) < 0.035


def test_the_two_decks_of_count_recall_are_independent():
    cards, questions = deals("CountRecallEasy", 2000)
    assert abs((cards[:, 0] == questions[:, 0]).mean() - 0.5) < 0.05


def test_ships_lie_as_likely_as_popgym_lays_them():
    number, size = 20_000, 8
    boards = deals("BattleshipEasy", number)
    assert (boards.sum(axis=(1, 2)) == sum(SHIPS)).all()
    oracle, counts = popgym_env("BattleshipEasy"), np.zeros((size, size))
    oracle.reset(seed=0)
    for _ in range(3000):
        counts += functools.reduce(oracle.place_ship, SHIPS, np.zeros((size, size), np.int8))
    np.testing.assert_allclose(
        boards.mean(axis=0), counts / 3000, atol=0.035
    )  # standard deviation 0.008
    for symmetric in (boards[:, ::-1], boards[:, :, ::-1], boards.transpose(0, 2, 1)):
        np.testing.assert_allclose(boards.mean(axis=0), symmetric.mean(axis=0), atol=0.02)


def test_mines_lie_anywhere():
    boards = deals("MinesweeperHard", 4000)
    assert (boards.sum(axis=(1, 2)) == 10).all() and set(np.unique(boards)) == {0, 1}
    np.testing.assert_allclose(boards.mean(axis=0), 10 / 64, atol=0.03)


@pytest.mark.parametrize(
    ("env_id", "low", "high"),
    [
        ("StatelessCartPoleEasy", -0.05, 0.05),
        ("StatelessPendulumEasy", [-np.pi, -1.0], [np.pi, 1.0]),
        ("MultiArmedBanditEasy", 0.0, 1.0),
    ],
)
def test_physics_begin_uniformly(env_id, low, high):
    states = (deals(env_id, 4000) - np.asarray(low)) / (np.asarray(high) - np.asarray(low))
    assert states.min() >= 0 and states.max() <= 1
    for quantile in (0.1, 0.5, 0.9):
        np.testing.assert_allclose(np.quantile(states, quantile, axis=0), quantile, atol=0.04)


def test_noise_is_normal_and_clipped():
    env = make("popjaxrl::NoisyStatelessCartPoleHard")
    first = np.asarray(
        jax.jit(jax.vmap(lambda key: env.reset(key)[0]))(jax.random.split(jax.random.key(0), 4000))
    )
    assert (
        abs(first[:, 0].std() - np.hypot(0.3, 0.1 / 12**0.5)) < 0.02
        and abs(first[:, 0].mean()) < 0.03
    )
    assert np.abs(first[:, 1]).max() == np.float32(2 * 12 * 2 * np.pi / 360)


def test_names_of_popgym_lead_to_those_here():
    for theirs, ours in (
        ("PositionOnlyCartPoleEasy", "StatelessCartPoleEasy"),
        ("MineSweeperHard", "MinesweeperHard"),
    ):
        with pytest.raises(ValueError, match=f"did you mean 'popjaxrl::{ours}'"):
            make(f"popjaxrl::{theirs}")
