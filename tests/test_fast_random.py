"""Random numbers are those of Threefry-2x32, and JAX's own, and no loop draws them on a CPU."""

import os
import subprocess
import sys

import fast_random  # noqa: F401 - the module under test
import jax
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p


@pytest.mark.parametrize(
    ("key", "counter", "bits"),
    [  # the known answers of Random123, the authors' library
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, bits):
    words = [np.array([word], np.uint32) for word in (*key, *counter)]
    assert tuple(int(x[0]) for x in jax.jit(threefry2x32_p.bind)(*words)) == bits


DRAWS = """
import hashlib, jax, jax.numpy as jnp
keys = jax.random.split(jax.random.key(7), 5)
draws = [jax.random.key_data(keys), jax.random.normal(keys[0], (3, 5)), jax.random.bits(keys[1], (0, 2)),
         jax.vmap(lambda k: jax.random.permutation(k, 9))(keys), jax.random.uniform(jax.random.fold_in(keys[2], 3)),
         jax.jit(jax.vmap(lambda k: jax.random.categorical(k, jnp.arange(4.0))))(keys)]
print(hashlib.sha256(b"".join(jax.device_get(x).tobytes() for x in draws)).hexdigest())
"""


def test_draws_are_those_of_jax_alone():
    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert run(DRAWS) == run("import fast_random\n" + DRAWS) != ""


# Without the barrier of `threefry_2x32` this compiles for more than a minute.
NO_LOOP = """
import fast_random, jax
draw = jax.vmap(lambda key: jax.random.uniform(key, (4,)))
many = jax.jit(lambda key: draw(jax.random.split(jax.random.split(key)[1], 64))).lower(jax.random.key(0)).compile()
assert " while(" not in many.as_text()
"""


def test_no_loop_and_no_long_compilation():
    cpu_without_cache = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([sys.executable, "-c", NO_LOOP], check=True, timeout=100, env=cpu_without_cache)
