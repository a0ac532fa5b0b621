"""Gymnasium's MuJoCo environments as functions of a state, instead of objects that have one.

Everything that a step depends on is read from the simulator after it and given back to it before the next. Where there
is enough of it, physics runs in threads, on all cores, before Gymnasium's class computes observations and rewards, one
environment after the other; else that class does the whole step. Results are those of Gymnasium, to the last bit,
whatever the number of environments and threads.

Functions take and return numpy arrays with any leading axes, one row per environment.
"""

import ctypes
import functools
import os
import threading
import timeit
from concurrent.futures import ThreadPoolExecutor, wait

import gymnasium
import jax
import mujoco
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)  # all that mj_step reads; to hand over the enum costs another copy
MAX_ROWS = 256  # simulated at once: each takes up to some MB
THREAD_SECONDS = 2e-4  # of physics that are worth another thread: it takes long to wake up, and Python's lock

_thread = threading.local()

# What `jax.pure_callback` does for one array, in 4 microseconds instead of 60: that makes a jax array of it first.
_call = Primitive("call_on_host")
_call.def_abstract_eval(lambda rows, *, function, size: jax.core.ShapedArray((*rows.shape[:-1], size), rows.dtype))
_call.def_impl(lambda rows, *, function, size: jax.numpy.asarray(function(np.asarray(rows))))


def _batch(args, axes, **how):
    return _call.bind(jax.numpy.moveaxis(*args, *axes, 0), **how), 0


def _lower(context, rows, *, function, size):
    def callback(rows):
        if not hasattr(_thread, "is_kept"):
            # Of a thread of XLA's Python makes a state for every call, and discards it: 20 to 30 microseconds. Taken
            # once more than it is released, it stays.
            ctypes.pythonapi.PyGILState_Ensure()
            _thread.is_kept = True
        return (function(np.asarray(rows)),)

    avals = context.avals_in, context.avals_out
    results, _, _ = mlir.emit_python_callback(context, callback, None, [rows], *avals, has_side_effect=False)
    return results


batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, _lower)


def call_on_host(function, rows, size):
    """Rows (..., n) to rows (..., size), same dtype, by a pure numpy function: one call for all axes of a vmap."""
    return _call.bind(rows, function=function, size=size)


class HostMujoco:
    """`reset` and `step` of one of Gymnasium's environments, for many at a time.

    A state is the integration state of MuJoCo and, where the environment's step reads them before it simulates, the
    places of the bodies: MuJoCo computes them on its way, a substep late, so that the rest does not tell them. It is
    handed out as pairs of uint32, which JAX carries as they are; float64 it would round.

    Attributes:
      env: the environment, for its spaces and its model.
      state_size: entries of a state of one environment.
    """

    def __init__(self, env: gymnasium.Env):
        self.env = env.unwrapped
        self._model, self._data = self.env.model, self.env.data
        size = mujoco.mj_stateSize(self._model, STATE)
        read = self._read_before_physics() - {"qpos", "qvel"}
        if unknown := read - {"xpos", "xipos", "body"}:
            raise NotImplementedError(f"its step reads {sorted(unknown)} before it simulates, which states do not have")
        self._integration, self._place_names = slice(size), ("xpos", "xipos") if read else ()
        self._places = self._places_of(self._data)
        self.state_size = 2 * (size + sum(place.size for place, _ in self._places))
        self._rows = []  # for each environment of a call: simulator, its controls, and the places of its bodies
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._threads = ThreadPoolExecutor(self._cores)
        self._lock = threading.Lock()  # programs that run at the same time call back at the same time

    @functools.cached_property  # for most that is asked of an environment nobody needs it
    def _row_seconds(self):
        """The seconds that a step's physics take, once the bodies touch what they fall on: contacts double them."""
        data, seconds = mujoco.MjData(self._model), []
        physics = functools.partial(mujoco.mj_step, self._model, data, nstep=self.env.frame_skip)
        for ctrl in np.random.default_rng(0).uniform(-1.0, 1.0, (50, self._model.nu)):
            data.ctrl[:] = ctrl
            seconds.append(timeit.timeit(physics, number=1))
        return np.median(seconds[25:])

    def _read_before_physics(self):
        """The names of what a step of Gymnasium's class reads from the simulator before it simulates."""
        names = set()

        class Recorder:
            def __getattr__(_, name):
                names.add(name)
                return getattr(self._data, name)

        self.env.data = Recorder()
        self._step_without_physics(np.zeros(self.env.action_space.shape), lambda: setattr(self.env, "data", self._data))
        return names

    def _places_of(self, data):
        """Views of the places of the bodies that a state has, each with its part of the state."""
        first, views = self._integration.stop, [getattr(data, name).reshape(-1) for name in self._place_names]
        return [(view, slice(first + i * view.size, first + (i + 1) * view.size)) for i, view in enumerate(views)]

    def reset(self, seed):
        """Seeds (..., 1) uint32 -> states and the bits of first observations (..., state_size + observations) uint32.

        Equal seeds cost one.
        """
        seeds, row_of = np.unique(seed, return_inverse=True)
        obs = np.empty((len(seeds), *self.env.observation_space.shape), np.float32)
        states = np.empty((len(seeds), self.state_size // 2))
        with self._lock:
            for row, value in enumerate(seeds):
                obs[row] = self.env.reset(seed=int(value))[0]
                mujoco.mj_getState(self._model, self._data, states[row, self._integration], STATE)
                for place, part in self._places:
                    states[row, part] = place
        result = np.concatenate([states.view(np.uint32), obs.view(np.uint32)], axis=1)
        return result[row_of.reshape(seed.shape[:-1])]  # numpy 2.0 returns another shape than the others

    def step(self, state_and_action):
        """The step of every environment.

        Args:
          state_and_action: (..., state_size + actions) uint32, a state and the bits of an action in float32.

        Returns:
          (..., state_size + observations + 2) uint32: the next state, and the bits of observation, reward and
          terminated (1.0 or 0.0) in float32.
        """
        rows = state_and_action.reshape(-1, state_and_action.shape[-1])
        before = np.ascontiguousarray(rows[:, : self.state_size]).view(np.float64)
        action = rows[:, self.state_size :].view(np.float32)
        after = np.empty_like(before)
        size = self.env.observation_space.shape[0]
        results = np.empty((len(rows), size + 2), np.float32)
        arrays = before, action, after, results[:, :size], results[:, size], results[:, size + 1]
        with self._lock:
            for first in range(0, len(rows), MAX_ROWS):
                self._step_rows(*(x[first : first + MAX_ROWS] for x in arrays))
        result = np.concatenate([after.view(np.uint32), results.view(np.uint32)], axis=1)
        return result.reshape(state_and_action.shape[:-1] + result.shape[1:])

    def render(self, state):
        """State (state_size,) -> image (height, width, 3) uint8; MuJoCo must find a way to draw."""
        integration = np.asarray(state).view(np.float64)[self._integration]
        with self._lock:
            mujoco.mj_setState(self._model, self._data, integration, STATE)
            mujoco.mj_forward(self._model, self._data)
            return self.env.render()

    def _step_rows(self, before, action, after, obs, reward, terminated):
        num_threads = min(self._cores, len(before), int(len(before) * self._row_seconds / THREAD_SECONDS))
        if num_threads > 1:
            self._simulate(before, action, after, num_threads)
        for row, act in enumerate(action):
            mujoco.mj_setState(self._model, self._data, before[row, self._integration], STATE)
            for place, part in self._places:
                place[:] = before[row, part]
            if num_threads > 1:
                obs[row], reward[row], terminated[row] = self._finish_step(row, act)
            else:
                obs[row], reward[row], terminated[row], _, _ = self.env.step(act)
                mujoco.mj_getState(self._model, self._data, after[row, self._integration], STATE)
                for place, part in self._places:
                    after[row, part] = place

    def _finish_step(self, row, action):
        """What Gymnasium's class makes of a step whose physics have been simulated in a simulator of its own."""

        def take_simulated():
            self.env.data = self._rows[row][0]
            mujoco.mj_rnePostConstraint(self._model, self.env.data)

        return self._step_without_physics(action, take_simulated)[:3]

    def _step_without_physics(self, action, instead):
        """A step of Gymnasium's class in which a function is called instead of the physics."""
        self.env._step_mujoco_simulation = lambda ctrl, n_frames: instead()
        try:
            return self.env.step(action)
        finally:
            self.env.data = self._data
            del self.env._step_mujoco_simulation

    def _simulate(self, before, action, after, num_threads):
        """The physics of a step in several threads, each environment in a simulator of its own."""
        while len(self._rows) < len(before):
            data = mujoco.MjData(self._model)
            self._rows.append((data, data.ctrl, self._places_of(data)))
        shares = [range(first, len(before), num_threads) for first in range(num_threads)]
        others = [self._threads.submit(self._simulate_rows, rows, before, action, after) for rows in shares[1:]]
        try:
            self._simulate_rows(shares[0], before, action, after)
        finally:
            wait(others)  # whatever happened: the next call takes the same simulators
        for other in others:
            other.result()

    def _simulate_rows(self, rows, before, action, after):
        model, frame_skip, integration = self._model, self.env.frame_skip, self._integration
        for row in rows:
            data, ctrl, places = self._rows[row]
            mujoco.mj_setState(model, data, before[row, integration], STATE)
            ctrl[:] = action[row]
            mujoco.mj_step(model, data, nstep=frame_skip)
            mujoco.mj_getState(model, data, after[row, integration], STATE)
            for place, part in places:
                after[row, part] = place
