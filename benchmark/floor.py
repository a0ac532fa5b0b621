"""The time that the matrix products of an update take alone, as far as it can be measured.

`throughput.py` prints and records it for our own systems.

Every product in the traced update is counted, with its shapes, as often as loops repeat it. Then
each kind is timed on this machine, in a loop of nothing else. The sum is the floor. A program that
is at half of its floor's speed spends half of its time on something other than products: the
environment, activations, the optimizer, memory traffic, waiting.

The floor is an estimate, and no bound. The loop also passes over the left operand once per product,
to make each depend on the one before, and it repeats a product with operands that are still in the
caches. Where products are small, a compiler can put several together that are timed apart.
"""

import collections
import functools
import math
import time

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr


def products_of(jaxpr: Jaxpr, times: int = 1) -> collections.Counter:
    """(shape, shape, dimension numbers) of all products in a program, and how often they run.

    Raises:
      ValueError: a product is in a loop of unknown length.
    """
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [products_of(program, times) for program in programs_in(equation.params)]
        if name == "dot_general":
            left, right = (operand.aval.shape for operand in equation.invars)
            counts[left, right, equation.params["dimension_numbers"]] += times
        elif name == "scan":
            for product, number in inner[0].items():
                counts[product] += number * equation.params["length"]
        elif name == "cond":  # one branch runs: count the one with most products
            counts += max(inner, key=flops_of)
        elif name == "while" and any(inner):
            raise ValueError("a product in a loop of unknown length cannot be counted")
        else:
            counts += sum(inner, collections.Counter())
    return counts


def programs_in(params: dict) -> list[Jaxpr]:
    """The programs among the parameters of an equation."""
    found = []
    for value in params.values():
        for program in value if isinstance(value, tuple | list) else (value,):
            if isinstance(program, ClosedJaxpr):
                program = program.jaxpr
            if isinstance(program, Jaxpr):
                found.append(program)
    return found


def flops_of(products: collections.Counter) -> int:
    """Multiplications and additions of products."""
    return sum(times * flops_of_one(*kind) for kind, times in products.items())


def flops_of_one(left, right, dimensions) -> int:
    (_, contracted), (_, batch) = dimensions
    kept = [size for axis, size in enumerate(right) if axis not in (*contracted, *batch)]
    return 2 * math.prod(left) * math.prod(kept)


def bytes_of_one(left, right, dimensions) -> int:
    """Bytes of float32 that a product reads and writes."""
    (contracted, _), _ = dimensions
    multiplied = flops_of_one(left, right, dimensions) // 2
    written = multiplied // math.prod(left[axis] for axis in contracted)
    return 4 * (math.prod(left) + math.prod(right) + written)


@functools.cache
def seconds_of(left, right, dimensions, budget: float = 0.2) -> float:
    """The time of one product: the least mean of five loops of about `budget` / 5 seconds each."""

    @functools.partial(jax.jit, static_argnames="repeats")
    def loop(a, b, repeats):
        def body(_, carry):
            a, total = carry
            out = jax.lax.dot_general(a, b, dimensions)
            # The next product depends on this one, so that none is left out.
            return a + 0.0 * out.reshape(-1)[0], total + out.reshape(-1)[-1]

        return jax.lax.fori_loop(0, repeats, body, (a, jnp.float32(0.0)))[1]

    a = jnp.full(left, 0.01, jnp.float32)
    b = jnp.full(right, 0.01, jnp.float32)

    def timed(repeats):
        jax.block_until_ready(loop(a, b, repeats))
        start = time.perf_counter()
        jax.block_until_ready(loop(a, b, repeats))
        return (time.perf_counter() - start) / repeats

    repeats = max(3, int(budget / 5 / max(timed(3), 1e-7)))
    return min(timed(repeats) for _ in range(5))


def floor_of(update, state, env) -> dict:
    """What the products of one update take, from a state with a leading seed axis.

    Returns:
      gflop and megabytes of an update, its seconds, and the rate in GFLOP per second.
    """
    from experiment import vmap_seeds

    traced = jax.make_jaxpr(vmap_seeds(functools.partial(update, env=env)))(state)
    products = products_of(traced.jaxpr)
    flops = flops_of(products)
    seconds = sum(times * seconds_of(*kind) for kind, times in products.items())
    moved = sum(times * bytes_of_one(*kind) for kind, times in products.items())
    return {
        "gflop": flops / 1e9,
        "megabytes": moved / 1e6,
        "seconds": seconds,
        "gflop_per_second": flops / 1e9 / seconds,
    }
