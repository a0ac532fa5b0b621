"""The namespace `popjaxrl`: the POPGym benchmark (Morad et al. 2023, arXiv 2303.01859) in JAX.

The ids are those of popjaxrl (Lu et al. 2023, arXiv 2303.03982). The rules are those of the package
popgym 1.0.7: a test compares every id with it, step by step. An id ends with its difficulty: Easy,
Medium or Hard.

Returns published for popjaxrl are not comparable, since popjaxrl has other rules:

  Autoencode        shows nothing while watching, and the cards while playing
  CountRecall       has 2 actions, too few for Medium and Hard, and does not count the last card
  RepeatPrevious    asks for the card of k steps ago, popgym for that of k - 1 steps ago
  RepeatFirst, HigherLower, RepeatPrevious, CountRecall
                    have episodes that are one step longer
  Minesweeper       does not show some numbers of mines, and does not end when the game is won
  NoisyStatelessPendulum
                    does not clip noisy observations
  all               have one flag for the end of an episode; here time limits truncate, and
                    everything else terminates

VelocityOnlyCartPole is a family of popgym that popjaxrl does not have. Where popgym names a family
differently (`POPGYM_NAMES`), errors point to the name used here.

Observations are float32 vectors. A number below n is shown as a one-hot vector of size n; several
numbers follow each other. An action that is a pair (row, column) is the number
row * width + column. popgym and popjaxrl advise to show the agent its last action
(AliasPrevAction); the recurrent scripts do so in every environment.

A deck has 52 cards: 4 suits, 13 ranks, 2 colours, each equally often. No return is greater than 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from env_adapters.task import Box, Discrete, Task
from env_adapters.wrappers import check_options

KINDS = {"colors": 2, "suits": 4, "ranks": 13}


@dataclass(frozen=True, eq=False)
class Game:
    """A task in parts, so that a test can begin an episode with a given hidden state.

    Attributes:
      deal: key -> hidden, what the agent does not see: cards, a board, probabilities.
      begin: (key, hidden) -> (obs, state).
      step: (key, state, action) -> (obs, state, reward, terminated, truncated).
      action_mask: state -> (num_actions,) bool, the actions that have not been taken in vain.
    """

    deal: Callable
    begin: Callable
    step: Callable
    observation_space: Box
    action_space: Box | Discrete
    max_steps: int
    action_mask: Callable | None = None

    def task(self, invalid_actions: bool = False) -> Task:
        """The game as a `Task`; `invalid_actions`: with its action mask."""

        def reset(key):
            deal_key, begin_key = jax.random.split(key)
            return self.begin(begin_key, self.deal(deal_key))

        return Task(
            reset=reset,
            step=self.step,
            observation_space=self.observation_space,
            action_space=self.action_space,
            max_steps=self.max_steps,
            action_mask=self.action_mask if invalid_actions else None,
        )


def one_hot(value, size):
    """A number, or a truth value, as a one-hot vector (size,) float32."""
    return jax.nn.one_hot(jnp.asarray(value, jnp.int32), size)


def one_hots(values, sizes):
    """Numbers as one-hot vectors, one after the other: (sum of sizes,) float32."""
    vectors = [one_hot(value, size) for value, size in zip(values, sizes, strict=True)]
    return jnp.concatenate(vectors)


def one_hot_space(*sizes) -> Box:
    """The space of `one_hots`."""
    return Box(0.0, 1.0, (sum(sizes),))


def shuffled(key, num_cards, kind):
    """The suits, ranks or colours of shuffled decks: (num_cards,) int32."""
    return jax.random.permutation(key, jnp.arange(num_cards, dtype=jnp.int32) % KINDS[kind])


def right_or_wrong(right, scale):
    """The reward `scale` for a right answer, -`scale` for a wrong one."""
    return jnp.where(right, scale, -scale)


# --- Decks that are dealt card by card -----------------------------------------------------------
# An episode terminates with the last card.


def card_game(num_cards: int, kind: str, num_actions: int, reward: Callable) -> Game:
    """A deck whose cards are shown one by one, as they are dealt.

    Args:
      reward: (cards, time, action) -> reward of step `time`, counted from 0; cards[time] is the
        last card dealt before it.
    """
    size = KINDS[kind]

    def begin(key, cards):
        return one_hot(cards[0], size), (jnp.int32(0), cards)

    def step(key, state, action):
        time, cards = state
        terminated = time + 1 == num_cards - 1
        obs = one_hot(cards[time + 1], size)
        return obs, (time + 1, cards), reward(cards, time, action), terminated, False

    return Game(
        deal=partial(shuffled, num_cards=num_cards, kind=kind),
        begin=begin,
        step=step,
        observation_space=one_hot_space(size),
        action_space=Discrete(num_actions),
        max_steps=num_cards - 1,
    )


def repeat_first(decks: int) -> Game:
    """Remember the first card.

    Seen: the suit of the card just dealt.
    Rewarded, at every step: naming the suit of the first card.
    """
    num_cards = 52 * decks

    def reward(cards, time, action):
        return right_or_wrong(action == cards[0], 1 / (num_cards - 1))

    return card_game(num_cards, "suits", 4, reward)


def repeat_previous(decks: int, k: int) -> Game:
    """Remember the last k cards.

    Seen: the suit of the card just dealt.
    Rewarded, once k cards are dealt: naming the suit of the card dealt k - 1 before it.
    """
    num_cards = 52 * decks

    def reward(cards, time, action):
        right = action == cards[jnp.maximum(time - (k - 1), 0)]
        return jnp.where(time >= k - 1, right_or_wrong(right, 1 / (num_cards - k)), 0.0)

    return card_game(num_cards, "suits", 4, reward)


def higher_lower(decks: int) -> Game:
    """Count cards to guess the next one.

    Seen: the rank of the card just dealt.
    Rewarded: guessing whether the next rank is higher (0) or lower (1). Equal ranks give 0.
    """
    num_cards = 52 * decks

    def reward(cards, time, action):
        change = cards[time + 1] - cards[time]
        is_tie = change == 0
        right = (change > 0) == (action == 0)
        return jnp.where(is_tie, 0.0, right_or_wrong(right, 1 / num_cards))

    return card_game(num_cards, "ranks", 2, reward)


def count_recall(decks: int, kind: str) -> Game:
    """Count the cards of every kind.

    Seen: the card just dealt, and a card that is asked about.
    Rewarded: how many cards of that kind have been dealt, the one just dealt included.
    """
    num_cards = 52 * decks
    size = KINDS[kind]

    def deal(key):
        """The cards that are dealt, and the cards that are asked about."""
        return tuple(shuffled(key, num_cards, kind) for key in jax.random.split(key))

    def begin(key, hidden):
        cards, questions = hidden
        counts = jnp.zeros(size, jnp.int32).at[cards[0]].add(1)
        obs = one_hots([cards[0], questions[0]], [size, size])
        return obs, (jnp.int32(0), cards, questions, counts)

    def step(key, state, action):
        time, cards, questions, counts = state
        reward = right_or_wrong(action == counts[questions[time]], 1 / (num_cards - 1))
        time = time + 1
        obs = one_hots([cards[time], questions[time]], [size, size])
        counts = counts.at[cards[time]].add(1)
        return obs, (time, cards, questions, counts), reward, time == num_cards - 1, False

    return Game(
        deal=deal,
        begin=begin,
        step=step,
        observation_space=one_hot_space(size, size),
        action_space=Discrete(num_cards // size + 1),
        max_steps=num_cards - 1,
    )


def autoencode(decks: int) -> Game:
    """Watch all cards, then name them in reverse order.

    Seen: whether it is time to watch (1) or to play (0), and the suit of the card just dealt. The
    last card is already shown with a 0; after it the suit shown is always 0.
    Rewarded, while playing: naming the suit of the last card, the one before it, and so on.
    """
    num_cards = 52 * decks

    def begin(key, cards):
        return one_hots([1, cards[0]], [2, 4]), (jnp.int32(0), cards)

    def step(key, state, action):
        time, cards = state
        played = time - (num_cards - 1)  # cards named before this step; negative while watching
        right = action == cards[jnp.clip(num_cards - 1 - played, 0, num_cards - 1)]
        reward = jnp.where(played >= 0, right_or_wrong(right, 1 / num_cards), 0.0)
        suit = jnp.where(played >= 0, 0, cards[jnp.minimum(time + 1, num_cards - 1)])
        obs = one_hots([played < -1, suit], [2, 4])
        return obs, (time + 1, cards), reward, played == num_cards - 1, False

    return Game(
        deal=partial(shuffled, num_cards=num_cards, kind="suits"),
        begin=begin,
        step=step,
        observation_space=one_hot_space(2, 4),
        action_space=Discrete(4),
        max_steps=2 * num_cards - 1,
    )


# --- Boards --------------------------------------------------------------------------------------


def concentration(decks: int, kind: str) -> Game:
    """Find pairs of equal cards among cards that lie face down.

    An action turns a card over. The second card of a pair stays open with the first if they match;
    otherwise both are shown once and closed again.

    Seen: every card, by its kind or as face down.
    Rewarded: a pair. Punished: two cards that differ, the same card twice, a card that is open.
    Terminates when all cards are open. Truncates after about twice as many steps as cards.
    """
    num_cards = 52 * decks
    face_down = KINDS[kind]
    max_steps = int(np.ceil(2 * num_cards - num_cards / (2 * num_cards - 1)))

    def begin(key, cards):
        obs = one_hot(jnp.full(num_cards, face_down), face_down + 1).reshape(-1)
        is_open = jnp.zeros(num_cards, bool)
        return obs, (jnp.int32(0), cards, is_open, jnp.int32(-1))

    def step(key, state, action):
        # first: the card turned over in the step before; -1 if the next card begins a pair.
        time, cards, is_open, first = state
        is_second = first >= 0
        visible = is_open.at[action].set(True) | (jnp.arange(num_cards) == first)
        obs = one_hot(jnp.where(visible, cards, face_down), face_down + 1).reshape(-1)
        was_open = is_open[action]
        match = is_second & ~was_open & (cards[first] == cards[action]) & (first != action)
        pair_reward = jnp.where(match, 2 / num_cards, -2 / max_steps)
        reward = jnp.where(
            was_open,
            -(1 + is_second) / max_steps,
            jnp.where(is_second, pair_reward, 0.0),
        )
        is_open = jnp.where(match, visible, is_open)
        first = jnp.where(was_open | is_second, -1, action)
        return obs, (time + 1, cards, is_open, first), reward, is_open.all(), time + 1 >= max_steps

    return Game(
        deal=partial(shuffled, num_cards=num_cards, kind=kind),
        begin=begin,
        step=step,
        observation_space=Box(0.0, 1.0, (num_cards * (face_down + 1),)),
        action_space=Discrete(num_cards),
        max_steps=max_steps,
    )


SHIPS = (2, 3, 3, 4)  # lengths


def battleship(size: int) -> Game:
    """Sink four ships on a hidden board of size x size squares.

    Seen: whether the last shot was a hit; a second shot at the same square is not.
    Rewarded: a hit. Punished: any other shot.
    Terminates when all ships are sunk. Truncates after size * size shots.
    """
    num_targets = sum(SHIPS)
    max_steps = size * size

    def places(free, length):
        """Where a row of `length` free squares to the right begins: (size, size) bool."""
        padded = jnp.pad(free, ((0, 0), (0, length)))
        return jnp.stack([padded[:, i : i + size] for i in range(length)]).all(axis=0)

    def deal(key):
        board = jnp.zeros((size, size), bool)
        for ship_key, length in zip(jax.random.split(key, len(SHIPS)), SHIPS, strict=True):
            possible = jnp.stack([places(~board, length), places(~board.T, length).T])
            logits = jnp.where(possible.reshape(-1), 0.0, -jnp.inf)
            place = jax.random.categorical(ship_key, logits)
            down, row, column = jnp.unravel_index(place, possible.shape)
            along = jnp.arange(length)
            board = board.at[row + down * along, column + (1 - down) * along].set(True)
        return board

    def begin(key, board):
        return one_hot(0, 2), (jnp.int32(0), board, jnp.zeros((size, size), bool))

    def step(key, state, action):
        time, board, shots = state
        place = (action // size, action % size)
        hit = board[place] & ~shots[place]
        shots = shots.at[place].set(True)
        reward = jnp.where(hit, 1 / num_targets, -1 / (max_steps - num_targets))
        terminated = (shots | ~board).all()
        return one_hot(hit, 2), (time + 1, board, shots), reward, terminated, time + 1 >= max_steps

    return Game(
        deal=deal,
        begin=begin,
        step=step,
        observation_space=one_hot_space(2),
        action_space=Discrete(size * size),
        max_steps=max_steps,
        action_mask=lambda state: ~state[2].reshape(-1),  # squares that were not shot at
    )


CLEAR, MINE, VIEWED = 0, 1, 2


def minesweeper(size: int, num_mines: int) -> Game:
    """View all squares without a mine on a hidden board of size x size squares.

    Seen: the number of mines on and around the square just viewed.
    Rewarded: a square not viewed before. Punished: a square viewed before; a mine.
    Terminates at a mine and when the game is won. Truncates after as many steps as winning needs.
    """
    max_steps = size * size - num_mines
    num_counts = min(num_mines + 1, 10)

    def deal(key):
        mines = jax.random.choice(key, size * size, (num_mines,), replace=False)
        return jnp.zeros(size * size, jnp.int32).at[mines].set(MINE).reshape(size, size)

    def begin(key, board):
        padded = jnp.pad((board == MINE).astype(jnp.int32), 1)
        shifts = [(i, j) for i in range(3) for j in range(3)]
        neighbors = sum(padded[i : i + size, j : j + size] for i, j in shifts)
        return one_hot(0, num_counts), (jnp.int32(0), board, neighbors)

    def step(key, state, action):
        time, board, neighbors = state
        place = (action // size, action % size)
        square = board[place]
        gain = 1 / max_steps
        reward = jnp.select(
            [square == CLEAR, square == VIEWED],
            [gain, -0.5 / (max_steps - 2)],
            default=-0.5 - gain,
        )
        board = board.at[place].set(jnp.where(square == CLEAR, VIEWED, square))
        terminated = (square == MINE) | (board != CLEAR).all()
        state = (time + 1, board, neighbors)
        obs = one_hot(neighbors[place], num_counts)
        return obs, state, reward, terminated, time + 1 == max_steps

    return Game(
        deal=deal,
        begin=begin,
        step=step,
        observation_space=one_hot_space(num_counts),
        action_space=Discrete(size * size),
        max_steps=max_steps,
        action_mask=lambda state: (state[1] != VIEWED).reshape(-1),
    )


# --- Bandits and control -------------------------------------------------------------------------


def bandit(num_arms: int, max_steps: int) -> Game:
    """Find the arm that pays most often; each arm pays with its own probability from U[0, 1).

    Seen: whether the last arm paid.
    Rewarded: an arm that pays. Punished: one that does not.
    Truncates after max_steps.
    """

    def begin(key, payout):
        return one_hot(0, 2), (jnp.int32(0), payout)

    def step(key, state, action):
        time, payout = state
        pays = jax.random.uniform(key) < payout[action]
        reward = right_or_wrong(pays, 1 / max_steps)
        return one_hot(pays, 2), (time + 1, payout), reward, False, time + 1 >= max_steps

    return Game(
        deal=partial(jax.random.uniform, shape=(num_arms,)),
        begin=begin,
        step=step,
        observation_space=one_hot_space(2),
        action_space=Discrete(num_arms),
        max_steps=max_steps,
    )


def noisy(key, obs, noise, high):
    """obs with normal noise, clipped to [-high, high]; unchanged if `noise` is 0.

    Args:
      noise: the standard deviation, a Python number.
    """
    return jnp.clip(obs + noise * jax.random.normal(key, obs.shape), -high, high) if noise else obs


def cart_pole(max_steps: int, noise: float = 0.0, velocity_only: bool = False) -> Game:
    """Balance a pole on a cart, with the physics of gymnasium's CartPole-v1.

    Seen: position and angle, with noise or without. With `velocity_only`: their velocities, except
    in the first observation, which popgym fills with position and angle.
    Rewarded: every step.
    Terminates when the pole falls or the cart leaves the track. Truncates after max_steps.
    """
    max_angle = 12 * 2 * np.pi / 360
    high = np.array([4.8, 2 * max_angle], np.float32)

    def begin(key, physics):
        return noisy(key, physics[::2], noise, high), (jnp.int32(0), physics)

    def step(key, state, action):
        time, physics = state
        x, x_dot, theta, theta_dot = physics
        force = jnp.where(action == 1, 10.0, -10.0)
        sin = jnp.sin(theta)
        cos = jnp.cos(theta)
        push = (force + 0.05 * theta_dot**2 * sin) / 1.1
        theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        x_acc = push - 0.05 * theta_acc * cos / 1.1
        physics = physics + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc])
        obs = physics[1::2] if velocity_only else noisy(key, physics[::2], noise, high)
        terminated = (jnp.abs(physics[0]) > 2.4) | (jnp.abs(physics[2]) > max_angle)
        return obs, (time + 1, physics), 1 / max_steps, terminated, time + 1 >= max_steps

    return Game(
        deal=partial(jax.random.uniform, shape=(4,), minval=-0.05, maxval=0.05),
        begin=begin,
        step=step,
        observation_space=Box(-np.inf, np.inf, (2,)) if velocity_only else Box(-high, high, (2,)),
        action_space=Discrete(2),
        max_steps=max_steps,
    )


def pendulum(max_steps: int, noise: float = 0.0) -> Game:
    """Swing a pendulum up, with the physics of gymnasium's Pendulum-v1.

    Seen: cosine and sine of its angle, with noise or without.
    Rewarded: an upright, slow pendulum and little torque, between -1 and 1 over max_steps.
    Truncates after max_steps.
    """
    half_of_highest_cost = 8.1368022

    def begin(key, physics):
        theta = physics[0]
        obs = jnp.stack([jnp.cos(theta), jnp.sin(theta)])
        return noisy(key, obs, noise, 1.0), (jnp.int32(0), physics)

    def step(key, state, action):
        time, (theta, theta_dot) = state
        torque = action[0]
        angle = (theta + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = angle**2 + 0.1 * theta_dot**2 + 0.001 * torque**2
        theta_dot = jnp.clip(theta_dot + 0.05 * (15.0 * jnp.sin(theta) + 3.0 * torque), -8.0, 8.0)
        obs, (_, physics) = begin(key, jnp.stack([theta + 0.05 * theta_dot, theta_dot]))
        reward = (1.0 - cost / half_of_highest_cost) / max_steps
        return obs, (time + 1, physics), reward, False, time + 1 >= max_steps

    def deal(key):
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])

    return Game(
        deal=deal,
        begin=begin,
        step=step,
        observation_space=Box(-1.0, 1.0, (2,)),
        action_space=Box(-2.0, 2.0, (1,)),
        max_steps=max_steps,
    )


# --- Ids -----------------------------------------------------------------------------------------

# family -> (function, its arguments when easy, medium and hard)
FAMILIES: dict[str, tuple[Callable[..., Game], tuple[Any, Any, Any]]] = {
    "Autoencode": (autoencode, ((1,), (2,), (3,))),
    "Battleship": (battleship, ((8,), (10,), (12,))),
    "Concentration": (concentration, ((1, "colors"), (2, "colors"), (1, "ranks"))),
    "CountRecall": (count_recall, ((1, "colors"), (2, "suits"), (4, "ranks"))),
    "HigherLower": (higher_lower, ((1,), (2,), (3,))),
    "Minesweeper": (minesweeper, ((4, 2), (6, 6), (8, 10))),
    "MultiArmedBandit": (bandit, ((10, 200), (20, 400), (30, 600))),
    "NoisyStatelessCartPole": (cart_pole, ((200, 0.1), (200, 0.2), (200, 0.3))),
    "NoisyStatelessPendulum": (pendulum, ((200, 0.1), (200, 0.2), (200, 0.3))),
    "RepeatFirst": (repeat_first, ((1,), (8,), (16,))),
    "RepeatPrevious": (repeat_previous, ((1, 4), (2, 32), (3, 64))),
    "StatelessCartPole": (cart_pole, ((200,), (400,), (600,))),
    "StatelessPendulum": (pendulum, ((200,), (150,), (100,))),
    "VelocityOnlyCartPole": (cart_pole, ((200, 0.0, True), (400, 0.0, True), (600, 0.0, True))),
}
LEVELS = ("Easy", "Medium", "Hard")
GAMES = {
    family + level: partial(function, *arguments)
    for family, (function, levels) in FAMILIES.items()
    for level, arguments in zip(LEVELS, levels, strict=True)
}

# popgym's name for a family -> its name here, where they differ
POPGYM_NAMES = {
    "MineSweeper": "Minesweeper",
    "MultiarmedBandit": "MultiArmedBandit",
    "NoisyPositionOnlyCartPole": "NoisyStatelessCartPole",
    "NoisyPositionOnlyPendulum": "NoisyStatelessPendulum",
    "PositionOnlyCartPole": "StatelessCartPole",
    "PositionOnlyPendulum": "StatelessPendulum",
    "VelocityOnlyCartpole": "VelocityOnlyCartPole",
}


def ids() -> list[str]:
    """The 42 ids: 14 families, each Easy, Medium and Hard."""
    return list(GAMES)


def make_task(env_id: str, **options) -> Task:
    """A task of POPGym.

    Args:
      invalid_actions: True: squares that have been played are ruled out by an action mask.
        Battleship and Minesweeper have this option.

    Raises:
      ValueError: the game has no such option.
    """
    game = GAMES[env_id]()
    check_options(
        f"popjaxrl::{env_id}", options, {"invalid_actions": False} if game.action_mask else {}
    )
    return game.task(**options)
