"""The POPGym benchmark (Morad et al. 2023, arXiv 2303.01859) in JAX: the namespace `popjaxrl`.

The ids are those of popjaxrl (Lu et al. 2023, arXiv 2303.03982), the rules those of the package popgym 1.0.7, which
tests/test_popjaxrl.py compares every id with, step by step. The end of an id is its difficulty: Easy, Medium or Hard.
What popjaxrl does otherwise, so that returns published for it are not to be compared with:

  Autoencode      popjaxrl shows nothing while watching and the cards while playing; here it is as popgym has it
  CountRecall     popjaxrl has 2 actions, too few for Medium and Hard, and does not count the card just dealt
  RepeatPrevious  popjaxrl asks for the card of k steps ago, popgym for that of k - 1 steps ago
  RepeatFirst, HigherLower, RepeatPrevious, CountRecall   popjaxrl's episodes are a step longer
  Minesweeper     in popjaxrl some numbers of mines are not shown, and a won game goes on
  NoisyStatelessPendulum                                  popjaxrl does not clip the noisy observation
  all             termination and truncation are told apart: here time limits truncate, all else terminates

Every task has one id: popgym's own names (`POPGYM_NAMES`) are answered with those here. VelocityOnlyCartPole is one
of popgym's that popjaxrl does not have.

Observations are vectors of float32: a number below n is shown as a one-hot vector of size n, several of them one after
the other. Actions that are pairs (row, column) are the number row * width + column. popgym and popjaxrl advise to show
the agent its last action (AliasPrevAction); the scripts with memory do so in every environment.

Decks hold 52 cards: 4 suits, 13 ranks, 2 colours, each equally often. All returns are at most 1.
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
    """A task in pieces, so that an episode can begin with a given hidden state.

    deal: key -> hidden
    begin: (key, hidden) -> (obs, state)
    step: (key, state, action) -> (obs, state, reward, terminated, truncated)
    """

    deal: Callable
    begin: Callable
    step: Callable
    observation_space: Box
    action_space: Box | Discrete
    max_steps: int

    def task(self) -> Task:
        def reset(key):
            deal_key, begin_key = jax.random.split(key)
            return self.begin(begin_key, self.deal(deal_key))

        return Task(reset, self.step, self.observation_space, self.action_space, self.max_steps)


def one_hot(value, size):
    """A number, or a truth value, as a one-hot vector."""
    return jax.nn.one_hot(jnp.asarray(value, jnp.int32), size)


def one_hots(values, sizes):
    """Numbers as one-hot vectors, one after the other."""
    return jnp.concatenate([one_hot(value, size) for value, size in zip(values, sizes, strict=True)])


def shuffled(key, num_cards, kind):
    """Decks of which only the `kind` of a card counts: (num_cards,) int32."""
    return jax.random.permutation(key, jnp.arange(num_cards, dtype=jnp.int32) % KINDS[kind])


def right_or_wrong(right, scale):
    return jnp.where(right, scale, -scale)


# ---------------------------------------------------------------------------------------------------------------------
# Decks that are dealt card by card. An episode terminates with the last card.


def card_game(num_cards: int, kind: str, num_actions: int, reward: Callable) -> Game:
    """One deck, of which every card is shown when it is dealt. reward: (cards, steps before this one, action)."""

    def begin(key, cards):
        return one_hot(cards[0], KINDS[kind]), (jnp.int32(0), cards)

    def step(key, state, action):
        time, cards = state
        ends = time + 1 == num_cards - 1
        return one_hot(cards[time + 1], KINDS[kind]), (time + 1, cards), reward(cards, time, action), ends, False

    deal = partial(shuffled, num_cards=num_cards, kind=kind)
    return Game(deal, begin, step, Box(0.0, 1.0, (KINDS[kind],)), Discrete(num_actions), num_cards - 1)


def repeat_first(decks: int) -> Game:
    """Seen: the suit of the card just dealt. Rewarded at every step: naming the suit of the first card."""
    num_cards = 52 * decks
    reward = lambda cards, time, action: right_or_wrong(action == cards[0], 1 / (num_cards - 1))  # noqa: E731
    return card_game(num_cards, "suits", 4, reward)


def repeat_previous(decks: int, k: int) -> Game:
    """Seen: the suit of the card just dealt. Rewarded once k are dealt: naming the suit of k - 1 cards before it."""
    num_cards = 52 * decks

    def reward(cards, time, action):
        right = action == cards[jnp.maximum(time - (k - 1), 0)]
        return jnp.where(time >= k - 1, right_or_wrong(right, 1 / (num_cards - k)), 0.0)

    return card_game(num_cards, "suits", 4, reward)


def higher_lower(decks: int) -> Game:
    """Seen: the rank of the card just dealt. Rewarded: telling if the next is higher (0) or lower (1); ties give 0."""
    num_cards = 52 * decks

    def reward(cards, time, action):
        change = cards[time + 1] - cards[time]
        return jnp.where(change == 0, 0.0, right_or_wrong((change > 0) == (action == 0), 1 / num_cards))

    return card_game(num_cards, "ranks", 2, reward)


def count_recall(decks: int, kind: str) -> Game:
    """Seen: a card, and another one that is asked about. Rewarded: how many of those were dealt, this one included."""
    num_cards, size = 52 * decks, KINDS[kind]

    def deal(key):
        return tuple(shuffled(key, num_cards, kind) for key in jax.random.split(key))

    def begin(key, hidden):
        cards, questions = hidden
        counts = jnp.zeros(size, jnp.int32).at[cards[0]].add(1)
        return one_hots([cards[0], questions[0]], [size, size]), (jnp.int32(0), cards, questions, counts)

    def step(key, state, action):
        time, cards, questions, counts = state
        reward = right_or_wrong(action == counts[questions[time]], 1 / (num_cards - 1))
        time = time + 1
        obs = one_hots([cards[time], questions[time]], [size, size])
        return obs, (time, cards, questions, counts.at[cards[time]].add(1)), reward, time == num_cards - 1, False

    return Game(deal, begin, step, Box(0.0, 1.0, (2 * size,)), Discrete(num_cards // size + 1), num_cards - 1)


def autoencode(decks: int) -> Game:
    """Seen: is it time to watch (1) or to play (0), and the suit of the card just dealt; suit 0 while playing.

    With the last card it is time to play. Rewarded while playing: naming the suits in reverse order.
    """
    num_cards = 52 * decks

    def begin(key, cards):
        return one_hots([1, cards[0]], [2, 4]), (jnp.int32(0), cards)

    def step(key, state, action):
        time, cards = state
        played = time - (num_cards - 1)  # cards named before; negative while watching
        right = action == cards[jnp.clip(num_cards - 1 - played, 0, num_cards - 1)]
        reward = jnp.where(played >= 0, right_or_wrong(right, 1 / num_cards), 0.0)
        suit = jnp.where(played >= 0, 0, cards[jnp.minimum(time + 1, num_cards - 1)])
        return one_hots([played < -1, suit], [2, 4]), (time + 1, cards), reward, played == num_cards - 1, False

    deal = partial(shuffled, num_cards=num_cards, kind="suits")
    return Game(deal, begin, step, Box(0.0, 1.0, (6,)), Discrete(4), 2 * num_cards - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Boards


def concentration(decks: int, kind: str) -> Game:
    """Find pairs among cards that lie face down.

    Seen: of every card its kind, or that it is face down. An action turns a card; the second one that is turned stays
    open with the first if they match, and both are closed otherwise: this is still seen, once.
    Rewarded: a pair. Punished: no pair, the same card twice, a card that is open already.
    Terminates when all cards are open, truncates after about twice as many steps as there are cards.
    """
    num_cards, face_down = 52 * decks, KINDS[kind]
    max_steps = int(np.ceil(2 * num_cards - num_cards / (2 * num_cards - 1)))

    def begin(key, cards):
        obs = one_hot(jnp.full(num_cards, face_down), face_down + 1).reshape(-1)
        return obs, (jnp.int32(0), cards, jnp.zeros(num_cards, bool), jnp.int32(-1))

    def step(key, state, action):
        time, cards, is_open, first = state  # first: the card turned in the step before, -1 if this begins a pair
        second = first >= 0
        visible = is_open.at[action].set(True) | (jnp.arange(num_cards) == first)
        obs = one_hot(jnp.where(visible, cards, face_down), face_down + 1).reshape(-1)
        was_open = is_open[action]
        match = second & ~was_open & (cards[first] == cards[action]) & (first != action)
        pair = jnp.where(match, 2 / num_cards, -2 / max_steps)
        reward = jnp.where(was_open, -(1 + second) / max_steps, jnp.where(second, pair, 0.0))
        is_open = jnp.where(match, visible, is_open)
        first = jnp.where(was_open | second, -1, action)
        return obs, (time + 1, cards, is_open, first), reward, is_open.all(), time + 1 >= max_steps

    deal = partial(shuffled, num_cards=num_cards, kind=kind)
    return Game(deal, begin, step, Box(0.0, 1.0, (num_cards * (face_down + 1),)), Discrete(num_cards), max_steps)


SHIPS = (2, 3, 3, 4)


def battleship(size: int) -> Game:
    """Sink four ships on a board of size x size that is not shown.

    Seen: has the last shot hit (a second shot at the same place has not). Rewarded: a hit. Punished: anything else.
    Terminates when all are sunk, truncates after size * size shots.
    """
    to_hit, max_steps = sum(SHIPS), size * size

    def places(free, length):
        """Where `length` free squares begin, in a row to the right."""
        padded = jnp.pad(free, ((0, 0), (0, length)))
        return jnp.stack([padded[:, i : i + size] for i in range(length)]).all(axis=0)

    def deal(key):
        board = jnp.zeros((size, size), bool)
        for ship_key, length in zip(jax.random.split(key, len(SHIPS)), SHIPS, strict=True):
            possible = jnp.stack([places(~board, length), places(~board.T, length).T])
            place = jax.random.categorical(ship_key, jnp.where(possible.reshape(-1), 0.0, -jnp.inf))
            down, row, column = jnp.unravel_index(place, possible.shape)
            along = jnp.arange(length)
            board = board.at[row + down * along, column + (1 - down) * along].set(True)
        return board

    def begin(key, board):
        return one_hot(0, 2), (jnp.int32(0), board, jnp.zeros((size, size), bool))

    def step(key, state, action):
        time, board, shots = state
        place = action // size, action % size
        hit = board[place] & ~shots[place]
        shots = shots.at[place].set(True)
        reward = jnp.where(hit, 1 / to_hit, -1 / (max_steps - to_hit))
        sunk = (shots | ~board).all()
        return one_hot(hit, 2), (time + 1, board, shots), reward, sunk, time + 1 >= max_steps

    return Game(deal, begin, step, Box(0.0, 1.0, (2,)), Discrete(size * size), max_steps)


CLEAR, MINE, VIEWED = 0, 1, 2


def minesweeper(size: int, num_mines: int) -> Game:
    """View all squares of a board of size x size but those with a mine; the board is not shown.

    Seen: the number of mines on and around the square just viewed. Rewarded: a square not viewed before.
    Punished: one viewed before; a mine, which terminates, as winning does. Truncates after as many steps as are needed.
    """
    max_steps = size * size - num_mines
    counts = min(num_mines + 1, 10)

    def deal(key):
        mines = jax.random.choice(key, size * size, (num_mines,), replace=False)
        return jnp.zeros(size * size, jnp.int32).at[mines].set(MINE).reshape(size, size)

    def begin(key, board):
        padded = jnp.pad((board == MINE).astype(jnp.int32), 1)
        shifts = [(i, j) for i in range(3) for j in range(3)]
        neighbors = sum(padded[i : i + size, j : j + size] for i, j in shifts)
        return one_hot(0, counts), (jnp.int32(0), board, neighbors)

    def step(key, state, action):
        time, board, neighbors = state
        place = action // size, action % size
        square, reward = board[place], 1 / max_steps
        reward = jnp.select([square == CLEAR, square == VIEWED], [reward, -0.5 / (max_steps - 2)], -0.5 - reward)
        board = board.at[place].set(jnp.where(square == CLEAR, VIEWED, square))
        terminated = (square == MINE) | (board != CLEAR).all()
        state = time + 1, board, neighbors
        return one_hot(neighbors[place], counts), state, reward, terminated, time + 1 == max_steps

    return Game(deal, begin, step, Box(0.0, 1.0, (counts,)), Discrete(size * size), max_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Bandits and control


def bandit(num_arms: int, max_steps: int) -> Game:
    """Find the arm that pays most often; each pays with a probability of its own, uniform in [0, 1).

    Seen: has the last arm paid. Rewarded: that it has, and punished that it has not. Truncates.
    """

    def begin(key, payout):
        return one_hot(0, 2), (jnp.int32(0), payout)

    def step(key, state, action):
        time, payout = state
        pays = jax.random.uniform(key) < payout[action]
        reward = right_or_wrong(pays, 1 / max_steps)
        return one_hot(pays, 2), (time + 1, payout), reward, False, time + 1 >= max_steps

    deal = partial(jax.random.uniform, shape=(num_arms,))
    return Game(deal, begin, step, Box(0.0, 1.0, (2,)), Discrete(num_arms), max_steps)


def noisy(key, obs, noise, high):
    """obs with normal noise, clipped to +-high; unchanged where `noise`, its standard deviation, is 0."""
    return jnp.clip(obs + noise * jax.random.normal(key, obs.shape), -high, high) if noise else obs


def cart_pole(max_steps: int, noise: float = 0.0, velocity_only: bool = False) -> Game:
    """Balance a pole on a cart (gymnasium's CartPole-v1).

    Seen: position and angle, with noise or without; or the velocities alone, but position and angle at first, which
    is popgym's doing. Rewarded: every step. Terminates when the pole falls or the cart leaves, truncates at the limit.
    """
    max_angle = 12 * 2 * np.pi / 360
    high = np.array([4.8, 2 * max_angle], np.float32)

    def begin(key, physics):
        return noisy(key, physics[::2], noise, high), (jnp.int32(0), physics)

    def step(key, state, action):
        time, physics = state
        x, x_dot, theta, theta_dot = physics
        force, sin, cos = jnp.where(action == 1, 10.0, -10.0), jnp.sin(theta), jnp.cos(theta)
        push = (force + 0.05 * theta_dot**2 * sin) / 1.1
        theta_acc = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
        x_acc = push - 0.05 * theta_acc * cos / 1.1
        physics = physics + 0.02 * jnp.stack([x_dot, x_acc, theta_dot, theta_acc])
        obs = physics[1::2] if velocity_only else noisy(key, physics[::2], noise, high)
        terminated = (jnp.abs(physics[0]) > 2.4) | (jnp.abs(physics[2]) > max_angle)
        return obs, (time + 1, physics), 1 / max_steps, terminated, time + 1 >= max_steps

    deal = partial(jax.random.uniform, shape=(4,), minval=-0.05, maxval=0.05)
    space = Box(-np.inf, np.inf, (2,)) if velocity_only else Box(-high, high, (2,))
    return Game(deal, begin, step, space, Discrete(2), max_steps)


def pendulum(max_steps: int, noise: float = 0.0) -> Game:
    """Swing a pendulum up (gymnasium's Pendulum-v1).

    Seen: cosine and sine of its angle, with noise or without. Rewarded: upright, slow and without effort, between
    -1 / max_steps and 1 / max_steps. Truncates.
    """

    def begin(key, physics):
        theta = physics[0]
        return noisy(key, jnp.stack([jnp.cos(theta), jnp.sin(theta)]), noise, 1.0), (jnp.int32(0), physics)

    def step(key, state, action):
        time, (theta, theta_dot) = state
        torque = action[0]
        angle = (theta + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = angle**2 + 0.1 * theta_dot**2 + 0.001 * torque**2
        theta_dot = jnp.clip(theta_dot + 0.05 * (15.0 * jnp.sin(theta) + 3.0 * torque), -8.0, 8.0)
        obs, (_, physics) = begin(key, jnp.stack([theta + 0.05 * theta_dot, theta_dot]))
        reward = (1.0 - cost / 8.1368022) / max_steps  # half the highest cost
        return obs, (time + 1, physics), reward, False, time + 1 >= max_steps

    def deal(key):
        return jax.random.uniform(key, (2,), minval=-1.0, maxval=1.0) * jnp.array([jnp.pi, 1.0])

    return Game(deal, begin, step, Box(-1.0, 1.0, (2,)), Box(-2.0, 2.0, (1,)), max_steps)


# ---------------------------------------------------------------------------------------------------------------------
# Ids

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

# popgym's names for families that have another one here
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
    """The ids of `GAMES`."""
    return list(GAMES)


def make_task(env_id: str, **options) -> Task:
    """A task of POPGym; it has no options."""
    check_options(f"popjaxrl::{env_id}", options, {})
    return GAMES[env_id]().task()
