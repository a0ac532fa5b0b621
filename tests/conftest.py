"""The process of the tests: quick compilation, a cache of programs, the tasks of helpers.py."""

import gc
import os
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
# In the environment: the scripts that the tests start read it, too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Most programs run for a moment here: unoptimised machine code is ready in half the time.
# With XLA_FLAGS set, to nothing for instance, they are compiled as users have them.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from helpers import TASKS  # noqa: E402

from envs import NAMESPACES  # noqa: E402
from fast import use_fast_random  # noqa: E402
from harness import devices  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 4)
jax.devices()  # `launch` would make another number of them
devices.cores_of_all = lambda: 1  # one device is used unless a test asks for more
use_fast_random()  # as `launch` does for users
# `make("test::Constant")` and so on, through the same door as every library.
NAMESPACES["test"] = (lambda: list(TASKS), lambda env_id, **options: TASKS[env_id](**options))


@pytest.fixture(autouse=True)
def room_for_programs():
    """Compiled programs map memory, at most 65,530 pieces of it; past that XLA crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
