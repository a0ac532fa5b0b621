"""Programs without complex and random numbers, which converters to other formats lack.

`simplified` follows a traced function operation by operation. What depends on no input is computed
at once. A complex number becomes a `Pair` of real ones, and functions inside of functions are
written out, loops of a single turn, too.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

# Functions of whole numbers from 0 to below these, which draw random numbers: they become tables.
# A program has the names of functions under `jax.jit`.
TABLES = {"random_rows": 2**20}
CALLS = {  # operation: its parameter that holds the inner program
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


class Pair(NamedTuple):
    """Complex numbers, as two real arrays of one shape."""

    real: Any
    imag: Any


def simplified(function, *shapes):
    """A function that computes the same as `function`: of arrays, it returns a list of arrays.

    Args:
      shapes: of the arguments. Complex numbers may be used inside only.
    """
    closed = jax.make_jaxpr(function)(*shapes)
    # A greedy step draws nothing, but the scripts write the draw down.
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    return lambda *args: follow(jaxpr, closed.consts, args)


def follow(jaxpr, consts, args) -> list:
    """The results of a program, each an array or a `Pair`."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for eqn in jaxpr.eqns:
        results = apply(eqn, [read(x) for x in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def apply(eqn, inputs) -> list:
    """The results of one operation.

    Raises:
      NotImplementedError: it has no counterpart for pairs.
    """
    name = eqn.primitive.name
    shapes = [x.aval for x in eqn.outvars]
    is_known = not any(is_traced(x) for x in inputs)
    if eqn.params.get("name") in TABLES and not is_known:
        return [look_up(eqn, inputs)]
    if name in CALLS:
        inner = eqn.params[CALLS[name]]
        return follow(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    if is_known and all(is_fixed(x) for x in shapes):
        with jax.ensure_compile_time_eval():
            return bind(eqn, inputs)
    if name == "scan" and eqn.params["length"] == 1:
        return one_turn(eqn, inputs)
    if name == "optimization_barrier":
        return inputs
    if name in CUMULATIVE and shapes[0].shape[eqn.params["axis"]] == 1:
        return inputs
    if name == "gather" and np.ndim(inputs[1]) == 1 and not is_traced(inputs[1]):
        return [each(partial(single_slice, indices=inputs[1], **eqn.params), inputs[0])]
    if name == "pad" and not any(between for *_, between in eqn.params["padding_config"]):
        return [padded(*inputs, **eqn.params)]
    if name == "rem" and jnp.issubdtype(shapes[0].dtype, jnp.floating):
        return [remainder(*inputs)]
    if any(is_complex(x) for x in [*inputs, *shapes]):
        return [in_pairs(eqn, inputs)]
    return bind(eqn, inputs)


def bind(eqn, inputs) -> list:
    results = eqn.primitive.bind(*inputs, **eqn.params)
    return list(results) if eqn.primitive.multiple_results else [results]


def is_traced(x) -> bool:
    return isinstance(x, (jax.core.Tracer, Pair))


def is_fixed(shape) -> bool:
    return not any(jax.export.is_symbolic_dim(size) for size in getattr(shape, "shape", ()))


def one_turn(eqn, inputs) -> list:
    """The results of a loop with one turn."""
    body = eqn.params["jaxpr"]
    inner = getattr(body, "jaxpr", body)

    def is_row(outside, inside):  # what the loop carries is the same inside and outside
        return len(outside.aval.shape) > len(inside.aval.shape)

    rows = map(is_row, eqn.invars, inner.invars)
    inputs = [each(lambda x: x[0], x) if row else x for x, row in zip(inputs, rows, strict=True)]
    results = follow(inner, getattr(body, "consts", ()), inputs)
    rows = map(is_row, eqn.outvars, inner.outvars)
    return [each(lambda x: x[None], x) if row else x for x, row in zip(results, rows, strict=True)]


def single_slice(x, indices, *, dimension_numbers, slice_sizes, **_):
    """A gather that takes one slice, at known indices."""
    starts = [0] * x.ndim
    for axis, index in zip(dimension_numbers.start_index_map, np.asarray(indices), strict=True):
        starts[axis] = int(np.clip(index, 0, x.shape[axis] - slice_sizes[axis]))
    ends = [start + size for start, size in zip(starts, slice_sizes, strict=True)]
    return jax.lax.squeeze(jax.lax.slice(x, starts, ends), dimension_numbers.collapsed_slice_dims)


def padded(x, value, *, padding_config):
    """A pad without interior padding, by concatenating."""
    for axis, (low, high, _) in enumerate(padding_config):
        start, end = max(-low, 0), x.shape[axis] - max(-high, 0)
        if (low, high) != (0, 0):
            parts = [jax.lax.slice_in_dim(x, start, end, axis=axis)]
            for i, size in ((0, low), (len(parts), high)):
                if size > 0:
                    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
                    parts.insert(i and len(parts), jnp.broadcast_to(value, shape))
            x = jnp.concatenate(parts, axis=axis)
    return x


def remainder(x, y):
    return x - y * jnp.trunc(x / y)


def look_up(eqn, inputs):
    """What a function in `TABLES` returns, of an array whose only long axis is the batch."""
    program = jaxpr_as_fun(eqn.params["jaxpr"])
    (taken,) = (x.aval for x in eqn.invars)
    size = TABLES[eqn.params["name"]]
    shape = [size if jax.export.is_symbolic_dim(length) else length for length in taken.shape]
    with jax.ensure_compile_time_eval():
        exported = jax.export.export(jax.jit(program))(taken)
        (table,) = exported.call(np.arange(size, dtype=taken.dtype).reshape(shape))
        table = np.asarray(table).ravel()
    narrow = np.min_scalar_type(table.max())
    (steps,) = inputs
    rows = jnp.asarray(table.astype(narrow))[steps.astype(jnp.int32)]
    return rows.astype(eqn.outvars[0].aval.dtype)


# --- Complex numbers -----------------------------------------------------------------------------


def is_complex(x) -> bool:
    return isinstance(x, Pair) or jnp.issubdtype(getattr(x, "dtype", type(x)), jnp.complexfloating)


def as_pair(x) -> Pair:
    if isinstance(x, Pair):
        return x
    constant = np.asarray(x)
    return Pair(constant.real.copy(), constant.imag.copy())


def each(function, *xs):
    """The function of the arrays; if some are complex, of real and of imaginary parts."""
    if not any(is_complex(x) for x in xs):
        return function(*xs)

    def part(name):
        return function(*(getattr(as_pair(x), name) if is_complex(x) else x for x in xs))

    return Pair(part("real"), part("imag"))


def multiply(x, y) -> Pair:
    return Pair(x.real * y.real - x.imag * y.imag, x.real * y.imag + x.imag * y.real)


def exponential(x) -> Pair:
    size = jnp.exp(x.real)
    return Pair(size * jnp.cos(x.imag), size * jnp.sin(x.imag))


# Operations that do the same with real and with imaginary parts.
BY_PARTS = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "copy",
    "dynamic_slice",
    "gather",
    "neg",
    "reduce_sum",
    "reshape",
    "select_n",
    "slice",
    "squeeze",
    "sub",
    "transpose",
}
RULES = {
    "complex": Pair,
    "conj": lambda x: Pair(x.real, -x.imag),
    "exp": exponential,
    "imag": lambda x: x.imag,
    "mul": multiply,
    "real": lambda x: x.real,
}


def in_pairs(eqn, inputs):
    """The result of an operation that reads or returns complex numbers."""
    name = eqn.primitive.name
    if name in BY_PARTS:
        return each(partial(eqn.primitive.bind, **eqn.params), *inputs)
    if name == "convert_element_type" and not is_complex(inputs[0]):
        real = inputs[0].astype(jnp.float32)
        return Pair(real, jnp.zeros_like(real))
    if name not in RULES:
        raise NotImplementedError(f"there is no rule for {name} of complex numbers")
    return RULES[name](*(as_pair(x) if is_complex(x) else x for x in inputs))
