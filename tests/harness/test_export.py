"""Exported agents: their actions and carries are those of the script, whatever runs them."""

import dataclasses
import importlib
import json
import re
import sys
from functools import partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALGORITHMS, SCRIPTS, as_command, is_continuous, tiny, words

from algorithms import ppo, rppo
from env_adapters.environment import Environment
from env_adapters.registry import _make
from env_adapters.task import first_of, numbers_of
from envs import Discrete, MultiDiscrete, without_mask
from experiment import seed_keys
from harness.export import Agent, as_jaxexport, as_onnx
from harness.options import launch
from memory_cells import CELLS

SMALL = {  # the sizes of memories that are large
    "gtrxl": {"memory_length": 8, "num_blocks": 1},
    "gpt2": {"context_length": 8, "num_blocks": 1},
    "dnc": {"controller_size": 8, "num_slots": 8, "slot_size": 4},
    "shm": {"memory_size": 8},
}
NORMALIZED = {"normalize_obs": True, "normalize_reward": True}
STEPS = 12  # of environments whose episodes have 5
NUM_ENVS = 3
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
FEW = ["lru", "shm", "gtrxl"]  # complex numbers, a table, a window


def module_of(script):
    return importlib.import_module(f"algorithms.{script}")


def random_agent(module, **changes):
    """The environment and a state whose parameters and statistics are far from the initial ones."""
    config = tiny(module, **changes)
    state = module.init(config, seed_keys(config))
    rng = np.random.default_rng(0)

    def shift(scale, x):
        return x + scale * rng.standard_normal(x.shape, np.float32)

    params = jax.tree.map(lambda x: shift(0.1, x), state.params)
    statistics = jax.tree.map(lambda x: abs(shift(0.5, x)), state.env_state.statistics)
    env_state = state.env_state._replace(statistics=statistics)
    return config.make_env(), state.replace(params=params, env_state=env_state)


def played(module, env, state):
    """What the script's policy read and did, (STEPS, NUM_ENVS, ...): inputs, actions, carries.

    Observations and rewards are those of the task. Episodes end, and some begin unannounced.
    """
    flags = np.random.default_rng(1).random((STEPS, NUM_ENVS)) < 0.2
    bare = Environment(env.id, env._task)

    def play(frozen, policy, initialize, key, *_):
        keys = jax.random.split(key, NUM_ENVS)
        obs, env_state = jax.vmap(frozen.reset)(keys)
        raw, raw_state = jax.vmap(bare.reset)(keys)
        action = jnp.zeros((NUM_ENVS, *env.action_space.shape), env.action_space.dtype)
        reward = jnp.zeros(NUM_ENVS)

        def step(loop, flag):
            carry, obs, raw, done, action, reward, raw_reward, env_state, raw_state = loop
            start = done | flag
            inputs = {"obs": without_mask(raw), "start": start, "previous_action": action}
            inputs["previous_reward"] = raw_reward
            if env.has_action_mask:
                inputs["action_mask"] = raw.action_mask
            carry, action = policy(carry, obs, start, action, reward, key)
            action = action.astype(env.action_space.dtype)
            obs, env_state, reward, *_, info = jax.vmap(frozen.step)(keys, env_state, action)
            raw, raw_state, raw_reward, *_ = jax.vmap(bare.step)(keys, raw_state, action)
            done = info["episode_done"]
            loop = (carry, obs, raw, done, action, reward, raw_reward, env_state, raw_state)
            return loop, (inputs, action, carry)

        start = jnp.ones(NUM_ENVS, bool)
        loop = (initialize(NUM_ENVS), obs, raw, start, action, reward, reward)
        return jax.lax.scan(step, (*loop, env_state, raw_state), flags)[1]

    return jax.tree.map(lambda x: np.asarray(x[0]), module.evaluate(state, env, 1, play=play))


def executed(env, action):
    """Actions in the units of the task and within its bounds, by numpy."""
    own = env._task.own_actions
    if isinstance(own, MultiDiscrete):
        action = np.stack(np.unravel_index(action, own.nvec), axis=-1)
        return action + np.array(own.start or 0)
    if action.dtype == np.int32:
        return action
    action = np.clip(action, env.action_space.low, env.action_space.high)
    return action if own is None else own.low + (action + 1) / 2 * (own.high - own.low)


def check(agent, env, run, expected, sizes):
    """Hold a program, dict -> (action, dict), against what was played, for sizes of batches."""
    inputs, actions, carries = expected
    carries = [
        np.stack([leaf.real, leaf.imag], axis=-1) if np.iscomplexobj(leaf) else leaf
        for leaf in jax.tree.leaves(carries)
    ]
    parts = jax.tree.leaves(inputs.pop("obs"))
    inputs |= {array.name: x for array, x in zip(agent.observations, parts, strict=True)}
    inputs["previous_action"] = executed(env, inputs["previous_action"])
    assert inputs["start"][1:].any() and not inputs["start"].all()
    for size in sizes:
        # Episodes begin: nothing of this is read.
        carry = {x.name: np.full((size, *x.shape), 7, x.dtype) for x in agent.carries}
        for t in range(STEPS):
            now = {name: x[t, :size] for name, x in inputs.items()}
            action, carry = run(now | carry)
            assert np.asarray(action).dtype == agent.outputs[0].dtype
            close(action, executed(env, actions[t, :size]))
            for array, leaf in zip(agent.carries, carries, strict=True):
                got = carry[array.name]
                assert (got.shape, got.dtype) == ((size, *array.shape), array.dtype)
                close(got, leaf[t, :size])


def check_jaxexport(module, sizes=(NUM_ENVS,), **changes):
    env, state = random_agent(module, **changes)
    agent = Agent(module.evaluate, state, env)
    exported = jax.export.deserialize(bytearray(as_jaxexport(agent)))
    assert exported.platforms == ("cpu", "cuda")
    call = jax.jit(exported.call)

    def run(inputs):
        return call(*agent.arrange({array.name: inputs[array.name] for array in agent.inputs}))

    check(agent, env, run, played(module, env, state), sizes)


@pytest.mark.parametrize("script", [ppo, rppo])
def test_the_action_mask_is_an_input(script):
    check_jaxexport(script, env="test::Masked", env_kwargs={})


@pytest.mark.parametrize("script", ["rppo", "dqn", "rsac"])
def test_every_part_of_an_observation_is_an_input(script):
    module = module_of(script)
    changes = {"env": "test::Parts", "env_kwargs": {"continuous": is_continuous(module)}}
    check_jaxexport(module, **changes)
    agent = Agent(module.evaluate, *reversed(random_agent(module, **changes)))
    assert [x.name for x in agent.inputs[:2]] == ["obs.body.0", "obs.image"]


def test_actions_count_from_where_the_task_does():
    """Also where they stand for several parts: the program takes and returns the task's own."""
    for script, actions, says in [
        ("ppo", MultiDiscrete((3, 2), start=(1, -5)), "1 to 3; -5 to -4"),
        ("drqn", MultiDiscrete((3, 2), start=(1, -5)), "1 to 3; -5 to -4"),
        ("ppo", Discrete(3, start=2), "2 to 4"),
    ]:
        helpers.TASKS["Shifted"] = lambda actions=actions: shifted_task(actions)
        _make.cache_clear()
        module = module_of(script)
        env, state = random_agent(module, env="test::Shifted", env_kwargs={})
        agent = Agent(module.evaluate, state, env)
        assert says in agent.outputs[0].meaning
        inputs = {x.name: np.zeros((50, *x.shape), x.dtype) for x in agent.inputs}
        inputs["obs"] = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
        inputs["start"][:] = True
        action, _ = agent.step(*agent.arrange(inputs))
        numbers = np.asarray(action).reshape(50, -1) - first_of(actions)
        assert (numbers >= 0).all() and (numbers < numbers_of(actions)).all()
        assert agent.env.to_task(agent.env.from_task(action)).tolist() == action.tolist()


def shifted_task(actions):
    return dataclasses.replace(helpers.counting_task(5), action_space=actions)


@pytest.mark.parametrize("script", ["rppo_continuous", "rsacd"])
def test_the_critic_is_no_part_of_it(script):
    """Neither its memory nor what only it sees."""
    options = {"mask": ("1",), "critic_obs": "full", "env_kwargs": NORMALIZED}
    env, state = random_agent(module_of(script), **options)
    agent = Agent(module_of(script).evaluate, state, env)
    assert agent.inputs[0].shape == (1,)
    assert [array.shape for array in agent.carries] == [(8,)]
    check_jaxexport(module_of(script), **options)


def check_onnx(module, **changes):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    env, state = random_agent(module, **changes)
    agent = Agent(module.evaluate, state, env)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = as_onnx(agent, {"step": 64} | agent.describe())
    session = onnxruntime.InferenceSession(model, options)
    assert {x.name: x.shape for x in session.get_inputs()} == {
        x.name: ["batch", *x.shape] for x in agent.inputs
    }
    names = [x.name for x in session.get_inputs() if x.name.startswith("carry")]
    assert [x.name for x in session.get_outputs()] == ["action", *(f"next_{x}" for x in names)]
    about = session.get_modelmeta().custom_metadata_map
    assert about["step"] == "64" and about["env"] == env.id

    def run(inputs):
        action, *carry = session.run(None, inputs)
        return action, dict(zip(names, carry, strict=True))

    check(agent, env, run, played(module, env, state), (1, NUM_ENVS))


# --- Programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_jaxexport_acts_as_the_script_does(cell):
    sizes = (1, NUM_ENVS) if cell in FEW else (NUM_ENVS,)  # each is compiled
    check_jaxexport(rppo, sizes, cell=cell, cell_kwargs=SMALL.get(cell, {}), shared_torso=True)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "rppo"])
def test_jaxexport_of_every_script(script):
    check_jaxexport(module_of(script))


def test_jaxexport_of_images_and_layers():
    check_jaxexport(ppo, env="test::Picture", env_kwargs={})
    check_jaxexport(rppo, num_layers=2, env_kwargs=NORMALIZED)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=[] if cell in FEW else pytest.mark.slow) for cell in CELLS]
)
def test_onnx_acts_as_the_script_does(cell):
    check_onnx(rppo, cell=cell, cell_kwargs=SMALL.get(cell, {}), shared_torso=True)


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "rppo"])
def test_onnx_of_every_script(script):
    check_onnx(module_of(script))


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on CartPole that has trained for a moment, of two seeds."""
    path = tmp_path_factory.mktemp("runs") / "run"
    cartpole = {"env": "gymnax::CartPole-v1", "env_kwargs": {}, "num_seeds": 2}
    rppo.main(tiny(rppo, **cartpole, shared_torso=True, log=("file",), run_dir=str(path)))
    return path


def evaluate(run_dir, *args, code=0):
    """A command with --evaluate; exits with `code`."""
    with as_command("rppo", "--evaluate", str(run_dir), *args):
        if not code:
            return launch(rppo.main, rppo.Config)
        with pytest.raises(SystemExit) as ended:
            launch(rppo.main, rppo.Config)
    assert ended.value.code == code


def test_a_program_is_described_beside_it(run_dir, tmp_path, capsys):
    path = tmp_path / "agent.jaxexport"
    evaluate(run_dir, "--export", str(path))
    assert capsys.readouterr().out.splitlines()[-1] == f"greedy agent of seed 0: {path}"
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    about = json.loads((tmp_path / "agent.jaxexport.json").read_text())
    assert about["env"] == "gymnax::CartPole-v1" and about["script"] == "rppo"
    assert about["step"] == 64 and about["seed"] == 0 and about["cell"] == "gru"
    obs, carry, start, action, reward = about["inputs"]
    assert obs["name"] == "obs" and obs["shape"] == ["batch", 4] and obs["dtype"] == "float32"
    assert [x["name"] for x in (carry, start, action, reward)] == [
        "carry_0",
        "start",
        "previous_action",
        "previous_reward",
    ]
    assert about["outputs"][0]["meaning"] == "what to do: 0 to 1"
    shapes = [x["shape"][1:] for x in about["inputs"]]
    assert shapes == [list(x.shape[1:]) for x in exported.in_avals]


def test_what_cannot_be_exported_is_refused_in_one_sentence(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    evaluate(run_dir, "--export", str(tmp_path / "agent.onnx"), code=2)
    missing = "--export to .onnx needs jax2onnx, which is not installed: pip install jax2onnx"
    assert words(capsys.readouterr().err) == f"error: {missing}"
    evaluate(run_dir, "--export", "agent.pt", code=2)
    kinds = "export must be a file name that ends in .onnx or .jaxexport, got 'agent.pt'"
    assert words(capsys.readouterr().err) == f"error: {kinds}"
    with pytest.raises(ValueError, match="export needs a trained agent"):
        tiny(rppo, export=("agent.onnx",))


def test_the_player_of_the_readme_plays_cartpole(run_dir, tmp_path, monkeypatch, capsys):
    """With numpy and onnxruntime only, in at most 15 lines."""
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    evaluate(run_dir, "--export", "agent.onnx")
    capsys.readouterr()
    blocks = re.findall(r"```python\n(.*?)```", (ALGORITHMS / "README.md").read_text(), re.S)
    (player,) = [block for block in blocks if "onnxruntime" in block]
    assert len(player.splitlines()) <= 15
    exec(player, {})
    assert 8 <= float(capsys.readouterr().out) <= 500
