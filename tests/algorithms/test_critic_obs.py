"""--critic-obs full: the critic reads what masks and wrappers hide, and the actor never does."""

import dataclasses
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, one_seed, start, tiny
from jax.interpreters.partial_eval import dce_jaxpr

from algorithms import rppo, rppo_continuous, rsac, rsacd
from envs import AsymmetricObs, make
from loggers import Logger

SCRIPTS = [rppo, rppo_continuous, rsac, rsacd]
ON_POLICY = [rppo, rppo_continuous]
NORMALIZED = {"terminal_every": 5, "normalize_obs": True, "normalize_reward": True}


def full(script, **changes):
    """The config of a small run in which the actor does not see the time."""
    return tiny(script, **{"mask": ("1",), "critic_obs": "full"} | changes)


def named(scripts):
    return [pytest.param(script, id=script.__name__.rpartition(".")[2]) for script in scripts]


def step_of(script, config, network, params, carry, obs):
    """The actor's and the critic's outputs of one step, and their memories after it."""
    action = jnp.zeros((len(obs.full), *config.make_env().action_space.shape))
    inputs = script.Inputs(obs, action.astype(int) if script in (rppo, rsacd) else action, action)
    inputs = inputs._replace(reward=jnp.zeros(len(obs.full)))
    method = {"method": "step"} if script in ON_POLICY else {}
    (actor, critic), *outputs = network.apply(params, carry, inputs, inputs.reward > 1, **method)
    return (actor, *outputs[:-1]), (critic, outputs[-1])


# --- Who sees what -------------------------------------------------------------------------------


@pytest.mark.parametrize("script", named(SCRIPTS))
def test_the_actor_does_not_depend_on_what_the_critic_sees(script, rng):
    """Neither its outputs nor its memory, so no gradient either; the critic depends on it."""
    config = full(script)
    env, state = start(config, script)
    network = script.make_network(config, env)
    params, carry = one_seed(state).params, network.initialize_carry(4)
    seen, other = (jnp.asarray(rng.normal(size=(4, size)), jnp.float32) for size in (1, 2))

    @jax.jit
    def outputs(other):
        return step_of(script, config, network, params, carry, AsymmetricObs(seen, other))

    actor, critic = outputs(other)
    same, changed = outputs(other + 1)
    if script is rsac:  # the last output values the action, which is the actor's
        assert not (critic[1] == changed[1]).any()
    jax.tree.map(np.testing.assert_array_equal, same, actor)
    for a, b in zip(jax.tree.leaves(critic), jax.tree.leaves(changed), strict=True):
        assert (a != b).any()
    program = jax.make_jaxpr(lambda other: outputs(other)[0])(other).jaxpr
    assert dce_jaxpr(program, [True] * len(program.outvars))[1] == [False]  # it is not even read
    inputs = one_seed(state).inputs._replace(obs=seen)
    act = jax.jit(partial(network.apply, method="act"))
    alone, *policy = act(params, carry[:1], inputs, jnp.zeros(4, bool))
    expected = ((actor[0],), *actor[1:])
    assert_close((alone, *policy), expected, rtol=1e-5, atol=1e-6)


class Shifted:
    """An environment that adds 1 to a part of the true next observation."""

    def __init__(self, env, part):
        self.env = env
        self.part = part

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, *args):
        *result, info = self.env.step(*args)
        final = info["final_obs"]
        shifted = final._replace(**{self.part: getattr(final, self.part) + 1.0})
        return *result, info | {"final_obs": shifted}


@pytest.mark.parametrize("script", named(ON_POLICY))
def test_advantages_bootstrap_from_what_the_critic_sees_next(script):
    config = full(script, env_kwargs={"terminal_every": 3})
    env, state = start(config, script)
    state = one_seed(state)

    def values(env):
        batch = jax.jit(lambda: script.rollout(state, env)[1])()
        assert batch.done.sum() > 3
        return batch.value, batch.next_value

    value, next_value = values(env)
    np.testing.assert_array_equal(values(Shifted(env, "obs")), (value, next_value))
    value_now, shifted = values(Shifted(env, "full"))
    np.testing.assert_array_equal(value_now, value)
    assert (shifted != next_value).all()


@pytest.mark.parametrize("script", named([rsac, rsacd]))
def test_targets_are_of_what_the_critic_sees_next(script):
    """The last observations of episodes are replayed in both parts, and Q' reads its own."""
    config = full(script, env_kwargs={"terminal_every": 3}, cell="none", burn_in=0)
    env, state = start(config, script)
    state = one_seed(script.warmup(state, env, Logger()))
    network = script.make_network(config, env)
    batch = script.make_replay(config).sample(state.buffer, jax.random.key(3)).batch
    assert batch.inputs.obs.full.shape[-1] == 2 and batch.inputs.obs.obs.shape[-1] == 1
    ends = batch.final & (batch.inputs.obs.full[..., 1] == 1.0)
    assert ends.any()  # the time of the last observation, which no auto-reset has replaced
    sample = script.make_replay(config).sample(state.buffer, jax.random.key(3))
    key = (jax.random.key(0),) if script is rsac else ()
    loss = script.sac_loss if script is rsac else script.sacd_loss

    @jax.jit
    def td_loss(shift):
        seen = batch.inputs.obs
        changed = jnp.where(batch.final[..., None], seen.full + shift, seen.full)
        inputs = batch.inputs._replace(obs=seen._replace(full=changed))
        changed = sample._replace(batch=batch._replace(inputs=inputs))
        parts = loss(state.params, state.target_params, network, changed, *key)[1]
        return parts["losses/td_loss"], parts["losses/entropy"]

    (before, entropy), (after, entropy_after) = td_loss(0.0), td_loss(1.0)
    assert before != after and entropy == entropy_after


# --- Evaluating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", named(SCRIPTS))
def test_evaluations_do_without_it(script):
    """The policy reads the actor's part with the actor's memory, as in the plain environment."""
    config = full(script, env_kwargs=NORMALIZED, eval_policy="sample")
    env, state = start(config, script)
    found = {}

    def keep(env, policy, initialize, key, *_):
        found["env"], found["memory"] = env, initialize(3)
        obs, _ = jax.vmap(env.reset)(jax.random.split(key, 3))
        assert obs.shape == (3, 1)
        return ()

    script.evaluate.__wrapped__(state, env, 1, play=keep)
    assert len(found["memory"]) == 1
    options = {"normalize_obs": True, "normalize_reward": True, "terminal_every": 5}
    options |= {"rescale_actions": True} if script is rppo_continuous else {}
    plain = make(config.env, mask=("1",), **options)
    expected = script.evaluate(state, env, 5, greedy=False)
    actual = script.evaluate(state, plain, 5, greedy=False)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# --- What it cannot do ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", named(SCRIPTS))
def test_it_is_refused_where_it_does_nothing_or_cannot_work(script):
    with pytest.raises(ValueError, match="critic_obs full does nothing: nothing of test::"):
        full(script, mask=())
    with pytest.raises(ValueError, match="critic_obs full needs two torsos"):
        full(script, shared_torso=True)
    for options in ({"delay": 1}, {"flicker": 0.1}, {"noise": 0.1}, {"mask_probability": 0.1}):
        full(script, mask=(), env_kwargs=options)
    full(script, mask=(), evaluate="runs/a")  # with --env-kwargs noise 0, for example


def test_only_these_scripts_have_it():
    """Those with a critic beside the actor, and with memory."""
    for name in ("ppo", "ppo_continuous", "sac", "sacd", "dqn", "drqn", "pqn", "rpqn"):
        config = importlib.import_module(f"algorithms.{name}").Config
        assert "critic_obs" not in {field.name for field in dataclasses.fields(config)}
