"""Run directories, saved models, and what the user is told when something is wrong with them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import ppo, rppo
from experiment import UsageError, create_run_dir, load_config, load_model, save_model, seed_keys, vmap_seeds
from memory_cells import CELLS

CONFIG = ppo.Config(
    env="test::Counting", total_steps=64, num_envs=4, num_steps=8, hidden_size=8, env_kwargs={"terminal_every": 5}
)


def state_of(config, init=ppo.init):
    return init(config, seed_keys(config))


def test_a_run_directory_holds_the_config(tmp_path):
    config = replace(CONFIG, run_dir=str(tmp_path / "a" / "run"), log=("file",))
    path = create_run_dir(config, "algorithms/ppo.py")
    assert load_config(str(path), ppo.Config, "algorithms/ppo.py") == config


def test_a_run_without_a_name_gets_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = create_run_dir(CONFIG, "algorithms/ppo.py")
    assert path.parent.name == "runs" and path.name.startswith("test-Counting__ppo__seed0__")
    names = {create_run_dir(CONFIG, "algorithms/ppo.py") for _ in range(5)}  # started in the same second
    assert len(names | {path}) == 6


def test_unusable_run_directories(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "exists"), (tmp_path / "file" / "run", "cannot be written: Not a directory")):
        with pytest.raises(UsageError, match=message):
            create_run_dir(replace(CONFIG, run_dir=str(path)), "algorithms/ppo.py")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "read-only").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="cannot be written: Permission denied"):
            create_run_dir(replace(CONFIG, run_dir=str(tmp_path / "read-only" / "run")), "algorithms/ppo.py")


def test_configs_that_do_not_fit(tmp_path):
    run_dir = tmp_path / "run"
    create_run_dir(replace(CONFIG, run_dir=str(run_dir)), "algorithms/ppo.py")
    with pytest.raises(UsageError, match=r"is a run of ppo.py, not of rppo.py"):
        load_config(str(run_dir), ppo.Config, "algorithms/rppo.py")
    with pytest.raises(UsageError, match="no run in 'nowhere': .*No such file"):
        load_config("nowhere", ppo.Config, "algorithms/ppo.py")
    saved = json.loads((run_dir / "config.json").read_text())
    saved["config"]["old_option"] = 1
    (run_dir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="another version of ppo.py: its config differs in old_option"):
        load_config(str(run_dir), ppo.Config, "algorithms/ppo.py")
    saved["config"].pop("old_option")
    saved["config"]["env"] = "gymnax::Pendulum-v1"
    (run_dir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="is not valid here: gymnax::Pendulum-v1 has no option"):
        load_config(str(run_dir), ppo.Config, "algorithms/ppo.py")
    (run_dir / "config.json").write_text("{")
    with pytest.raises(UsageError, match="config.json is damaged"):
        load_config(str(run_dir), ppo.Config, "algorithms/ppo.py")


def test_a_saved_model_comes_back_exactly(tmp_path):
    state = state_of(CONFIG)
    save_model(tmp_path, state)
    loaded = load_model(tmp_path, jax.eval_shape(lambda: state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, loaded, state)
    assert all(jax.tree.leaves(same))
    jax.random.split(loaded.key[0])  # the key is a typed key again


@pytest.mark.parametrize(("cell", "options"), [*((cell, {}) for cell in CELLS), ("slstm", {"conv_width": 0})])
def test_every_memory_can_be_saved(cell, options, tmp_path):
    config = rppo.Config(env="test::Counting", cell=cell, cell_kwargs=options, hidden_size=8)
    state = state_of(config, rppo.init)
    save_model(tmp_path, state)
    loaded = load_model(tmp_path, jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, (loaded.params, loaded.carry), (state.params, state.carry))


def test_a_model_loads_on_another_device(tmp_path):
    """Saved where there are two CPU devices, from the second one; loaded where there is one."""
    code = (
        "import jax; from algorithms import ppo; from experiment import save_model, seed_keys\n"
        "config = ppo.Config(num_envs=4, hidden_size=8)\n"
        "state = jax.device_put(ppo.init(config, seed_keys(config)), jax.devices()[1])\n"
        f"save_model({str(tmp_path)!r}, state)\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    config = ppo.Config(num_envs=4, hidden_size=8)
    state = state_of(config)
    loaded = load_model(tmp_path, jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, state.params)


def test_models_that_do_not_fit(tmp_path):
    shapes = jax.eval_shape(lambda: state_of(CONFIG))
    with pytest.raises(UsageError, match="no model in .*: the run has not finished"):
        load_model(tmp_path, shapes)
    save_model(tmp_path, state_of(CONFIG))
    with pytest.raises(UsageError, match="the model in .* is damaged or of another version"):
        load_model(tmp_path, jax.eval_shape(lambda: state_of(replace(CONFIG, hidden_size=16))))
    for part in (tmp_path / "model").rglob("*"):
        if part.is_file() and part.parent.name == "d":
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(UsageError, match="the model in .* is damaged or of another version"):
        load_model(tmp_path, shapes)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="the model in .* is damaged or of another version"):
        load_model(tmp_path, shapes)


def test_seeds_have_the_keys_of_their_own_runs():
    several, single = seed_keys(replace(CONFIG, seed=3, num_seeds=4)), seed_keys(replace(CONFIG, seed=5))
    assert several.shape == (4,) and single[0] == several[2] == jax.random.key(5)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_vmap_seeds_is_vmap(num_seeds):
    keys = jax.random.split(jax.random.key(0), num_seeds)
    tree = {"a": jnp.arange(2.0 * num_seeds).reshape(num_seeds, 2), "key": keys}
    function = lambda tree: (tree["a"].sum(), jax.random.normal(tree["key"]), 1.0)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, vmap_seeds(function)(tree), jax.vmap(function)(tree))
