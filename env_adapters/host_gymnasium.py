"""Gymnasium's small tasks as pure functions of a state.

Before every step the simulator is set to the state to step from; after it the state is read back.
Results therefore depend on the arguments only: states can be stepped in any order, stored, and
stepped again.

States are stored in checkpoints, which may come from a stranger. They are data, not programs: what
they consist of is decided here, and a value that no environment can have is moved to one that it
can have.

All functions take and return numpy arrays with any leading axes (...), one row per environment.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FAR = 1e6  # beyond what an episode reaches


@dataclass(frozen=True)
class Floats:
    """An attribute that is an array of floats, or one float; kept as its precision, its numbers.

    The precision matters: MountainCarContinuous is in float64 until its first step.

    Attributes:
      bounds: the numbers are in -bounds ... bounds.
      precisions: names of the dtypes it may have; None among them: it may be None.
    """

    bounds: tuple[float, ...] | float
    precisions: tuple[str | None, ...] = ("float64", "float32")

    @property
    def size(self):
        return 1 + np.size(self.bounds)

    def numbers_of(self, value):
        if value is None:
            return [self.precisions.index(None)] + [0.0] * np.size(self.bounds)
        value = np.asarray(value)
        return [self.precisions.index(value.dtype.name), *value.reshape(-1)]

    def value_of(self, numbers):
        precision = closest(numbers[0], self.precisions)
        if precision is None:
            return None
        bounds = np.array(self.bounds)
        value = np.array(numbers[1:]).reshape(bounds.shape)
        return value.clip(-bounds, bounds).astype(precision)[()]


@dataclass(frozen=True)
class Choice:
    """An attribute that has one of a few values; kept as the index of its value."""

    values: Sequence
    size = 1

    def numbers_of(self, value):
        return [self.values.index(value)]

    def value_of(self, numbers):
        return closest(numbers[0], self.values)


class Hand:
    """An attribute that is a hand of Blackjack, a list of cards from 1 to 10; kept with its length.

    From a hand of more than 21 no step starts, so that 21 cards, all of them aces, are the most.
    """

    most = 21
    size = 1 + most

    def numbers_of(self, value):
        cards = value[: self.most]
        return [len(cards), *cards, *[0] * (self.most - len(cards))]

    def value_of(self, numbers):
        length = closest(numbers[0] - 2, range(2, self.most + 1))
        cards = [closest(card - 1, range(1, 11)) for card in numbers[1 : 1 + length]]
        while sum(cards) > 21:
            cards.pop()
        return cards


class Nothing:
    """An attribute that is None wherever a step may start."""

    size = 0

    def numbers_of(self, value):
        return []

    def value_of(self, numbers):
        return None


def closest(index: float, values: Sequence):
    """values[index], or the first or last value if there are not so many."""
    return values[min(max(int(index), 0), len(values) - 1)]


def attributes_of(env) -> dict[str, Floats | Choice | Hand | Nothing]:
    """What a step of a small task or its picture reads, and another step changes.

    The random numbers come in addition.

    Raises:
      ValueError: the state of this environment is not known.
    """
    match type(env).__name__:
        case "CartPoleEnv":
            # The second counts steps after the end of an episode.
            return {"state": Floats((10.0, FAR, 10.0, FAR)), "steps_beyond_terminated": Nothing()}
        case "MountainCarEnv" | "Continuous_MountainCarEnv":
            return {"state": Floats((10.0, 10.0))}
        case "PendulumEnv":
            torque = Floats(env.max_torque, precisions=(None, "float32", "float64"))
            return {"state": Floats((FAR, env.max_speed)), "last_u": torque}
        case "AcrobotEnv":
            # A step turns angles back into these bounds turn by turn, however far they are.
            return {"state": Floats((np.pi, np.pi, env.MAX_VEL_1, env.MAX_VEL_2))}
        case "FrozenLakeEnv" | "CliffWalkingEnv":
            return place_of(env)
        case "TaxiEnv":
            turns = {"fickle_step": Choice((False, True)), "taxi_orientation": Choice(range(4))}
            # Gymnasium 1.1 has no fickle passengers.
            return place_of(env) | {name: turns[name] for name in turns if hasattr(env, name)}
        case "BlackjackEnv":
            cards = ("A", *map(str, range(2, 11)), "J", "Q", "K")
            return {
                "dealer": Hand(),
                "player": Hand(),
                "dealer_top_card_suit": Choice("CDHS"),
                "dealer_top_card_value_str": Choice(cards),
            }
        case name:
            raise ValueError(f"what the state of Gymnasium's {name} consists of is not known here")


def place_of(env) -> dict[str, Choice]:
    """The attributes of a task whose states are numbered."""
    actions = (None, *range(env.action_space.n))
    return {"s": Choice(range(env.observation_space.n)), "lastaction": Choice(actions)}


class SmallTask:
    """One of Gymnasium's small tasks, without its wrappers.

    A state is a row of numbers: those of the random generator, and those of `attributes_of`. They
    are handed out as uint32, two for each number: JAX would round float64.

    Attributes:
      env: the environment, for its spaces.
      space: the space of observations. If it is not a Box it is flattened: integers become
        one-hot vectors, and the parts of tuples follow each other.
      state_size: entries of one environment's state, as uint32.
    """

    def __init__(self, env):
        """Raises ValueError if the state of this environment is not known."""
        from gymnasium import spaces

        self.env = env.unwrapped
        self.env.reset(seed=0)
        is_box = isinstance(self.env.observation_space, spaces.Box)
        self._flatten = None if is_box else spaces.flatten
        self.space = self.env.observation_space
        if not is_box:
            self.space = spaces.flatten_space(self.space)
        self._attributes = []  # of each its name, its kind, and its place among the numbers
        size = 0
        for name, kind in attributes_of(self.env).items():
            self._attributes.append((name, kind, slice(size, size + kind.size)))
            size += kind.size
        self._row = np.dtype([("random", np.uint64, 6), ("numbers", np.float64, size)])
        self._lock = threading.Lock()  # programs that run at the same time share `env`
        self.state_size = self._row.itemsize // 4

    def reset(self, seed):
        """Seeds (...) int -> first observations (..., *obs_shape), states (..., state_size) uint32.

        Observations are uint8 if they are images, float32 otherwise. Equal seeds are computed once.
        """
        seeds = np.asarray(seed).reshape(-1).tolist()
        with self._lock:
            firsts = {seed: self._first(seed) for seed in dict.fromkeys(seeds)}
        return stack([firsts[seed] for seed in seeds], np.shape(seed))

    def step(self, state, action):
        """Step every environment.

        Args:
          state: (..., state_size) uint32.
          action: (..., *action_shape).

        Returns:
          Observations (..., *obs_shape), states (..., state_size) uint32, rewards (...) float32,
          terminated (...) bool.
        """
        state = np.asarray(state)
        actions = np.asarray(action).reshape(-1, *self.env.action_space.shape)
        with self._lock:
            rows = [
                self._next(*row)
                for row in zip(state.reshape(-1, self.state_size), actions, strict=True)
            ]
        return stack(rows, state.shape[:-1])

    def picture(self, state):
        """What the environment draws of `state`, (height, width, 3) uint8."""
        with self._lock:
            self._write_state(np.asarray(state))
            return self.env.render()

    def _first(self, seed):
        obs, _ = self.env.reset(seed=seed)
        return self._obs(obs), self._read_state()

    def _next(self, state, action):
        self._write_state(state)
        obs, reward, terminated, _, _ = self.env.step(action)
        return self._obs(obs), self._read_state(), np.float32(reward), np.bool_(terminated)

    def _obs(self, obs):
        if self._flatten:
            obs = self._flatten(self.env.observation_space, obs)
        return np.asarray(obs, np.uint8 if self.space.dtype == np.uint8 else np.float32)

    def _read_state(self):
        """The state of `env`, (state_size,) uint32."""
        row = np.zeros((), self._row)
        generator = self.env.np_random.bit_generator.state
        words = generator["state"]
        row["random"] = (
            *divmod(words["state"], 2**64),
            *divmod(words["inc"], 2**64),
            generator["has_uint32"],
            generator["uinteger"],
        )
        numbers = []
        for name, kind, _ in self._attributes:
            numbers += kind.numbers_of(getattr(self.env, name))
        row["numbers"] = numbers
        return row.reshape(1).view(np.uint32)

    def _write_state(self, state):
        """Set `env` to a state (state_size,) uint32, whatever its bits."""
        (row,) = np.ascontiguousarray(state).view(self._row)
        high, low, high_step, low_step, has_uint32, uinteger = row["random"].tolist()
        self.env.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            # An even step, which no generator has, could yield the same number for ever.
            "state": {"state": high << 64 | low, "inc": high_step << 64 | low_step | 1},
            "has_uint32": has_uint32 & 1,
            "uinteger": uinteger % 2**32,
        }
        numbers = np.nan_to_num(row["numbers"]).tolist()
        for name, kind, place in self._attributes:
            setattr(self.env, name, kind.value_of(numbers[place]))


def reseeded(state, words):
    """A state (state_size,) uint32 whose random numbers follow from `words` (4,) uint32, in JAX."""
    state = state.at[:4].set(words)  # where the generator is; after these comes its increment
    return state.at[8:10].set(0)  # and whether half of its last number is left


def stack(rows, batch: tuple[int, ...]):
    """Tuples of arrays, one per environment, as one tuple of arrays (*batch, ...)."""
    columns = zip(*rows, strict=True)
    return tuple(np.stack(column).reshape(batch + column[0].shape) for column in columns)
