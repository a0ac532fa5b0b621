"""Differentiable neural computer (Graves et al. 2016, Nature 538), with one write head.

An LSTM controls a memory M of N slots through an interface vector. It reads its input and what the
R read heads found one step before. The equations are those of the paper's Methods. Subscripts w and
r stand for the write head and the read heads, primes for new values:

    c', h' = LSTM(c, [x, h, r])
    interface = W_xi h' + b_xi: keys k, strengths beta = 1 + softplus, erase e, write v,
                gates f, g_a, g_w = sigmoid, read modes pi = softmax
    C(M, k, beta) = softmax_slots(beta cos(M, k))                     addressing by content
    u' = (u + w_w - u * w_w) * prod_heads (1 - f w_r)                 usage of the slots
    a_i = (1 - u'_i) prod_{j used less than i} u'_j                   allocation, free slots first
    w_w' = g_w (g_a a + (1 - g_a) C(M, k_w, beta_w))
    M' = M * (1 - w_w' e^T) + w_w' v^T
    L'_ij = (1 - w_w'_i - w_w'_j) L_ij + w_w'_i p_j,  L'_ii = 0       link: i was written after j
    p' = (1 - sum w_w') p + w_w'                                      precedence: written last
    w_r' = pi_1 L'^T w_r + pi_2 C(M', k_r, beta_r) + pi_3 L' w_r      backward, content, forward
    r' = M'^T w_r',   y = W_y [h', r'] + b_y

The gradient takes the order of the slots by usage as a constant, as in the paper.

Carry: `State`, zeros; N^2 + N (W + R + 3) + R W + 2 Hs numbers per environment.
Cost per step: 8 Hs (D + Hs + R W) floating-point operations per environment for the controller,
2 Hs (R W + 3 W + 5 R + 3) for the interface, about (4 R + 10) N^2 + (4 R + 8) N W for the memory.
Sequences: in a loop.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.carry import reset
from memory_cells.parts.checks import check_at_least
from memory_cells.parts.dense import Dense

# As in the authors' code. Keeps norms differentiable at an empty slot, and usages above 0.
EPSILON = 1e-6


class State(NamedTuple):
    """The carry: B environments, N slots of width W, R read heads, a controller of size Hs."""

    c: jax.Array  # (B, Hs) the controller
    h: jax.Array  # (B, Hs)
    reads: jax.Array  # (B, R, W)
    memory: jax.Array  # (B, N, W)
    usage: jax.Array  # (B, N)
    precedence: jax.Array  # (B, N)
    links: jax.Array  # (B, N, N)
    write_weights: jax.Array  # (B, N)
    read_weights: jax.Array  # (B, R, N)


class Interface(NamedTuple):
    """What the controller tells the memory, in the order of the paper."""

    read_keys: jax.Array  # (B, R, W)
    read_strengths: jax.Array  # (B, R)
    write_key: jax.Array  # (B, W)
    write_strength: jax.Array  # (B, 1)
    erase: jax.Array  # (B, W)
    write: jax.Array  # (B, W)
    free_gates: jax.Array  # (B, R)
    allocation_gate: jax.Array  # (B, 1)
    write_gate: jax.Array  # (B, 1)
    read_modes: jax.Array  # (B, R, 3)


class DNC(SequenceCell):
    """Differentiable neural computer; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      controller_size: Hs, the size of the LSTM.
      num_slots: N, the rows of the memory.
      slot_size: W, the width of a row.
      num_reads: R, the number of read heads.
      forget_bias: initial bias of the LSTM's forget gate.
    """

    controller_size: int = 64
    num_slots: int = 16
    slot_size: int = 16
    num_reads: int = 2
    forget_bias: float = 1.0

    def __post_init__(self):
        check_at_least("dnc", self, controller_size=1, num_slots=1, slot_size=1, num_reads=1)
        super().__post_init__()

    def setup(self):
        size = self.controller_size
        num_reads = self.num_reads
        width = self.slot_size
        zeros = nn.initializers.zeros
        orthogonal = nn.initializers.orthogonal()
        bias_inits = {"f": nn.initializers.constant(self.forget_bias)}
        self.inputs = {name: Dense(size, bias_init=bias_inits.get(name, zeros)) for name in "ifgo"}
        shape = (size + num_reads * width, size)  # from the state and from what was read
        self.hidden = {name: self.param(f"hidden_{name}", orthogonal, shape) for name in "ifgo"}
        shape = (size, num_reads * (width + 5) + 3 * width + 3)
        kernel_init = nn.initializers.lecun_normal()
        self.interface_kernel = self.param("interface_kernel", kernel_init, shape)
        self.interface_bias = self.param("interface_bias", zeros, shape[1:])
        self.output = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        shapes = State(
            c=(self.controller_size,),
            h=(self.controller_size,),
            reads=(self.num_reads, self.slot_size),
            memory=(self.num_slots, self.slot_size),
            usage=(self.num_slots,),
            precedence=(self.num_slots,),
            links=(self.num_slots, self.num_slots),
            write_weights=(self.num_slots,),
            read_weights=(self.num_reads, self.num_slots),
        )
        batch = input_shape[:-1]
        return State(*(jnp.zeros((*batch, *shape), jnp.float32) for shape in shapes))

    def sequence(self, carry, xs, starts):
        hidden = tuple(self.hidden[name] for name in "ifgo")
        params = hidden, self.interface_kernel, self.interface_bias
        gates = tuple(self.inputs[name](xs) for name in "ifgo")
        initial = self.initial_carry_like(xs)

        def body(state, inputs):
            gates, start = inputs
            state = step(params, reset(state, initial, start), gates)
            return state, (state.h, state.reads)

        # The gradient stores the states. It recomputes what is between them, several times as much.
        body = jax.checkpoint(body, prevent_cse=False)
        carry, (hs, reads) = jax.lax.scan(body, carry, (gates, starts))
        reads = reads.reshape(*hs.shape[:2], -1)
        return carry, self.output(jnp.concatenate([hs, reads], axis=-1))


def step(params, state, gates):
    """One step, from the input half of the controller's gates."""
    hidden, kernel, bias = params
    reads = state.reads.reshape(state.h.shape[0], -1)
    h = jnp.concatenate([state.h, reads], axis=-1)
    i, f, g, o = (x + h @ u for x, u in zip(gates, hidden, strict=True))
    c = nn.sigmoid(f) * state.c + nn.sigmoid(i) * jnp.tanh(g)
    h = nn.sigmoid(o) * jnp.tanh(c)
    interface = parse_interface(h @ kernel + bias, *state.reads.shape[1:])
    return access(interface, state._replace(c=c, h=h))


def parse_interface(vector, num_reads, width):
    """The interface from the vector (B, ...) that holds its parts one after another."""
    sizes = Interface(
        read_keys=num_reads * width,
        read_strengths=num_reads,
        write_key=width,
        write_strength=1,
        erase=width,
        write=width,
        free_gates=num_reads,
        allocation_gate=1,
        write_gate=1,
        read_modes=3 * num_reads,
    )
    parts = {}
    start = 0
    for name, size in sizes._asdict().items():
        parts[name] = vector[:, start : start + size]
        start += size
    parts = Interface(**parts)
    return Interface(
        read_keys=parts.read_keys.reshape(-1, num_reads, width),
        read_strengths=1.0 + nn.softplus(parts.read_strengths),
        write_key=parts.write_key,
        write_strength=1.0 + nn.softplus(parts.write_strength),
        erase=nn.sigmoid(parts.erase),
        write=parts.write,
        free_gates=nn.sigmoid(parts.free_gates),
        allocation_gate=nn.sigmoid(parts.allocation_gate),
        write_gate=nn.sigmoid(parts.write_gate),
        read_modes=nn.softmax(parts.read_modes.reshape(-1, num_reads, 3)),
    )


def access(interface, state):
    """Write to the memory, then read from it."""
    retained = jnp.prod(1.0 - interface.free_gates[..., None] * state.read_weights, axis=1)
    written = state.write_weights
    usage = (state.usage + written - state.usage * written) * retained

    write_key = interface.write_key[:, None]
    by_content = address(state.memory, write_key, interface.write_strength)[:, 0]
    gate = interface.allocation_gate
    weights = gate * allocation(usage) + (1.0 - gate) * by_content
    write_weights = interface.write_gate * weights
    w = write_weights[..., None]  # (B, N, 1)
    memory = state.memory * (1.0 - w * interface.erase[:, None]) + w * interface.write[:, None]

    links = (1.0 - w - write_weights[:, None]) * state.links + w * state.precedence[:, None]
    links = jnp.where(jnp.eye(links.shape[-1], dtype=bool), 0.0, links)
    unwritten = 1.0 - write_weights.sum(axis=-1, keepdims=True)
    precedence = unwritten * state.precedence + write_weights

    backward = jnp.einsum("bji,brj->bri", links, state.read_weights)
    forward = jnp.einsum("bij,brj->bri", links, state.read_weights)
    by_content = address(memory, interface.read_keys, interface.read_strengths)
    modes = interface.read_modes
    read_weights = (
        modes[..., :1] * backward + modes[..., 1:2] * by_content + modes[..., 2:] * forward
    )
    reads = jnp.einsum("brn,bnw->brw", read_weights, memory)
    return state._replace(
        reads=reads,
        memory=memory,
        usage=usage,
        precedence=precedence,
        links=links,
        write_weights=write_weights,
        read_weights=read_weights,
    )


def address(memory, keys, strengths):
    """Weights (B, R, N) of the slots (B, N, W) by their similarity to the keys (B, R, W)."""
    products = jnp.einsum("brw,bnw->brn", keys, memory)
    scaled = strengths[..., None] * products
    return nn.softmax(scaled / (norm(keys)[..., None] * norm(memory)[:, None] + EPSILON))


def norm(x):
    return jnp.sqrt((x**2).sum(axis=-1) + EPSILON)


def allocation(usage):
    """Weights (B, N) that prefer the least used slots.

    Each slot needs the product of all smaller usages; of two equal ones, the first counts as
    smaller. Comparing all pairs makes this one small matrix product, in half the time of sorting.
    """
    usage = EPSILON + (1.0 - EPSILON) * usage
    free = 1.0 - usage
    one = usage[:, :, None]
    other = usage[:, None, :]
    index = jnp.arange(usage.shape[-1])
    is_before = (other < one) | ((other == one) & (index < index[:, None]))
    log_products = jnp.einsum("bij,bj->bi", is_before.astype(usage.dtype), jnp.log(usage))
    return free * jnp.exp(log_products)
