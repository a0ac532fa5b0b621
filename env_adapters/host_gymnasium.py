"""Gymnasium's environments on the host, as functions of a state instead of objects that have one.

Before every step the simulator is given the state to step from, and after it the state is read again, as bytes. So the
results depend on the arguments only: states can be stepped in any order, stored, and stepped again.

All functions take and return numpy arrays with any leading axes, one row per environment.
"""

import atexit
import pickle
import threading

import numpy as np


class Atari:
    """A game of the Arcade Learning Environment, prepared as in Machado et al. (2018) and by ale_py's AtariVectorEnv.

    A step holds an action for `frameskip` frames and shows the greater of the last two, in grey, as `size` x `size`
    pixels, each the mean of the area it covers. Sticky actions are up to the caller, who says what each frame gets:
    nothing here is random.

    Attributes:
      actions: the number of actions.
      state_size: bytes of the state of the emulator.
    """

    def __init__(self, game: str, frameskip: int, full_action_space: bool, max_frames: int, size: int = 84):
        import ale_py

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        atexit.register(vars(self).clear)  # ale_py complains of emulators that outlive it
        self._load_state = ale_py.ALEState
        self._lock = threading.Lock()  # programs that run at the same time call back at the same time
        self._ale.setInt("random_seed", 0)
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.setInt("max_num_frames_per_episode", max_frames)
        self._ale.loadROM(ale_py.roms.get_rom_path(game))
        self._ale.reset_game()
        minimal = self._ale.getMinimalActionSet()
        self._actions = self._ale.getLegalActionSet() if full_action_space else minimal
        self._noop, self._fire = ale_py.Action.NOOP, ale_py.Action.FIRE
        self._can_fire = self._fire in minimal
        self.actions, self.frameskip = len(self._actions), frameskip
        height, width = self._ale.getScreenDims()
        self._rows, self._columns = Shrink(height, size), Shrink(width, size)
        self.frame_shape = size, size
        self.state_size = len(self._state()) + 64  # what follows the state is not read

    def starts(self, number: int, fire: bool):
        """States in which an episode may begin: after 0 ... number - 1 idle frames, and the fire button if need be.

        Returns: frames (number, size, size) uint8, states (number, state_size) uint8.
        """
        if fire and self._can_fire:
            self._ale.act(self._fire)
        frames, states = [], []
        for _ in range(number):
            frames.append(self._shrink(self._ale.getScreenGrayscale()))
            states.append(self._padded(self._state()))
            self._ale.act(self._noop)
        return np.stack(frames), np.stack(states)

    def step(self, state, action):
        """States and actions (..., frameskip) int32 -> frames uint8, states, rewards float32, terminated, truncated."""
        state, action = np.asarray(state), np.asarray(action)
        batch = state.shape[:-1]
        states, actions = state.reshape(-1, self.state_size), action.reshape(-1, self.frameskip)
        rows = len(states)
        frames, after = np.empty((rows, *self.frame_shape), np.uint8), np.empty_like(states)
        reward, terminated, truncated = np.empty(rows, np.float32), np.empty(rows, bool), np.empty(rows, bool)
        with self._lock:
            for row in range(rows):
                frames[row], reward[row] = self._play(states[row], actions[row])
                terminated[row] = self._ale.game_over(with_truncation=False)
                truncated[row] = self._ale.game_truncated()
                after[row] = self._padded(self._state())
        results = frames, after, reward, terminated, truncated
        return tuple(x.reshape(batch + x.shape[1:]) for x in results)

    def picture(self, state):
        """The colours of the screen a frame after `state`, (height, width, 3) uint8: a state has no screen."""
        with self._lock:
            self._ale.restoreState(self._load_state(state.tobytes()))
            self._ale.act(self._noop)
            return self._ale.getScreenRGB()

    def _play(self, state, actions):
        self._ale.restoreState(self._load_state(state.tobytes()))
        reward = sum(self._ale.act(self._actions[action]) for action in actions[:-1])
        before = self._ale.getScreenGrayscale() if len(actions) > 1 else 0
        reward += self._ale.act(self._actions[actions[-1]])
        return self._shrink(np.maximum(before, self._ale.getScreenGrayscale())), reward

    def _state(self):
        return self._ale.cloneState().serialize()

    def _padded(self, state):
        return np.frombuffer(state.ljust(self.state_size, b"\0"), np.uint8)

    def _shrink(self, screen):
        return np.rint(self._columns.columns(self._rows.rows(screen))).astype(np.uint8)


class Shrink:
    """Images (..., rows, columns) with fewer of either, each the mean of those it covers, in whole or in part."""

    def __init__(self, pixels: int, fewer: int):
        edges = np.linspace(0, pixels, fewer + 1)
        left, right = edges[:-1, None], edges[1:, None]
        covered = left.astype(int) + np.arange(-(-pixels // fewer) + 1)
        share = np.minimum(right, covered + 1) - np.maximum(left, covered)
        self._share = (np.maximum(share, 0) * fewer / pixels).astype(np.float32).T
        self._covered = np.minimum(covered, pixels - 1).T

    def rows(self, image):
        # Not a product of matrices: BLAS would start its threads for every image, many times what this takes.
        parts = zip(self._covered, self._share, strict=True)
        return sum(image[..., covered, :] * share[:, None] for covered, share in parts)

    def columns(self, image):
        parts = zip(self._covered, self._share, strict=True)
        return sum(image[..., covered] * share for covered, share in parts)


class Pickled:
    """Any environment of Gymnasium that pickle can store whole, its random numbers included.

    Attributes:
      env: one of them, for its spaces.
      space: the observations' space, flat if it is not a Box: integers one-hot, parts one after the other.
      state_size: bytes of the pickled environment, and some to spare.
    """

    def __init__(self, env):
        from gymnasium import spaces

        self.env = env
        self.env.reset(seed=0)
        self._flatten = None if isinstance(env.observation_space, spaces.Box) else spaces.flatten
        self.space = spaces.flatten_space(env.observation_space) if self._flatten else env.observation_space
        self._lock = threading.Lock()
        self.state_size = len(pickle.dumps(env)) * 5 // 4 + 2048

    def reset(self, seed):
        """Seeds (...) int -> first obs (..., *obs), states (..., state_size) uint8."""
        seed = np.asarray(seed)
        with self._lock:
            rows = [self._first(int(row)) for row in seed.reshape(-1)]
        return tuple(np.stack(x).reshape(seed.shape + x[0].shape) for x in zip(*rows, strict=True))

    def step(self, state, action):
        """States and actions -> obs, states, rewards float32, terminated and truncated bool."""
        state, action = np.asarray(state), np.asarray(action)
        batch = state.shape[:-1]
        actions = action.reshape(-1, *self.env.action_space.shape)
        with self._lock:
            rows = [self._next(*row) for row in zip(state.reshape(-1, self.state_size), actions, strict=True)]
        return tuple(np.stack(x).reshape(batch + x[0].shape) for x in zip(*rows, strict=True))

    def picture(self, state):
        """What the environment draws of `state`."""
        return pickle.loads(state.tobytes()).render()

    def _first(self, seed):
        obs, _ = self.env.reset(seed=seed)
        return self._obs(obs), self._state(self.env)

    def _next(self, state, action):
        env = pickle.loads(state.tobytes())
        obs, reward, terminated, truncated, _ = env.step(action)
        return self._obs(obs), self._state(env), np.float32(reward), np.bool_(terminated), np.bool_(truncated)

    def _obs(self, obs):
        obs = self._flatten(self.env.observation_space, obs) if self._flatten else obs
        return np.asarray(obs, np.uint8 if self.space.dtype == np.uint8 else np.float32)

    def _state(self, env):
        state = pickle.dumps(env)
        if len(state) > self.state_size:
            raise RuntimeError(f"{env.spec.id} has grown beyond the {self.state_size} bytes kept for its state")
        return np.frombuffer(state.ljust(self.state_size, b"\0"), np.uint8)
