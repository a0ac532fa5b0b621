"""Gymnasium's simulators as pure functions of a state: Atari, and whatever pickle can store.

Before every step the simulator is set to the state to step from; after it the state is read back,
as bytes. Results therefore depend on the arguments only: states can be stepped in any order,
stored, and stepped again.

All functions take and return numpy arrays with any leading axes (...), one row per environment.
"""

import atexit
import pickle
import threading

import numpy as np


class Atari:
    """A game of the Arcade Learning Environment, prepared as by ale_py's AtariVectorEnv.

    A step runs `frameskip` frames and shows the greater of the last two (Machado et al. 2018, arXiv
    1709.06009), in grey, as `size` x `size` pixels, each the mean of the area it covers. The caller
    gives an action for every frame, and so decides about sticky actions: nothing here is random.

    Attributes:
      actions: the number of actions.
      state_size: bytes of the emulator's state.
    """

    def __init__(
        self,
        game: str,
        frameskip: int,
        full_action_space: bool,
        max_frames: int,
        size: int = 84,
    ):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        atexit.register(vars(self).clear)  # ale_py complains about emulators that outlive it
        self._load_state = ale_py.ALEState
        self._lock = threading.Lock()  # programs that run at the same time share the emulator
        self._ale.setInt("random_seed", 0)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.setInt("max_num_frames_per_episode", max_frames)
        self._ale.loadROM(ale_py.roms.get_rom_path(game))
        self._ale.reset_game()
        minimal = self._ale.getMinimalActionSet()
        self._actions = self._ale.getLegalActionSet() if full_action_space else minimal
        self._noop = ale_py.Action.NOOP
        self._fire = ale_py.Action.FIRE
        self._can_fire = self._fire in minimal
        self.actions = len(self._actions)
        self.frameskip = frameskip
        height, width = self._ale.getScreenDims()
        self._rows = Shrink(height, size)
        self._columns = Shrink(width, size)
        self.frame_shape = (size, size)
        self.state_size = len(self._state()) + 64  # states may grow; padding behind them is ignored

    def starts(self, number: int, fire: bool):
        """States that an episode may begin in: after 0, 1, ... number - 1 idle frames.

        Args:
          fire: press the fire button first, if the game has one.

        Returns:
          Frames (number, size, size) uint8, and states (number, state_size) uint8.
        """
        if fire and self._can_fire:
            self._ale.act(self._fire)
        frames = []
        states = []
        for _ in range(number):
            frames.append(self._shrink(self._ale.getScreenGrayscale()))
            states.append(self._padded(self._state()))
            self._ale.act(self._noop)
        return np.stack(frames), np.stack(states)

    def step(self, state, action):
        """Step every environment.

        Args:
          state: (..., state_size) uint8.
          action: (..., frameskip) int32, one for every frame.

        Returns:
          Frames (..., size, size) uint8, states (..., state_size) uint8, rewards (...) float32,
          terminated (...) bool, truncated (...) bool.
        """
        state = np.asarray(state)
        batch = state.shape[:-1]
        states = state.reshape(-1, self.state_size)
        actions = np.asarray(action).reshape(-1, self.frameskip)
        num_rows = len(states)
        frames = np.empty((num_rows, *self.frame_shape), np.uint8)
        after = np.empty_like(states)
        reward = np.empty(num_rows, np.float32)
        terminated = np.empty(num_rows, bool)
        truncated = np.empty(num_rows, bool)
        with self._lock:
            for row in range(num_rows):
                frames[row], reward[row] = self._play(states[row], actions[row])
                terminated[row] = self._ale.game_over(with_truncation=False)
                truncated[row] = self._ale.game_truncated()
                after[row] = self._padded(self._state())
        results = (frames, after, reward, terminated, truncated)
        return tuple(x.reshape(batch + x.shape[1:]) for x in results)

    def picture(self, state):
        """The screen in colour, (height, width, 3) uint8, one frame after `state`.

        A state does not contain its screen, so the emulator has to run for a frame.
        """
        with self._lock:
            self._ale.restoreState(self._load_state(state.tobytes()))
            self._ale.act(self._noop)
            return self._ale.getScreenRGB()

    def _play(self, state, actions):
        self._ale.restoreState(self._load_state(state.tobytes()))
        *others, last = actions
        reward = sum(self._ale.act(self._actions[action]) for action in others)
        before = self._ale.getScreenGrayscale() if others else 0
        reward += self._ale.act(self._actions[last])
        return self._shrink(np.maximum(before, self._ale.getScreenGrayscale())), reward

    def _state(self) -> bytes:
        return self._ale.cloneState().serialize()

    def _padded(self, state: bytes):
        return np.frombuffer(state.ljust(self.state_size, b"\0"), np.uint8)

    def _shrink(self, screen):
        return np.rint(self._columns.columns(self._rows.rows(screen))).astype(np.uint8)


class Shrink:
    """Shrink images along one axis; a new pixel is the mean of those it covers, also in part.

    It sums slices of the image. A product of matrices would start the threads of BLAS for every
    image, which takes many times as long as the sum.
    """

    def __init__(self, pixels: int, fewer: int):
        """From `pixels` to `fewer` pixels."""
        edges = np.linspace(0, pixels, fewer + 1)
        left = edges[:-1, None]
        right = edges[1:, None]
        covered = left.astype(int) + np.arange(-(-pixels // fewer) + 1)
        share = np.minimum(right, covered + 1) - np.maximum(left, covered)
        self._share = (np.maximum(share, 0) * fewer / pixels).astype(np.float32).T
        self._covered = np.minimum(covered, pixels - 1).T

    def rows(self, image):
        """Images (..., pixels, columns) -> (..., fewer, columns)."""
        parts = zip(self._covered, self._share, strict=True)
        return sum(image[..., covered, :] * share[:, None] for covered, share in parts)

    def columns(self, image):
        """Images (..., rows, pixels) -> (..., rows, fewer)."""
        parts = zip(self._covered, self._share, strict=True)
        return sum(image[..., covered] * share for covered, share in parts)


class Pickled:
    """Any environment of Gymnasium that pickle can store completely, random numbers included.

    Attributes:
      env: one such environment, for its spaces.
      space: the space of observations. If it is not a Box it is flattened: integers become
        one-hot vectors, and the parts of tuples follow each other.
      state_size: bytes of the pickled environment, and some to spare.
    """

    def __init__(self, env):
        from gymnasium import spaces

        self.env = env
        self.env.reset(seed=0)
        is_box = isinstance(env.observation_space, spaces.Box)
        self._flatten = None if is_box else spaces.flatten
        self.space = (
            env.observation_space if is_box else spaces.flatten_space(env.observation_space)
        )
        self._lock = threading.Lock()  # programs that run at the same time share `env`
        self.state_size = len(pickle.dumps(env)) * 5 // 4 + 2048

    def reset(self, seed):
        """Seeds (...) int -> first observations (..., *obs_shape), states (..., state_size) uint8.

        Observations are uint8 if they are images, float32 otherwise.
        """
        seed = np.asarray(seed)
        with self._lock:
            rows = [self._first(int(row)) for row in seed.reshape(-1)]
        return stack(rows, seed.shape)

    def step(self, state, action):
        """Step every environment.

        Args:
          state: (..., state_size) uint8.
          action: (..., *action_shape).

        Returns:
          Observations (..., *obs_shape), states (..., state_size) uint8, rewards (...) float32,
          terminated (...) bool, truncated (...) bool.

        Raises:
          RuntimeError: the pickle of an environment has outgrown `state_size`.
        """
        state = np.asarray(state)
        states = state.reshape(-1, self.state_size)
        actions = np.asarray(action).reshape(-1, *self.env.action_space.shape)
        with self._lock:
            rows = [self._next(*row) for row in zip(states, actions, strict=True)]
        return stack(rows, state.shape[:-1])

    def picture(self, state):
        """What the environment draws of `state`, (height, width, 3) uint8."""
        return pickle.loads(state.tobytes()).render()

    def _first(self, seed):
        obs, _ = self.env.reset(seed=seed)
        return self._obs(obs), self._state(self.env)

    def _next(self, state, action):
        env = pickle.loads(state.tobytes())
        obs, reward, terminated, truncated, _ = env.step(action)
        return (
            self._obs(obs),
            self._state(env),
            np.float32(reward),
            np.bool_(terminated),
            np.bool_(truncated),
        )

    def _obs(self, obs):
        if self._flatten:
            obs = self._flatten(self.env.observation_space, obs)
        return np.asarray(obs, np.uint8 if self.space.dtype == np.uint8 else np.float32)

    def _state(self, env):
        state = pickle.dumps(env)
        if len(state) > self.state_size:
            limit = f"the {self.state_size} bytes kept for its state"
            raise RuntimeError(f"{env.spec.id} has grown beyond {limit}")
        return np.frombuffer(state.ljust(self.state_size, b"\0"), np.uint8)


def stack(rows, batch: tuple[int, ...]):
    """Tuples of arrays, one per environment, as one tuple of arrays (*batch, ...)."""
    columns = zip(*rows, strict=True)
    return tuple(np.stack(column).reshape(batch + column[0].shape) for column in columns)
