"""brax and MuJoCo: the libraries' own numbers, however many environments and threads step at the same time."""

import functools
import os
import subprocess
import sys
import threading

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

import envs
from envs import make

GYMNASIUM = [env_id for env_id in envs.mujoco_ids() if env_id not in envs.PLAYGROUND]
CHEAP_BRAX = "brax::inverted_pendulum"


def check_conformance(env):
    """Shapes and dtypes are those of the spaces, reset and step agree in structure, and nothing is weakly typed."""

    def one_step(key):
        obs, state = env.reset(key)
        return (obs, state), env.step(key, state, env.action_space.sample(key))

    (first_obs, first_state), (obs, state, reward, terminated, truncated, info) = jax.eval_shape(
        one_step, jax.random.key(0)
    )
    for actual in (first_obs, obs, info["final_obs"]):
        assert (actual.shape, actual.dtype) == (env.observation_space.shape, jnp.float32)
    assert jax.tree.structure(first_state) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(first_state), jax.tree.leaves(state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((first_obs, first_state, obs, state, reward, info)))
    assert (reward.shape, reward.dtype) == ((), jnp.float32)
    assert [(x.shape, x.dtype) for x in (terminated, truncated, info["episode_done"])] == [((), jnp.bool_)] * 3


@pytest.mark.parametrize("env_id", GYMNASIUM)
def test_conformance_of_mujoco(env_id):
    env = make(f"mujoco::{env_id}")
    check_conformance(env)
    assert env.max_steps == gymnasium.spec(env_id).max_episode_steps
    assert (env.action_space.low < env.action_space.high).all()


@pytest.mark.parametrize("env_id", [pytest.param(env_id, marks=pytest.mark.slow) for env_id in envs.BRAX])
def test_conformance_of_brax(env_id):
    env = make(f"brax::{env_id}", backend="spring")
    check_conformance(env)
    assert env.max_steps == 1000


def test_ids_are_those_of_the_libraries():
    brax = envs.import_silently("brax.envs", "brax", "brax")
    assert set(envs.BRAX) == set(brax._envs) - {"fast", "swimmer"}
    registered = {spec.id for spec in gymnasium.registry.values() if "mujoco" in str(spec.entry_point)}
    left_out = {env_id for env_id in registered - set(GYMNASIUM) if not env_id.endswith(("-v2", "-v3"))}
    assert left_out == {"Pusher-v4"}  # needs mujoco 2
    with pytest.raises(ImportError, match="mujoco<3"), envs.quiet():
        gymnasium.make("Pusher-v4")


# --- mujoco against Gymnasium ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("env", "steps"))
def rollout(env, key, steps):
    """Uniform actions: the first obs, then obs, action, reward, terminated, truncated and info of every step."""

    def step(state, key):
        action = env.action_space.sample(key)
        obs, state, *rest = env.step(key, state, action)
        return state, (obs, action, *rest)

    obs, state = env.reset(key)
    return obs, jax.lax.scan(step, state, jax.random.split(key, steps))[1]


@jax.jit
def seed_of(key):
    return jax.random.bits(key, dtype=jnp.uint32)


@pytest.mark.parametrize(
    "env_id", [pytest.param(x, marks=pytest.mark.slow if x.endswith("4") else ()) for x in GYMNASIUM]
)
def test_episodes_are_those_of_gymnasium(env_id):
    """To the last bit, from the first observation to the end, and on into the next episode."""
    env, key = make(f"mujoco::{env_id}"), jax.random.key(7)
    steps = 20 + gymnasium.spec(env_id).max_episode_steps
    first_obs, results = jax.device_get(rollout(env, key, steps))
    with envs.quiet():
        theirs = gymnasium.make(env_id)
    obs, _ = theirs.reset(seed=int(seed_of(key)))
    np.testing.assert_array_equal(first_obs, np.float32(obs))
    keys = jax.random.split(key, steps)
    for t, (next_obs, action, reward, terminated, truncated, final_obs) in enumerate(
        zip(*results[:-1], results[-1]["final_obs"], strict=True)
    ):
        obs, *expected, _ = theirs.step(action)
        np.testing.assert_array_equal(final_obs, np.float32(obs))
        assert (reward, terminated, truncated) == (np.float32(expected[0]), expected[1], expected[2])
        if terminated or truncated:
            reset_key = jax.random.split(keys[t])[1]
            obs, _ = theirs.reset(seed=int(seed_of(reset_key)))
        np.testing.assert_array_equal(next_obs, np.float32(obs))


def test_vmaps_compute_what_single_environments_do(monkeypatch):
    """8 environments of 3 seeds, in threads, some of which fall: each as if it were alone."""
    host_mujoco = pytest.importorskip("host_mujoco")
    monkeypatch.setattr(host_mujoco, "THREAD_SECONDS", 1e-9)
    env, steps = make("mujoco::Hopper-v5"), 30
    keys = jax.random.split(jax.random.key(1), (3, 8))
    nested = jax.vmap(jax.vmap(lambda key: rollout(env, key, steps)))(keys)
    assert nested[1][3].any() and not nested[1][3].any(axis=-1).all()  # terminated
    for seed, row in [(0, 0), (1, 5), (2, 7)]:
        alone = rollout(env, keys[seed, row], steps)
        jax.tree.map(lambda x, y, at=(seed, row): np.testing.assert_array_equal(x[at], y), nested, alone)


@pytest.mark.parametrize("thread_seconds", [1e-9, 1e9])
def test_rewards_compare_places_of_the_same_environment(thread_seconds, monkeypatch):
    """Ant looks at the place of its torso before a step: each of several ants at its own."""
    host_mujoco = pytest.importorskip("host_mujoco")
    monkeypatch.setattr(host_mujoco, "THREAD_SECONDS", thread_seconds)
    env, keys = make("mujoco::Ant-v5"), jax.random.split(jax.random.key(1), 3)
    together = jax.vmap(lambda key: rollout(env, key, 5))(keys)
    for row, key in enumerate(keys):
        jax.tree.map(lambda x, y, at=row: np.testing.assert_array_equal(x[at], y), together, rollout(env, key, 5))


def test_only_those_who_look_at_places_carry_them():
    host_mujoco = pytest.importorskip("host_mujoco")
    with_places = set()
    for env_id in GYMNASIUM:
        with envs.quiet():
            host = host_mujoco.HostMujoco(gymnasium.make(env_id))
        size = host_mujoco.mujoco.mj_stateSize(host.env.model, host_mujoco.STATE)
        with_places |= {env_id} if host.state_size > 2 * size else set()
    assert with_places == {"Reacher-v4", "Ant-v4", "Ant-v5", "Humanoid-v4", "Humanoid-v5"}


def test_a_step_that_reads_what_states_do_not_have_is_refused():
    host_mujoco = pytest.importorskip("host_mujoco")

    class Peeking(HopperEnv):
        def step(self, action):
            self.data.cvel.sum()
            return super().step(action)

    with envs.quiet(), pytest.raises(NotImplementedError, match="reads \\['cvel'\\] before it simulates"):
        host_mujoco.HostMujoco(Peeking())


def test_more_environments_than_are_simulated_at_once(monkeypatch):
    host_mujoco = pytest.importorskip("host_mujoco")
    env = make("mujoco::InvertedPendulum-v5")
    run = jax.jit(jax.vmap(lambda key: rollout(env, key, 3)))
    keys = jax.random.split(jax.random.key(2), 5)
    whole = jax.device_get(run(keys))
    monkeypatch.setattr(host_mujoco, "MAX_ROWS", 2)
    jax.tree.map(np.testing.assert_array_equal, whole, jax.device_get(run(keys)))


def test_python_keeps_the_state_of_the_threads_that_call():
    """It would make that of a thread of XLA's anew in every call, which takes as long as a light environment's step."""
    host_mujoco = pytest.importorskip("host_mujoco")
    local, thread_of_call, is_new = threading.local(), [], []

    def identity(rows):
        thread_of_call.append(threading.get_ident())
        is_new.append(not hasattr(local, "seen"))
        local.seen = True
        return rows

    def step(keys, _):
        rows = jnp.concatenate([jax.random.uniform(key, (8, 6)) for key in keys])  # enough to do for several threads
        return jax.vmap(jax.random.fold_in)(keys, jnp.arange(8)), host_mujoco.call_on_host(identity, rows, 6)

    keys = jax.random.split(jax.random.key(0), 8)
    jax.block_until_ready(jax.jit(lambda keys: jax.lax.scan(step, keys, length=50))(keys))
    assert len(is_new) == 50
    if set(thread_of_call) == {threading.get_ident()}:
        pytest.skip("with a single core XLA has no threads")
    assert sum(is_new) == len(set(thread_of_call))


def test_keys_decide():
    env = make("mujoco::HalfCheetah-v5")
    one, same, other = (rollout(env, jax.random.key(key), 5) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one[0], other[0])


def test_programs_at_the_same_time_do_not_meet():
    """Threads that step the same environment, and programs that are dispatched before others have ended."""
    env = make("mujoco::HalfCheetah-v5")
    run = jax.jit(jax.vmap(lambda key: rollout(env, key, 50)))
    keys = [jax.random.split(jax.random.key(key), 4) for key in range(3)]
    alone = [jax.device_get(run(key)) for key in keys]
    dispatched = jax.device_get([run(key) for key in keys])
    together = [None] * len(keys)

    def work(i):
        together[i] = jax.device_get(run(keys[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    jax.tree.map(np.testing.assert_array_equal, alone, dispatched)
    jax.tree.map(np.testing.assert_array_equal, alone, together)


def test_only_ended_episodes_are_reset_on_the_host(monkeypatch):
    """Gymnasium's reset is as dear as its step: it is called for those episodes that end only."""
    env = make("mujoco::Hopper-v5", max_steps=1000, reset_noise_scale=0.004)
    resets, reset_model = [], HopperEnv.reset_model
    monkeypatch.setattr(HopperEnv, "reset_model", lambda env: resets.append(env) or reset_model(env))
    *_, info = jax.vmap(lambda key: rollout(env, key, 60))(jax.random.split(jax.random.key(0), 4))[1]
    ends = np.asarray(info["episode_done"])
    assert ends.any() and len(resets) == 4 + ends.sum() < ends.size / 2


def test_truncation_and_termination_are_told_apart():
    env = make("mujoco::Hopper-v5", max_steps=12)
    _, (next_obs, _, _, terminated, truncated, info) = jax.vmap(lambda key: rollout(env, key, 60))(
        jax.random.split(jax.random.key(0), 8)
    )
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    assert (info["episode_length"][truncated] == 12).all() and (info["episode_length"][terminated] <= 12).all()
    height, angle = info["final_obs"][..., 0], info["final_obs"][..., 1]
    speed = jnp.abs(info["final_obs"][..., 2:]).max(axis=-1)
    np.testing.assert_array_equal((height <= 0.7) | (jnp.abs(angle) >= 0.2) | (speed >= 100), terminated)
    done = info["episode_done"]
    np.testing.assert_array_equal(next_obs[~done], info["final_obs"][~done])
    assert (jnp.abs(next_obs[done][:, 0] - 1.25) < 0.01).all()  # Hopper starts upright


def test_options_reach_gymnasium():
    base, changed = (make("mujoco::HalfCheetah-v5", **options) for options in ({}, {"forward_reward_weight": 3}))
    key = jax.random.key(0)
    (_, one), (_, other) = rollout(base, key, 5), rollout(changed, key, 5)
    np.testing.assert_array_equal(one[0], other[0])
    control = -0.1 * jnp.square(one[1]).sum(axis=-1)
    np.testing.assert_allclose(other[2] - control, 3 * (one[2] - control), rtol=1e-4, atol=1e-5)
    assert make("mujoco::Ant-v5", include_cfrc_ext_in_observation=False).observation_space.shape == (27,)


def test_nothing_is_printed_or_left_behind(tmp_path):
    code = (
        "import envs, jax\n"
        "env = envs.make('mujoco::HalfCheetah-v4')\n"
        "jax.block_until_ready(jax.jit(env.reset)(jax.random.key(0)))\n"
        "jax.eval_shape(envs.make('brax::inverted_pendulum', backend='spring').reset, jax.random.key(0))\n"
    )
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # JAX 0.9 warns when it takes a program from there
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert run.stdout + run.stderr == "" and not list(tmp_path.iterdir())


# --- brax against brax -----------------------------------------------------------------------------------------------


def test_brax_steps_are_those_of_brax():
    """Every step from the state that our environment was in, every beginning from the key that it was made of."""
    brax = envs.import_silently("brax.envs", CHEAP_BRAX, "brax")
    env, steps = make(CHEAP_BRAX, backend="spring", max_steps=15), 60
    with envs.quiet():
        library = brax.get_environment("inverted_pendulum", backend="spring")

    def step(carry, key):
        obs, state = carry
        action = env.action_space.sample(key)
        next_obs, next_state, *rest = env.step(key, state, action)
        return (next_obs, next_state), (state.task[0], action, next_obs, *rest)

    keys = jax.random.split(jax.random.key(1), steps)
    carry = jax.jit(env.reset)(jax.random.key(0))
    physics, action, next_obs, reward, terminated, truncated, info = jax.jit(lambda c: jax.lax.scan(step, c, keys)[1])(
        carry
    )
    zeros = jnp.zeros(steps)
    theirs = jax.jit(jax.vmap(library.step))(brax.State(physics, zeros, zeros, zeros, info={"time_out": zeros}), action)
    np.testing.assert_allclose(info["final_obs"], theirs.obs, atol=1e-5)
    np.testing.assert_allclose(reward, theirs.reward, atol=1e-5)
    np.testing.assert_array_equal(terminated, theirs.done > 0.5)
    assert terminated.any() and truncated.any() and not (terminated & truncated).any()
    assert (info["episode_length"][truncated] == 15).all()
    done, reset_keys = info["episode_done"], jax.vmap(lambda key: jax.random.split(key)[1])(keys)
    first_obs = jax.jit(jax.vmap(lambda key: library.reset(key).obs))(reset_keys)
    np.testing.assert_allclose(next_obs, jnp.where(done[:, None], first_obs, info["final_obs"]), atol=1e-6)


def test_a_costly_beginning_is_computed_where_an_episode_ends_only():
    """The branch gives what computing always gives, alone and in batches of batches, in groups of sqrt(n) of n."""
    calls = []

    def always(key):
        return jax.random.uniform(key, (2,))

    def first(key):
        return jax.pure_callback(counted, jax.eval_shape(always, key), always(key), vmap_method="sequential")

    def counted(x):
        calls.append(x)
        return x

    def both(done, key, x):
        return envs.branch_where(done, first, key, x), envs.where(done, always, key, x)

    keys, x = jax.random.split(jax.random.key(0), (8, 9)), jnp.ones((8, 9, 2))
    three = jnp.zeros((8, 9), bool).at[[0, 2, 7], [8, 1, 3]].set(True)
    of_all, of_some, of_one = np.s_[:, :], np.s_[2], np.s_[2, 1:2]
    alone, batch, batches = both, jax.vmap(both), jax.vmap(jax.vmap(both))
    for function, at, ends, computed in [
        (alone, (2, 1), three, 1),
        (alone, (0, 0), three, 0),
        (batch, of_one, three, 1),
        (batch, of_one, ~three, 0),
        (batch, of_some, three, 3),
        (batches, of_all, three, 8),
        (batches, of_all, jnp.zeros_like(three), 0),
        (batches, of_all, jnp.ones_like(three), 72),
    ]:
        calls.clear()
        np.testing.assert_array_equal(*jax.jit(function)(ends[at], keys[at], x[at]))
        assert len(calls) == computed


# --- Masks -----------------------------------------------------------------------------------------------------------


def kinds(id, **options):
    """The observation's indices: positions, velocities, the rest."""
    env = make(id, **options)
    position, velocity = (list(env._task.masks[name]) for name in ("position", "velocity"))
    rest = sorted(set(range(env.observation_space.shape[0])) - set(position) - set(velocity))
    assert not set(position) & set(velocity)
    return position, velocity, rest


@pytest.mark.parametrize("env_id", GYMNASIUM)
def test_masks_of_mujoco_are_positions_and_velocities(env_id):
    """Changing qvel alone changes velocities alone, changing qpos does not change the entries that are qvel's own."""
    with envs.quiet():
        theirs = gymnasium.make(env_id).unwrapped
    position, velocity, rest = kinds(f"mujoco::{env_id}")
    theirs.reset(seed=0)
    qpos, qvel = theirs.data.qpos.copy(), theirs.data.qvel.copy()
    observe = theirs._get_obs
    before = observe()
    theirs.set_state(qpos, qvel + 0.1)
    faster = observe()
    theirs.set_state(qpos + 0.01, qvel)
    moved = observe()
    assert set(np.flatnonzero(faster != before)) <= set(velocity + rest)
    assert set(np.flatnonzero(moved != before)) <= set(position + velocity + rest)
    own = velocity[: theirs.model.nv] if theirs.model.nv <= len(velocity) else velocity
    np.testing.assert_allclose(before[own], np.clip(qvel, -10, 10)[: len(own)])
    np.testing.assert_allclose(moved[own], before[own])
    np.testing.assert_allclose(faster[own] - before[own], 0.1)
    assert (moved != before)[position].any() and len(velocity) >= theirs.model.nv // 2


def test_masks_of_mujoco_count_right():
    assert [len(x) for x in kinds("mujoco::Ant-v5")] == [13, 14, 78]  # the rest: contact forces
    assert [len(x) for x in kinds("mujoco::Ant-v5", exclude_current_positions_from_observation=False)] == [15, 14, 78]
    assert [len(x) for x in kinds("mujoco::Humanoid-v5")] == [22 + 130, 23 + 78, 17 + 78]
    assert [len(x) for x in kinds("mujoco::Humanoid-v4")] == [22 + 140, 23 + 84, 23 + 84]
    assert [len(x) for x in kinds("mujoco::Humanoid-v5", include_cinert_in_observation=False)] == [22, 101, 95]
    assert make("mujoco::Hopper-v5", mask="velocity").observation_space.shape == (5,)
    full, masked = (rollout(make("mujoco::Hopper-v5", mask=mask), jax.random.key(0), 5) for mask in ((), "velocity"))
    np.testing.assert_array_equal(full[1][0][:, :5], masked[1][0])


BRAX_MASKED = [CHEAP_BRAX] + [
    pytest.param(f"brax::{env_id}", marks=pytest.mark.slow) for env_id in envs.BRAX if env_id not in CHEAP_BRAX
]


@pytest.mark.parametrize("id", BRAX_MASKED)
def test_masks_of_brax_are_positions_and_velocities(id):
    position, velocity, rest = kinds(id, backend="spring")
    env_id = id.partition("::")[2]
    library = envs.import_silently("brax.envs", id, "brax").get_environment(env_id, backend="spring")

    def observe(q, qd):
        physics = library.pipeline_init(q, qd)
        arguments = (jnp.zeros(library.action_size),) if env_id.startswith("humanoid") else ()
        return library._get_obs(physics, *arguments)

    state = library.reset(jax.random.key(0)).pipeline_state
    observe = jax.jit(observe)
    before, faster = observe(state.q, state.qd), observe(state.q, state.qd + 0.1)
    changed = np.flatnonzero(np.abs(faster - before) > 1e-4)
    assert len(changed) and set(changed) <= set(velocity + rest)
    moved = np.flatnonzero(np.abs(observe(state.q + 0.01, state.qd) - before) > 1e-4)
    assert len(moved) and set(moved) & set(position)
    if env_id != "reacher":  # which shows the fingertip's velocity
        own = velocity[: library.sys.qd_size()]
        np.testing.assert_allclose(before[np.array(own)], state.qd[: len(own)], atol=1e-6)


# --- Drawing, errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("id", "options"), [("mujoco::Hopper-v5", {}), (CHEAP_BRAX, {"backend": "spring"})])
def test_drawing(id, options):
    env = make(id, **options)
    _, state = jax.jit(env.reset)(jax.random.key(0))
    try:
        image = env.render(jax.device_get(state.task))
    except ValueError as error:
        assert "MUJOCO_GL" in str(error)
        pytest.skip("no OpenGL here")
    assert image.shape == (480, 480, 3) and image.dtype == np.uint8 and image.std() > 5


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        (
            "brax::ant",
            {"backend": "sprin"},
            r"backend 'sprin' of brax::ant \(did you mean 'spring'\?\); valid: general",
        ),
        ("brax::ant", {"max_step": 3}, r"brax::ant has no option 'max_step' \(did you mean 'max_steps'\?\)"),
        ("brax::ant", {"max_steps": 0}, r"max_steps of brax::ant must be at least 1, got 0"),
        ("brax::swimmer", {}, r"unknown environment 'brax::swimmer'"),
        ("mujoco::HalfCheetah-v3", {}, r"'mujoco::HalfCheetah-v3' \(did you mean 'mujoco::HalfCheetah-v"),
        ("mujoco::Hopper-v5", {"helthy_reward": 1.0}, r"no option 'helthy_reward' \(did you mean 'healthy_reward'\?\)"),
        ("mujoco::Hopper-v5", {"healthy_reward": "a"}, r"healthy_reward of mujoco::Hopper-v5 must be float, got 'a'"),
        ("mujoco::Hopper-v5", {"xml_file": "no.xml"}, r"cannot be made with .*no\.xml does not exist"),
        ("mujoco::Hopper-v5", {"max_steps": -1}, r"max_steps of mujoco::Hopper-v5 must be at least 1, got -1"),
        ("HalfCheetah-v5", {}, r"has no namespace \(did you mean 'mujoco::HalfCheetah-v5'\?\)"),
    ],
)
def test_make_refuses(id, options, message):
    with pytest.raises(ValueError, match=message):
        make(id, **options)


@pytest.mark.parametrize(
    ("id", "module", "install"),
    [
        ("mujoco::CheetahRun", "mujoco_playground", "playground"),
        ("mujoco::Swimmer-v5", "mujoco", r"gymnasium\[mujoco\]"),
        ("brax::hopper", "brax.envs", "brax"),
    ],
)
def test_what_is_not_installed_is_named(id, module, install, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{id} needs {module}, which is not installed: pip install '{install}'"):
        make(id, max_steps=7)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartpoleBalance", "PendulumSwingup"])
def test_playground(env_id):
    pytest.importorskip("mujoco_playground")
    env = make(f"mujoco::{env_id}", max_steps=3)
    check_conformance(env)
    _, (next_obs, _, _, terminated, truncated, info) = rollout(env, jax.random.key(0), 7)
    assert not terminated.any() and truncated.tolist() == [False, False, True] * 2 + [False]
    assert (next_obs != info["final_obs"]).any(axis=1).tolist() == truncated.tolist()
