"""Atari on the host: results depend on the arguments only, whatever the emulator did before."""

import os
import pickle
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, Bomb

from env_adapters import gxm, host_atari
from env_adapters.host_atari import Atari
from envs import make


def game(name, num_starts, max_frames=100_000):
    """A game, and states that an episode may begin in."""
    host = Atari(name, 4, False, max_frames)
    _, states = host.starts(num_starts, True)
    return host, states


def random_actions(host, steps, rows, seed=0):
    """(steps, rows, 4): held for the four frames of a step."""
    rng = np.random.default_rng(seed)
    return rng.integers(host.actions, size=(steps, rows, 1)).repeat(4, axis=-1).astype(np.int32)


def forget(host):
    """The next step restores its state, whatever the emulator is in."""
    host._game.emulator._state = None


def restored(host, state, action):
    """A step of a single state that is restored, as arrays without the axis of rows."""
    forget(host)
    return [x[0] for x in host.step(state[None], action[None])]


def restored_rows(host, states, actions):
    rows = [restored(host, *row) for row in zip(states, actions, strict=True)]
    return [np.stack(column) for column in zip(*rows, strict=True)]


def assert_equal(results, others):
    for x, y in zip(results, others, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["breakout", "pitfall2", "tic_tac_toe_3d"])
def test_going_on_from_a_state_is_restoring_it(name):
    """Also where states lack something: Pitfall II its clock, 3D Tic-Tac-Toe older frames."""
    host, states = game(name, 2)
    state, other = states[:1], states[1:]
    actions = random_actions(host, 40, 2, seed=5)  # after some steps 3D Tic-Tac-Toe still thinks
    chain = []
    for action in actions[:, :1]:
        chain.append(host.step(state, action))
        state = chain[-1][1]
    state = states[:1]
    for action, expected in zip(actions, chain, strict=True):
        _, other, *_ = host.step(other, action[1:])  # as another environment would
        assert_equal(host.step(state, action[:1]), expected)
        state = expected[1]


def test_states_in_any_order():
    """Twice the same state, rows that change places, a reset in between, a picture in between."""
    host, states = game("breakout", 6)
    rng = np.random.default_rng(0)
    for step, actions in enumerate(random_actions(host, 12, 6)):
        expected = restored_rows(host, states, actions)
        for _ in range(2):
            assert_equal(host.step(states, actions), expected)
        order = rng.permutation(6)
        assert_equal(host.step(states[order], actions[order]), [x[order] for x in expected])
        _, states, *_ = host.step(states, actions)
        host.picture(states[-1])
        assert_equal(host.step(states[-1:], actions[:1]), host.step(states[-1:], actions[:1]))
        states = states[order]
        if step == 5:
            states[2] = states[0]


def test_the_first_step_of_all():
    """The emulator has gone a frame further than the last of the states to start from."""
    host, states = game("breakout", 2)
    action = random_actions(host, 1, 1)[0]
    first = host.step(states[1:], action)
    assert_equal([x[0] for x in first], restored(host, states[1], action[0]))


def test_a_step_that_was_interrupted_leaves_no_trace(monkeypatch):
    host, states = game("breakout", 1)
    action = random_actions(host, 1, 1)[0]
    _, states, *_ = host.step(states, action)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(host._game, "shrink", interrupt)
        host.step(states, action)
    interrupted = host.step(states, action)
    assert_equal([x[0] for x in interrupted], restored(host, states[0], action[0]))


def test_a_picture_does_not_disturb():
    """It leaves the emulator a frame after the state that was read last."""
    host, states = game("pong", 1)
    action = random_actions(host, 1, 1)[0]
    _, states, *_ = host.step(states, action)
    expected = restored(host, states[0], action[0])
    host.step(host.step(states, action)[1], action)
    host.picture(states[0])
    assert_equal([x[0] for x in host.step(states, action)], expected)


def test_a_state_goes_on_in_another_process(tmp_path):
    """The bytes of a checkpoint are enough."""
    host, states = game("breakout", 3)
    actions = random_actions(host, 10, 3)
    for action in actions[:5]:
        _, states, *_ = host.step(states, action)
    np.savez(tmp_path / "given.npz", states=states, actions=actions[5:])
    for action in actions[5:]:
        results = host.step(states, action)
        states = results[1]
    code = f"""
import numpy as np
from env_adapters.host_atari import Atari
given = np.load({str(tmp_path / "given.npz")!r})
host = Atari("breakout", 4, False, 100_000)
states = given["states"]
for action in given["actions"]:
    results = host.step(states, action)
    states = results[1]
np.savez({str(tmp_path / "results.npz")!r}, *results)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert_equal(results, np.load(tmp_path / "results.npz").values())


def test_programs_at_the_same_time_do_not_meet():
    """Two that train and one that evaluates, all of one environment, step by step in turns."""
    env = make("gxm::Gymnasium/ALE/Breakout-v5")
    step = jax.jit(jax.vmap(env.step))

    def first(seed, number):
        keys = jax.random.split(jax.random.key(seed), number)
        return keys, jax.vmap(env.reset)(keys)[1]

    def advance(program):
        keys, state = program
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.ones(len(keys), int))
        actions = jax.vmap(env.action_space.sample)(keys)
        obs, state, reward, *_ = step(keys, state, actions)
        return (keys, state), (obs, reward, state)

    alone = []
    for seed, number in ((0, 3), (1, 3), (2, 2)):
        program, trace = first(seed, number), []
        for _ in range(6):
            program, result = advance(program)
            trace.append(jax.device_get(result))
        alone.append(trace)
    programs = [first(0, 3), first(1, 3), first(2, 2)]
    for t in range(6):
        for i, program in enumerate(programs):
            programs[i], result = advance(program)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(result), alone[i][t])


# --- Other processes -----------------------------------------------------------------------------


@pytest.fixture
def with_worker(monkeypatch):
    """A game with another process that is there, states, and what was computed without it."""
    monkeypatch.setattr(host_atari, "num_cores", lambda: 2)
    monkeypatch.setattr(host_atari, "START_SECONDS", 0.0)
    monkeypatch.setattr(host_atari, "MAX_ROWS", 2)  # seven rows take both two turns
    host, states = game("breakout", 7)
    actions = random_actions(host, 4, 7)
    expected = []
    before = states
    for action in actions:
        expected.append(restored_rows(host, before, action))
        before = expected[-1][1]
    host.step(states, actions[0])
    host.step(states, actions[0])  # starts it
    (worker,) = host._workers
    deadline = time.monotonic() + 60
    while not worker.is_ready():
        assert worker._stop.alive and time.monotonic() < deadline
        time.sleep(0.05)
    return host, worker, states, actions, expected


def test_another_process_computes_the_same(with_worker, monkeypatch):
    host, worker, states, actions, expected = with_worker
    served = []
    monkeypatch.setattr(worker, "begin", lambda rows: served.append(len(rows)) or begin(rows))
    begin = type(worker).begin.__get__(worker)
    for action, results in zip(actions, expected, strict=True):
        assert_equal(host.step(states, action), results)
        states = results[1]
    assert served == [2, 1] * 4
    host.step(states[:1], actions[0][:1])
    assert len(served) == 8  # a single environment has nothing to share


def test_a_process_that_dies_is_replaced_by_this_one(with_worker):
    host, worker, states, actions, expected = with_worker
    assert_equal(host.step(states, actions[0]), expected[0])
    os.kill(worker._process.pid, signal.SIGKILL)
    for action, results in zip(actions, expected, strict=True):
        assert_equal(host.step(states, action), results)
        states = results[1]
    assert not worker.is_ready() and worker._process.poll() is not None


def test_the_other_process_ends_with_its_game():
    host, _ = game("breakout", 1)
    worker = host_atari.Worker(host._game.row, host._arguments)
    process = worker._process
    del worker
    assert process.poll() is not None


# --- States that nobody has made -----------------------------------------------------------------


def test_a_state_that_the_emulator_cannot_load_begins_anew(tmp_path, rng):
    """It runs nothing, and the states that are stepped with it and after it are none the worse."""
    host, states = game("pong", 2)
    actions = np.zeros((2, 4), np.int32)
    good = host.step(states, actions)
    bad = np.zeros((3, host.state_size), np.uint8)
    payload = pickle.dumps(Bomb(f"touch {tmp_path / 'ran'}"), protocol=0)
    bad[0, : len(payload)] = np.frombuffer(payload, np.uint8)
    bad[1] = rng.integers(256, size=host.state_size)
    bad[2, :1000] = states[0, :1000]
    rows = np.concatenate([bad, states])
    mixed = host.step(rows, np.zeros((5, 4), np.int32))
    for x, y in zip(good, mixed, strict=True):
        np.testing.assert_array_equal(x, y[3:])
    again = host.step(states, actions)
    jax.tree.map(np.testing.assert_array_equal, good, again)
    assert host.picture(bad[0]).shape[-1] == 3 and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("id", [id for id in gxm.ids() if "/ALE/" in id])
def test_going_on_is_restoring_in_every_game(id):
    spec = gxm.import_gymnasium().registry[id.partition("/")[2]]
    test_going_on_from_a_state_is_restoring_it(spec.kwargs["game"])
