"""The memory that a run will take, against arrays that were made and against the machine."""

from functools import partial

import jax
import numpy as np
import psutil
import pytest
from helpers import tiny

from algorithms import drqn, ppo
from experiment import seed_keys, shapes
from harness import sizes
from harness.errors import UsageError
from harness.sizes import check_memory, free_memory, num_bytes


def test_the_free_memory_is_that_of_the_machine():
    if jax.default_backend() == "cpu":
        available = psutil.virtual_memory().available
        assert 0.5 * available < free_memory() < 2 * available


def test_sizes_are_those_of_what_is_made():
    config = tiny(ppo)
    state = ppo.init(config, seed_keys(config))
    assert num_bytes(check_memory(config, partial(shapes, config, ppo.init))) == num_bytes(state)
    assert num_bytes({"x": np.zeros((3, 4), np.float32), "y": np.uint8(1)}) == 49


@pytest.mark.parametrize("script", [ppo, drqn])
def test_a_run_is_refused_where_memory_for_its_state_is_missing(script, monkeypatch):
    """Rollouts, minibatches and evaluations take more than the state, but less than ten times."""
    config = tiny(script, hidden_size=64)
    needed = num_bytes(check_memory(config, partial(shapes, config, script.init)))
    monkeypatch.setattr(sizes, "free_memory", lambda _: needed - 1)
    with pytest.raises(UsageError, match="the run at least 0.0 GiB; there are 0.0 GiB"):
        check_memory(config, partial(shapes, config, script.init))
    monkeypatch.setattr(sizes, "free_memory", lambda _: 10 * needed)
    check_memory(config, partial(shapes, config, script.init))
