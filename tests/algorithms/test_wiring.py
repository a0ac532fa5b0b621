"""Which option and which key reaches what: read from the traced programs, without compiling them.

A program that is traced with the options as inputs shows which of them each of its outputs can
depend on: `reaches` removes all operations but those that lead to an output, and looks at what is
left. That an option is put to the right use is tested where its formula is.
"""

import copy
import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPLAY, SCRIPTS, one_gradient_step, tiny
from jax.experimental.key_reuse._core import check_key_reuse_jaxpr
from jax.interpreters.partial_eval import dce_jaxpr

from experiment import seed_keys
from harness.options import Experiment

# --- Every option of every script -----------------------------------------------------------------

# Options that may be any number while a program is traced.
NUMBERS = [
    "total_steps",
    "learning_rate",
    "anneal_lr",
    "gamma",
    "gae_lambda",
    "q_lambda",
    "clip_coef",
    "ent_coef",
    "vf_coef",
    "max_grad_norm",
    "tau",
    "target_network_frequency",
    "start_e",
    "end_e",
    "prev_action",
    "prev_reward",
    "autotune",
    "target_entropy",
    "target_entropy_ratio",
    "priority_exponent",
    "importance_exponent",
]
# Those of them with which a rollout acts.
ACTING = {"start_e", "end_e", "prev_action", "prev_reward"}

# Other values of options that change the program itself, and what of it.
UPDATE = {
    "num_steps": 4,
    "update_epochs": 3,
    "num_minibatches": 2,
    "bptt": 4,
    "normalize_advantage": False,
    "clip_vloss": True,
    "batch_size": 3,
    "sequence_length": 5,
    "burn_in": 1,
    "gradient_steps": 2,
    "double_q": False,
    "prioritized": True,
    "n_step": 2,
    "rescale": True,
}
ROLLOUT = {"exploration_fraction": 0.7, "learning_starts": 0}
INIT = {"hidden_size": 4, "num_layers": 2, "shared_torso": True, "alpha": 0.7, "num_envs": 8}
INIT |= {"cell": "lstm", "buffer_size": 320, "layer_norm": True}
# Tested by name below.
ENVIRONMENT = {"env", "env_kwargs", "mask", "cell_kwargs", "normalize_obs", "normalize_reward"}
ENVIRONMENT |= {"critic_obs"}

# Options of the run around the algorithm, which change no program of training.
PLUMBING = {
    "seed": 7,
    "num_seeds": 3,
    "num_devices": 2,
    "coordinator": "auto",
    "num_processes": 2,
    "process_id": 1,
    "log": (),
    "log_every": 3,
    "wandb_mode": "offline",
    "neptune_mode": "offline",
    "run_dir": "elsewhere",
    "resume": "runs/a",
    "init_from": "runs/a",  # replaces what `init` made, before the first update
    "eval_every": 7,
    "eval_episodes": 3,
    "num_eval_envs": 2,
    "eval_video": True,
    "eval_policy": "sample",
    "keep_checkpoints": 5,
    "evaluate": "runs/a",
    "best": True,
    "video": "a.gif",
    "export": ("a.onnx",),
    "compilation_cache": "elsewhere",
}


def module_of(script):
    return importlib.import_module(f"algorithms.{script}")


def names_of(script):
    return [field.name for field in dataclasses.fields(module_of(script).Config)]


def fields_of(state):
    names = [field.name for field in dataclasses.fields(state) if field.name != "config"]
    return {name: getattr(state, name) for name in names}


@dataclasses.dataclass
class Program:
    """A traced function of named inputs, which returns named outputs."""

    jaxpr: jax.extend.core.Jaxpr
    consts: list
    inputs: list  # of every flat input, its name
    outputs: list  # of every flat output, its name

    def only(self, *names):
        """What leads to these outputs, and which of the flat inputs that is."""
        return dce_jaxpr(self.jaxpr, [output in names for output in self.outputs])

    def reaches(self, *names):
        """The inputs that these outputs can depend on."""
        assert set(names) <= set(self.outputs)
        _, used = self.only(*names)
        return {name for name, is_used in zip(self.inputs, used, strict=True) if is_used}

    def operations(self, *names):
        """Everything that is computed for these outputs, all of them if none are named."""
        jaxpr, _ = self.only(*(names or self.outputs))
        consts = [np.asarray(x).tobytes() for x in self.consts if not is_key(x)]
        return list(walk(jaxpr)), consts


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def walk(jaxpr):
    """Name, constants, parameters and shapes of every operation, also of inner programs."""
    yield from (str(x.aval) for x in jaxpr.invars + jaxpr.outvars)
    for eqn in jaxpr.eqns:
        constants = [str(x.val) for x in eqn.invars if hasattr(x, "val")]
        shapes = [str(x.aval) for x in eqn.outvars]
        plain = [x for x in eqn.params.items() if isinstance(x[1], int | float | str | tuple)]
        yield eqn.primitive.name, constants, shapes, str(plain)
        for inner in inner_programs(eqn):
            yield from walk(inner)


def inner_programs(eqn):
    """The bodies of loops, branches and calls."""
    for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program):
        if is_program(x):
            yield getattr(x, "jaxpr", x)


def copied_keys(jaxpr):
    """Operations that make several equal keys of one."""
    for eqn in jaxpr.eqns:
        if inner := list(inner_programs(eqn)):
            yield from (copy for program in inner for copy in copied_keys(program))
        elif not eqn.primitive.name.startswith("random_"):
            given = sum(x.aval.size for x in eqn.invars if is_key(x.aval))
            made = sum(x.aval.size for x in eqn.outvars if is_key(x.aval))
            if made > given > 0:
                yield str(eqn)


def is_program(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def traced(function, **inputs):
    """The Program of a function of keyword arguments that returns a dictionary."""
    jaxpr, outputs = jax.make_jaxpr(function, return_shape=True)(**inputs)

    def labels(tree):
        return [name for name in sorted(tree) for _ in jax.tree.leaves(tree[name])]

    return Program(jaxpr.jaxpr, jaxpr.consts, labels(inputs), labels(outputs))


def state_of(script, config):
    """The shapes of one seed's state."""
    states = jax.eval_shape(lambda: module_of(script).init(config, seed_keys(config)))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)


def traced_update(script, config):
    """An update as a Program of the state's fields and of the config's numbers."""
    module, env, state = module_of(script), config.make_env(), state_of(script, config)
    numbers = {name: getattr(config, name) for name in NUMBERS if name in names_of(script)}

    def update(**inputs):
        changed = copy.copy(config)
        for name in numbers:
            object.__setattr__(changed, name, inputs.pop(name))
        after, metrics = module.update(state.replace(**inputs, config=changed), env)
        return fields_of(after) | metrics

    return traced(update, **numbers, **fields_of(state))


def traced_init(script, config):
    def init(key):
        return fields_of(module_of(script).init(config, key))

    return traced(init, key=seed_keys(config))


@functools.cache
def plain_update(script):
    return traced_update(script, one_gradient_step(module_of(script)))


def test_every_option_is_in_one_of_the_tables():
    """A new one must be, too."""
    for script in SCRIPTS:
        tables = (NUMBERS, UPDATE, ROLLOUT, INIT, ENVIRONMENT, PLUMBING)
        for name in names_of(script):
            assert sum(name in table for table in tables) == 1, f"{script}: {name}"
    plain = {field.name for field in dataclasses.fields(Experiment)}
    assert plain - {"total_steps"} <= set(PLUMBING)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_reaches_what_it_should_and_nothing_else(script):
    changes = {"prioritized": True} if script == "drqn" else {}
    program = traced_update(script, one_gradient_step(module_of(script), **changes))
    numbers = set(NUMBERS) & set(names_of(script))
    # The observation that is acted on next shows the last action.
    seen = "inputs" if "cell" in names_of(script) else "obs"
    schedule = {"total_steps"} if "start_e" in numbers else set()
    assert program.reaches(seen) & numbers == numbers & ACTING | schedule
    assert program.reaches("params") & numbers == numbers
    if script in REPLAY:
        assert program.reaches("target_params") & numbers == numbers
    rate = {"learning_rate", "anneal_lr", "total_steps", "updates"}
    assert program.reaches("charts/learning_rate") == rate
    if "start_e" in numbers:
        assert program.reaches("charts/epsilon") == {"start_e", "end_e", "total_steps", "updates"}
        assert "updates" in program.reaches(seen)
    if script == "drqn":
        exponents = {"priority_exponent", "importance_exponent"}
        assert not exponents & plain_update(script).reaches(*program.outputs)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_other_option_changes_the_program(script):
    known, config = names_of(script), one_gradient_step(module_of(script))
    seen = "inputs" if "cell" in known else "obs"
    for table, output in ((UPDATE, "params"), (ROLLOUT, seen)):
        for name in sorted(set(table) & set(known)):
            if name == "learning_starts" and "sac" not in script:
                continue  # only `warmup` reads it
            changed = traced_update(script, dataclasses.replace(config, **{name: table[name]}))
            assert changed.operations(output) != plain_update(script).operations(output), name
            if name in ("update_epochs", "num_minibatches", "gradient_steps"):  # not its clock
                rate = "charts/learning_rate"
                assert changed.operations(rate) == plain_update(script).operations(rate), name
    config = dataclasses.replace(config, cell="gru") if "cell" in known else config
    first = traced_init(script, config).operations()
    for name in sorted(set(INIT) & set(known)):
        changed = traced_init(script, dataclasses.replace(config, **{name: INIT[name]}))
        assert changed.operations() != first, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_of_the_run_change_no_training(script):
    config = one_gradient_step(module_of(script))
    changes = {name: value for name, value in PLUMBING.items() if name in names_of(script)}
    changed = dataclasses.replace(config, **changes)
    assert traced_update(script, changed).operations() == plain_update(script).operations()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_environment_and_the_memory_are_made_with_their_options(script):
    config = tiny(module_of(script), env_kwargs={"terminal_every": 9})
    assert config.make_env()._task.max_steps == 9
    masked = dataclasses.replace(config, mask=("1",)).make_env()
    assert masked.observation_space.shape == (1,)
    assert one_gradient_step(module_of(script)).make_env().id.startswith("test::Echo")
    if "critic_obs" in names_of(script):
        env = dataclasses.replace(config, mask=("1",), critic_obs="full").make_env()
        obs, _ = jax.eval_shape(env.reset, jax.random.key(0))
        assert obs.obs.shape == (1,) and obs.full.shape == (2,)
    for name in {"normalize_obs", "normalize_reward"} & set(names_of(script)):
        for value in (True, False):
            env = dataclasses.replace(config, **{name: value}).make_env()
            assert {"normalize_obs": env._observations, "normalize_reward": env._rewards}[
                name
            ] == value
    if "cell" in names_of(script):
        changed = dataclasses.replace(config, cell="ffm", cell_kwargs={"memory_size": 3})
        sizes = [x.shape for x in jax.tree.leaves(changed.make_memory().initialize_carry((2, 8)))]
        assert any(3 in size for size in sizes)


# --- Evaluations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluations_are_frozen_and_greedy(script):
    """They see through the statistics of training; no key decides about a greedy action."""
    module = module_of(script)
    config = tiny(module, num_eval_envs=3, env_kwargs={"normalize_obs": True})
    env, state = config.make_env(), state_of(script, config)

    def evaluated(greedy):
        arguments = {"greedy": greedy} if "eval_policy" in names_of(script) else {}

        def evaluate(policy_key, **fields):
            def looked_at(env, policy, initialize, key, num_envs, episodes):
                assert (num_envs, episodes) == (3, 5)
                obs, env_state = jax.vmap(env.reset)(jax.random.split(key, 3))
                action = jnp.zeros((3, *env.action_space.shape), env.action_space.dtype)
                before = jnp.ones(3, bool), action, jnp.zeros(3)
                _, action = policy(initialize(3), obs, *before, policy_key)
                step = jax.vmap(env.step)(jax.random.split(key, 3), env_state, action)
                return {"key": key, "obs": obs, "action": action, "next_obs": step[0]}

            seeds = jax.tree.map(lambda x: x[None], state.replace(**fields))
            return module.evaluate.__wrapped__(seeds, env, 5, play=looked_at, **arguments)

        return traced(evaluate, policy_key=jax.random.key(0), **fields_of(state))

    greedy = evaluated(True)
    assert greedy.reaches("key") == {"key"}
    # Evaluating disturbs no training, and repeats none of its random numbers.
    assert "random_fold_in" in [operation[0] for operation in greedy.operations("key")[0]]
    assert greedy.reaches("obs") == greedy.reaches("next_obs") - {"params"} == {"env_state", "key"}
    assert greedy.reaches("action") == {"params", "env_state", "key"}
    if "eval_policy" in names_of(script):
        assert "policy_key" in evaluated(False).reaches("action")


# --- Keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_key_is_used_twice(script):
    """Not within an update, nor by the next: steps, gradient steps, epochs have their own."""
    module = module_of(script)
    config = tiny(module)
    env, state = config.make_env(), state_of(script, config)

    def updates(state):
        return jax.lax.scan(lambda state, _: module.update(state, env), state, length=2)

    program = jax.make_jaxpr(updates)(state).jaxpr
    check_key_reuse_jaxpr(program)
    assert not list(copied_keys(program))
    check_key_reuse_jaxpr(traced_init(script, config).jaxpr)
    seeds = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), state)
    evaluate = functools.partial(module.evaluate.__wrapped__, env=env, episodes=4)
    check_key_reuse_jaxpr(jax.make_jaxpr(evaluate)(seeds).jaxpr)
    # What decides what.
    program = plain_update(script)
    assert "key" in program.reaches("env_state") & program.reaches("params")
    assert program.reaches("key") == {"key"}
    first = traced_init(script, config)
    assert first.reaches("params") == first.reaches("env_state") == {"key"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_minibatches_are_drawn_at_random(script, monkeypatch):
    """What was collected being given, a key still decides what is learned."""
    module, config = module_of(script), one_gradient_step(module_of(script), num_minibatches=2)
    env, state = config.make_env(), state_of(script, config)
    _, collected = jax.eval_shape(lambda state: module.rollout(state, env), state)

    def learn(collected, **fields):
        monkeypatch.setattr(module, "rollout", lambda state, env: (state, collected))
        return fields_of(module.update(state.replace(**fields), env)[0])

    program = traced(learn, collected=collected, **fields_of(state))
    assert "key" in program.reaches("params")
    assert "key" not in program.reaches("env_state")
