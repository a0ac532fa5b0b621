"""What the six scripts with replay keep, and what they make of it when they sample it."""

import functools
import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import REPLAY, is_continuous, one_seed, replayed_steps, start, tiny

from experiment import run_updates
from harness.errors import UsageError

NORMALIZED = {"normalize_obs": True, "normalize_reward": True}
RECURRENT = [script for script in REPLAY if script in ("drqn", "rsac", "rsacd")]


def loss_name(script):
    return {"q": "td_loss", "c": "sac_loss", "d": "sacd_loss"}["q" if "q" in script else script[-1]]


@pytest.mark.parametrize("script", REPLAY)
def test_replay_keeps_raw_values_and_scales_them_when_sampled(script, monkeypatch):
    """Every step of the task pays 1 and shows 1, whenever it was collected."""
    module = importlib.import_module(f"algorithms.{script}")

    def loss(params, target_params, network, *rest):
        (sample,) = [x for x in rest if hasattr(x, "_fields")]
        batch = getattr(sample, "batch", sample)
        obs = batch.inputs.obs if hasattr(batch, "inputs") else batch.obs
        seen = {"test/reward": batch.reward.mean(), "test/obs": obs.mean()}
        return 0.0 * sum(x.sum() for x in jax.tree.leaves(params)), seen | extra(sample)

    def extra(sample):
        return {"error": jnp.zeros((4, 4))} if script == "drqn" else {}

    monkeypatch.setattr(module, loss_name(script), loss)
    options = NORMALIZED | {"continuous": is_continuous(module), "episode_length": 5}
    cell = {"cell": "none"} if script in RECURRENT else {}
    config = tiny(module, env="test::Constant", env_kwargs=options, gradient_steps=1, **cell)
    env, state = start(config, module)
    update = jax.jit(functools.partial(module.update, env=env))
    state = one_seed(state)
    for _ in range(8):
        state, metrics = update(state)
    steps = replayed_steps(state.buffer)
    obs = steps.inputs.obs if hasattr(steps, "inputs") else steps.obs
    written = np.asarray(steps.reward) != 0
    assert written.sum() == 8 * config.steps_per_update
    assert (np.asarray(steps.reward)[written] == 1.0).all()
    assert (np.asarray(obs)[written] == 1.0).all()

    statistics = jax.tree.map(lambda x: x[0], state.env_state.statistics)
    scaled = 1.0 / np.sqrt(statistics.returns.var + 1e-8)
    np.testing.assert_allclose(metrics["test/reward"], np.clip(scaled, -10, 10), rtol=1e-5)
    shown = (1.0 - statistics.obs.mean) / np.sqrt(statistics.obs.var + 1e-8)
    np.testing.assert_allclose(metrics["test/obs"], shown[0], atol=1e-5)
    # The statistics have moved since the first steps: what was scaled then would differ.
    assert abs(scaled - 10.0) > 1.0


@pytest.mark.parametrize("script", REPLAY)
def test_training_with_an_unfilled_buffer_is_refused(script):
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module)
    state = SimpleNamespace(config=config, updates=jnp.zeros(1, jnp.int32))
    with pytest.raises(UsageError, match="call warmup before train"):
        run_updates(module.update, state, config.make_env(), 1)


@pytest.mark.parametrize("script", RECURRENT)
def test_a_minibatch_without_steps_has_loss_0(script):
    """Rows may all be final: a sequence of one step that follows the end of an episode."""
    module = importlib.import_module(f"algorithms.{script}")
    config = tiny(module, cell="none")
    env, state = start(config, module)
    state = one_seed(state)
    network = module.make_network(config, env)
    sample = jax.eval_shape(
        lambda: module.make_replay(config).sample(state.buffer, jax.random.key(0))
    )
    sample = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sample)
    sample = sample._replace(batch=sample.batch._replace(final=sample.batch.final | True))
    sample = sample._replace(weight=jnp.ones_like(sample.weight))

    def loss(params):
        if script == "drqn":
            return module.td_loss(params, params, network, config, sample)
        key = (jax.random.key(0),) if script == "rsac" else ()
        function = getattr(module, loss_name(script))
        return function(params, params, network, sample, *key)

    (value, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(state.params)
    assert value == 0.0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((parts, gradients)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))
