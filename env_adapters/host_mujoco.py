"""Gymnasium's MuJoCo environments as pure functions of a state.

Before every step the simulator is set to the state to step from; after it the state is read back.
Results therefore depend on the arguments only, and they are Gymnasium's, bit for bit, whatever the
number of environments and threads.

If the physics take long enough, they run in threads on all cores. Then Gymnasium's class computes
the observations and rewards from them, one environment after the other. If not, that class does
the whole step.

All functions take and return numpy arrays with any leading axes (...), one row per environment.
"""

import functools
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor, wait

import gymnasium
import mujoco
import numpy as np

from harness.processes import num_cores

# Everything that mj_step reads. An int, as every call would have to convert the enum.
STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
MAX_ROWS = 256  # environments simulated at once; each takes up to some MB
THREAD_SECONDS = 2e-4  # of physics are worth another thread, which must wake up first


class HostMujoco:
    """`reset` and `step` of one of Gymnasium's environments, for many environments at a time.

    A state is MuJoCo's integration state, as float64. Some environments also read the places of
    bodies before they simulate; their states contain these, too. MuJoCo computes places during a
    step, one substep behind the positions, so they do not follow from the integration state.

    States are handed out as uint32, two for each float64: JAX would round them to float32.

    Attributes:
      env: the environment, for its spaces and its model.
      state_size: entries of one environment's state, as uint32.
    """

    def __init__(self, env: gymnasium.Env):
        """Raises NotImplementedError if a step reads what states do not contain."""
        self.env = env.unwrapped
        self._model = self.env.model
        self._data = self.env.data
        size = mujoco.mj_stateSize(self._model, STATE)
        read = self._read_before_physics() - {"qpos", "qvel"}
        if unknown := read - {"xpos", "xipos", "body"}:
            names = sorted(unknown)
            raise NotImplementedError(
                f"its step reads {names} before it simulates, which states do not have"
            )
        self._integration = slice(size)
        self._place_names = ("xpos", "xipos") if read else ()
        self._places = self._places_of(self._data)
        self.state_size = 2 * (size + sum(place.size for place, _ in self._places))
        # For each row simulated at once: a simulator, its controls, and the places of its bodies.
        self._rows = []
        self._cores = num_cores()
        self._threads = ThreadPoolExecutor(self._cores)
        self._lock = threading.Lock()  # programs that run at the same time share the simulators

    @functools.cached_property  # measured at the first step, which many environments never do
    def _row_seconds(self):
        """The seconds that the physics of one environment's step take.

        Measured after 25 random steps: contacts double the time, and by then the bodies touch
        the ground.
        """
        data = mujoco.MjData(self._model)
        physics = functools.partial(mujoco.mj_step, self._model, data, nstep=self.env.frame_skip)
        seconds = []
        for ctrl in np.random.default_rng(0).uniform(-1.0, 1.0, (50, self._model.nu)):
            data.ctrl[:] = ctrl
            seconds.append(timeit.timeit(physics, number=1))
        return np.median(seconds[25:])

    def _read_before_physics(self) -> set[str]:
        """The attributes of the simulator that Gymnasium's step reads before it simulates."""
        names = set()

        class Recorder:
            def __getattr__(_, name):
                names.add(name)
                return getattr(self._data, name)

        def stop_recording():
            self.env.data = self._data

        self.env.data = Recorder()
        no_action = np.zeros(self.env.action_space.shape)
        self._step_without_physics(no_action, stop_recording)
        return names

    def _places_of(self, data):
        """Views of the places of a simulator's bodies, and the slice of the state for each."""
        places = []
        first = self._integration.stop
        for name in self._place_names:
            view = getattr(data, name).reshape(-1)
            places.append((view, slice(first, first + view.size)))
            first += view.size
        return places

    def reset(self, seed):
        """The first states and observations of episodes; equal seeds are computed once.

        Args:
          seed: (...) uint32.

        Returns:
          Observations (..., observations) float32, states (..., state_size) uint32.
        """
        seeds = np.ravel(seed).tolist()
        row_of = {seed: row for row, seed in enumerate(dict.fromkeys(seeds))}
        obs = np.empty((len(row_of), *self.env.observation_space.shape), np.float32)
        states = np.empty((len(row_of), self.state_size // 2))
        with self._lock:
            for value, row in row_of.items():
                obs[row], _ = self.env.reset(seed=value)
                self._read_state(self._data, self._places, states[row])
        rows = np.array([row_of[value] for value in seeds]).reshape(np.shape(seed))
        return obs[rows], states.view(np.uint32)[rows]

    def step(self, state, action):
        """Step every environment.

        Args:
          state: (..., state_size) uint32.
          action: (..., actions) float32.

        Returns:
          Observations (..., observations) float32, states (..., state_size) uint32, rewards (...)
          float32, terminated (...) bool.
        """
        batch = state.shape[:-1]
        before = np.ascontiguousarray(state).reshape(-1, self.state_size).view(np.float64)
        action = action.reshape(len(before), -1)
        after = np.empty_like(before)
        obs = np.empty((len(before), *self.env.observation_space.shape), np.float32)
        reward = np.empty(len(before), np.float32)
        terminated = np.empty(len(before), bool)
        with self._lock:
            for first in range(0, len(before), MAX_ROWS):
                part = slice(first, first + MAX_ROWS)
                self._step_rows(
                    before[part],
                    action[part],
                    after[part],
                    obs[part],
                    reward[part],
                    terminated[part],
                )
        results = (obs, after.view(np.uint32), reward, terminated)
        return tuple(x.reshape(batch + x.shape[1:]) for x in results)

    def render(self, state):
        """Draw a state (state_size,) uint32 as an image (height, width, 3) uint8.

        Raises an exception of MuJoCo's if there is no way to draw on this machine.
        """
        integration = np.asarray(state).view(np.float64)[self._integration]
        with self._lock:
            mujoco.mj_setState(self._model, self._data, integration, STATE)
            mujoco.mj_forward(self._model, self._data)
            return self.env.render()

    def _step_rows(self, before, action, after, obs, reward, terminated):
        """Step rows, at most MAX_ROWS, from `before`; the last four arguments are written to."""
        num_rows = len(before)
        affordable = int(num_rows * self._row_seconds / THREAD_SECONDS)
        num_threads = min(self._cores, num_rows, affordable)
        if num_threads > 1:
            self._simulate(before, action, after, num_threads)
        for row, act in enumerate(action):
            self._write_state(self._data, self._places, before[row])
            if num_threads > 1:
                obs[row], reward[row], terminated[row] = self._finish_step(row, act)
            else:
                obs[row], reward[row], terminated[row], _, _ = self.env.step(act)
                self._read_state(self._data, self._places, after[row])

    def _finish_step(self, row, action):
        """What Gymnasium's class makes of a step whose physics have been simulated for `row`."""

        def take_simulated():
            self.env.data = self._rows[row][0]
            mujoco.mj_rnePostConstraint(self._model, self.env.data)

        return self._step_without_physics(action, take_simulated)[:3]

    def _step_without_physics(self, action, instead):
        """A step of Gymnasium's class that calls instead() in place of the physics."""
        self.env._step_mujoco_simulation = lambda ctrl, n_frames: instead()
        try:
            return self.env.step(action)
        finally:
            self.env.data = self._data
            del self.env._step_mujoco_simulation

    def _simulate(self, before, action, after, num_threads):
        """The physics of a step in several threads, every row in a simulator of its own."""
        while len(self._rows) < len(before):
            data = mujoco.MjData(self._model)
            self._rows.append((data, data.ctrl, self._places_of(data)))
        shares = [range(first, len(before), num_threads) for first in range(num_threads)]
        own, *others = shares
        futures = [
            self._threads.submit(self._simulate_rows, rows, before, action, after)
            for rows in others
        ]
        try:
            self._simulate_rows(own, before, action, after)
        finally:
            wait(futures)  # also after an error: the next call uses the same simulators
        for future in futures:
            future.result()

    def _simulate_rows(self, rows, before, action, after):
        for row in rows:
            data, ctrl, places = self._rows[row]
            self._write_state(data, places, before[row])
            ctrl[:] = action[row]
            mujoco.mj_step(self._model, data, nstep=self.env.frame_skip)
            self._read_state(data, places, after[row])

    def _write_state(self, data, places, state):
        """Set a simulator to a state (state_size / 2,) float64."""
        mujoco.mj_setState(self._model, data, state[self._integration], STATE)
        for place, part in places:
            place[:] = state[part]

    def _read_state(self, data, places, state):
        """Copy the state of a simulator into `state`."""
        mujoco.mj_getState(self._model, data, state[self._integration], STATE)
        for place, part in places:
            state[part] = place
