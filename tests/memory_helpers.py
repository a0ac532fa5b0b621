"""What the tests of memories share: cells with perturbed parameters, compiled calls, references."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memory_cells import make_cell

ORACLES = Path(__file__).parent / "oracles"

T = 40  # steps
B = 3  # environments
D = 8  # inputs
H = 8  # outputs


# --- Compiled calls -------------------------------------------------------------------------------


# Compiled, because operation by operation it would compile for longer.
@partial(jax.jit, static_argnums=0, static_argnames="method")
def init(module, key, *args, method="__call__"):
    return module.init(key, *args, method=method)


@partial(jax.jit, static_argnums=0)
def sequence(cell, params, carry, xs, starts):
    return cell.apply(params, carry, xs, starts, method="sequence")


def initial_carry(cell, xs):
    """The initial carry for inputs (T, B, D), in their precision."""
    carry = cell.initialize_carry(jax.random.key(0), xs.shape[1:])
    cast = lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, xs.dtype))  # noqa: E731
    return jax.tree.map(cast, carry)


def run(cell, params, xs, starts=None):
    """A sequence (T, B, D) from the initial carry: the last carry and outputs."""
    starts = jnp.zeros(xs.shape[:2], bool) if starts is None else starts
    carry = initial_carry(cell, xs)
    return sequence(cell, params, carry, xs, starts)


def time_major(x):
    """(B, T, ...) -> (T, B, ...), and back."""
    return jnp.asarray(x).swapaxes(0, 1)


def run_oracle(cell, params, x):
    """Outputs (B, T, H) for the batch-major inputs (B, T, D) of another library."""
    _, ys = run(cell, {"params": params}, time_major(x))
    return time_major(ys)


# --- Cells with parameters and inputs -------------------------------------------------------------


def build(name):
    """A small cell by name, for instance "gru", "gru x2" for a stack of two, "gru x1 learned"."""
    kind, _, rest = name.partition(" x")
    layers, _, learned = rest.partition(" ")
    options = {"learned_carry": True} if learned else {}
    return make_cell(kind, H, int(layers or 1), **options)


@cache
def setup(name, seed=0, dtype="float32"):
    """A cell, perturbed parameters, a used carry, inputs and starts.

    Without the perturbation, weights of zero would hide errors.
    """
    cell = build(name)
    rng = np.random.default_rng(seed)
    xs = jnp.asarray(rng.normal(size=(T, B, D)), dtype)
    starts = rng.random((T, B)) < 0.08
    starts[0, 0] = starts[-1, 1] = starts[5, 2] = True
    starts = jnp.asarray(starts)
    carry = initial_carry(cell, xs)
    params = init(cell, jax.random.key(seed), carry, xs[:2], starts[:2], method="sequence")
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), dtype), params)
    warm = jnp.asarray(rng.normal(size=(9, B, D)), dtype)
    carry, _ = sequence(cell, params, carry, warm, jnp.zeros((9, B), bool))
    return cell, params, carry, xs, starts


# Attention memories of two blocks that each see 5 steps back.
WINDOWED = {
    "gtrxl": partial(make_cell, "gtrxl", H, num_heads=2, memory_length=5),
    "gpt2": partial(make_cell, "gpt2", H, num_heads=2, context_length=6),
    "gpt2 learned": partial(
        make_cell,
        "gpt2",
        H,
        num_heads=2,
        context_length=6,
        positions="learned",
        num_positions=20,
    ),
}


@cache
def setup_windowed(name, dtype="float32"):
    """A cell of `WINDOWED`, perturbed parameters, the initial carry, 70 inputs (B, 6) and starts.

    70 steps are more than two chunks of the window, and some episodes are long.
    """
    cell = WINDOWED[name]()
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.normal(size=(70, B, 6)), dtype)
    starts = np.zeros((70, B), bool)
    starts[[0, 3, 4, 40, 69], [0, 1, 1, 2, 0]] = True
    carry = initial_carry(cell, xs)
    params = init(cell, jax.random.key(0), carry, xs[0])
    params = jax.tree.map(lambda p: jnp.asarray(p + 0.3 * rng.normal(size=p.shape), dtype), params)
    return cell, params, carry, xs, jnp.asarray(starts)


def initialised(name, seed=0, **options):
    """A cell of 8 features, fresh parameters, the initial carry of 2 environments, 12 inputs."""
    cell = make_cell(name, 8, **options)
    xs = jax.random.normal(jax.random.key(seed + 1), (12, 2, 8))
    carry = initial_carry(cell, xs)
    return cell, init(cell, jax.random.key(seed), carry, xs[0]), carry, xs


def fresh_parameters(cell, inputs, seed=0):
    """The parameters of a fresh cell, without the collection around them."""
    carry = cell.initialize_carry(jax.random.key(0), (1, inputs))
    return init(cell, jax.random.key(seed), carry, jnp.zeros((1, inputs)))["params"]


def perturbed(cell, inputs, seed=0, scale=0.3):
    """Parameters in float64, away from their initial values; inputs and starts."""
    rng = np.random.default_rng(seed)
    xs = rng.normal(size=(T, B, inputs))
    starts = rng.random((T, B)) < 0.1
    params = fresh_parameters(cell, inputs, seed)
    perturb = lambda p: np.asarray(p + scale * rng.normal(size=p.shape), np.float64)  # noqa: E731
    return jax.tree.map(perturb, params), xs, starts


def run_float64(cell, params, xs, starts):
    """Outputs in float64, from the initial carry."""
    with jax.enable_x64(True):
        params = {"params": jax.tree.map(jnp.asarray, params)}
        _, ys = run(cell, params, jnp.asarray(xs), jnp.asarray(starts))
        return np.asarray(ys)


# --- Comparisons and references in numpy ----------------------------------------------------------


def assert_close(actual, expected, tolerance=1e-5):
    """Every leaf is as close as `tolerance`, relative to 1 + |expected|."""

    def compare(a, e):
        np.testing.assert_array_less(np.abs(a - e), tolerance * (1 + np.abs(e)) + 1e-30)

    jax.tree.map(compare, actual, expected)


def recur(decay, inputs, starts):
    """All h_t = decay_t h_(t-1) + inputs_t, with h = 0 before a start."""
    h = np.zeros_like(inputs[0])
    hs = []
    for a, b, start in zip(np.broadcast_to(decay, inputs.shape), inputs, starts, strict=True):
        h = a * np.where(start.reshape(-1, *[1] * (h.ndim - 1)), 0, h) + b
        hs.append(h)
    return np.stack(hs)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def layer_norm(params, x, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return x * params["scale"] + params["bias"]


def rms_norm(params, x, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * params["scale"]


def unit(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)


def dense(params, x):
    return x @ params["kernel"] + params.get("bias", 0.0)


def short_conv(params, xs, starts):
    """Filters over the last steps of the same episode, one per channel; the last is for now."""
    ys = np.zeros_like(xs)
    for t, b in np.ndindex(*starts.shape):
        for age, weights in enumerate(params["kernel"][::-1]):
            if t - age >= 0:
                ys[t, b] += weights * xs[t - age, b]
            if starts[t - age, b]:
                break
    return ys + params.get("bias", 0.0)


def split_heads(x, num_heads):
    return np.stack(np.split(x, num_heads, axis=-1), axis=-2)


def delta_inputs(params, xs, starts, num_heads):
    """Queries, keys and values of the delta rule (T, B, heads, d): 2406.06484, section 3.3."""
    qkv = silu(short_conv(params["conv"], dense(params["qkv"], xs), starts))
    q, k, v = (split_heads(x, num_heads) for x in np.split(qkv, 3, axis=-1))
    return unit(q) / np.sqrt(q.shape[-1]), unit(k), v


def delta_rule(q, k, v, beta, decay, starts):
    """Reads of S' = decay (I - beta k k^T) S + beta k v^T, per head: (T, B, heads, d)."""
    ys = np.zeros_like(v)
    for b, head in np.ndindex(*v.shape[1:3]):
        for t in range(len(v)):
            if t == 0 or starts[t, b]:
                memory = np.zeros((q.shape[-1], v.shape[-1]))
            now = t, b, head
            erase = np.eye(len(memory)) - beta[now] * np.outer(k[now], k[now])
            memory = decay[now] * erase @ memory + beta[now] * np.outer(k[now], v[now])
            ys[now] = memory.T @ q[now]
    return ys
