"""Differentiable neural computer (Graves et al. 2016, Nature 538; equations in its Methods), with one write head.

An LSTM controls a memory M of N slots by an interface vector. It reads its input and what the R read heads found one
step before; subscripts w and r are the write head and the read heads, primes the new values:

    c', h' = LSTM(c, [x, h, r])
    interface = W_xi h' + b_xi: keys k, strengths beta = 1 + softplus, erase e, write v, gates f, g_a, g_w = sigmoid,
                read modes pi = softmax
    C(M, k, beta) = softmax_slots(beta cos(M, k))                         addressing by content
    u' = (u + w_w - u * w_w) * prod_heads (1 - f w_r)                     usage of the slots
    a_i = (1 - u'_i) prod_{j used less than i} u'_j                       allocation: the free slots first
    w_w' = g_w (g_a a + (1 - g_a) C(M, k_w, beta_w))
    M' = M * (1 - w_w' e^T) + w_w' v^T
    L'_ij = (1 - w_w'_i - w_w'_j) L_ij + w_w'_i p_j,  L'_ii = 0           link: i was written right after j
    p' = (1 - sum w_w') p + w_w'                                          precedence: what was written last
    w_r' = pi_1 L'^T w_r + pi_2 C(M', k_r, beta_r) + pi_3 L' w_r          backward, content, forward
    r' = M'^T w_r',   y = W_y [h', r'] + b_y

The gradient takes the order of the slots' usages as a constant, as in the paper.
Carry: `State`, zeros; N^2 + N (W + R + 3) + R W + 2 Hs numbers per environment. Cost per step: 8 Hs (Hs + R W) for the
controller, 2 Hs (R W + 3 W + 5 R + 3) for its interface, about (4 R + 10) N^2 + (4 R + 8) N W for the memory, in
floating-point operations per environment; sequences are sequential.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.carry import reset
from memory_cells.parts.checks import check_at_least
from memory_cells.parts.dense import Dense

EPSILON = 1e-6  # as in the authors' code: keeps norms differentiable at an empty slot, and usages above 0


class State(NamedTuple):
    """The carry of a DNC; B environments, N slots of width W, R read heads, a controller of size Hs."""

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
    """What the controller tells the memory."""

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
      slot_size: W, their width.
      num_reads: R, the read heads.
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
        size, reads, width = self.controller_size, self.num_reads, self.slot_size
        bias = {"f": nn.initializers.constant(self.forget_bias)}
        self.inputs = {g: Dense(size, bias_init=bias.get(g, nn.initializers.zeros)) for g in "ifgo"}
        shape = (size + reads * width, size)  # from the state and from what was read
        self.hidden = {g: self.param(f"hidden_{g}", nn.initializers.orthogonal(), shape) for g in "ifgo"}
        interface = (size, reads * (width + 5) + 3 * width + 3)
        self.interface_kernel = self.param("interface_kernel", nn.initializers.lecun_normal(), interface)
        self.interface_bias = self.param("interface_bias", nn.initializers.zeros, interface[1:])
        self.output = Dense(self.features)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        size, slots, width, reads = self.controller_size, self.num_slots, self.slot_size, self.num_reads
        shapes = State(
            (size,),
            (size,),
            (reads, width),
            (slots, width),
            (slots,),
            (slots,),
            (slots, slots),
            (slots,),
            (reads, slots),
        )
        return State(*(jnp.zeros((*input_shape[:-1], *shape)) for shape in shapes))

    def sequence(self, carry, xs, starts):
        params = tuple(self.hidden[g] for g in "ifgo"), self.interface_kernel, self.interface_bias
        gates = tuple(self.inputs[g](xs) for g in "ifgo")
        initial = self.initial_carry_like(xs)

        def body(state, inputs):
            gates, start = inputs
            state = step(params, reset(state, initial, start), gates)
            return state, (state.h, state.reads)

        # Kept for the gradient are the states; what lies between them, several times as much, is computed again.
        carry, (hs, reads) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), carry, (gates, starts))
        return carry, self.output(jnp.concatenate([hs, reads.reshape(*hs.shape[:2], -1)], axis=-1))


def step(params, state, gates):
    """One step from the input half of the controller's gates."""
    hidden, kernel, bias = params
    h = jnp.concatenate([state.h, state.reads.reshape(len(state.h), -1)], axis=-1)
    i, f, g, o = (x + h @ u for x, u in zip(gates, hidden, strict=True))
    c = nn.sigmoid(f) * state.c + nn.sigmoid(i) * jnp.tanh(g)
    h = nn.sigmoid(o) * jnp.tanh(c)
    interface = parse_interface(h @ kernel + bias, *state.reads.shape[1:])
    return access(interface, state._replace(c=c, h=h))


def parse_interface(vector, num_reads, width):
    """The interface from the vector (B, ...) that holds its parts in the order of the paper."""
    sizes = (num_reads * width, num_reads, width, 1, width, width, num_reads, 1, 1, 3 * num_reads)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    parts = Interface(*(vector[:, end - size : end] for end, size in zip(ends, sizes, strict=True)))
    return Interface(
        parts.read_keys.reshape(-1, num_reads, width),
        1.0 + nn.softplus(parts.read_strengths),
        parts.write_key,
        1.0 + nn.softplus(parts.write_strength),
        nn.sigmoid(parts.erase),
        parts.write,
        nn.sigmoid(parts.free_gates),
        nn.sigmoid(parts.allocation_gate),
        nn.sigmoid(parts.write_gate),
        nn.softmax(parts.read_modes.reshape(-1, num_reads, 3)),
    )


def access(interface, state):
    """Write to the memory, then read from it."""
    retained = jnp.prod(1.0 - interface.free_gates[..., None] * state.read_weights, axis=1)
    usage = (state.usage + state.write_weights - state.usage * state.write_weights) * retained

    by_content = address(state.memory, interface.write_key[:, None], interface.write_strength)[:, 0]
    gate = interface.allocation_gate
    write_weights = interface.write_gate * (gate * allocation(usage) + (1.0 - gate) * by_content)
    w = write_weights[..., None]  # (B, N, 1)
    memory = state.memory * (1.0 - w * interface.erase[:, None]) + w * interface.write[:, None]

    links = (1.0 - w - write_weights[:, None]) * state.links + w * state.precedence[:, None]
    links = jnp.where(jnp.eye(links.shape[-1], dtype=bool), 0.0, links)
    precedence = (1.0 - write_weights.sum(axis=-1, keepdims=True)) * state.precedence + write_weights

    backward = jnp.einsum("bji,brj->bri", links, state.read_weights)
    forward = jnp.einsum("bij,brj->bri", links, state.read_weights)
    by_content = address(memory, interface.read_keys, interface.read_strengths)
    modes = interface.read_modes
    read_weights = modes[..., :1] * backward + modes[..., 1:2] * by_content + modes[..., 2:] * forward
    reads = jnp.einsum("brn,bnw->brw", read_weights, memory)
    return State(state.c, state.h, reads, memory, usage, precedence, links, write_weights, read_weights)


def address(memory, keys, strengths):
    """Weights (B, R, N) of the slots (B, N, W) by their similarity to the keys (B, R, W)."""
    products = jnp.einsum("brw,bnw->brn", keys, memory)
    return nn.softmax(strengths[..., None] * products / (norm(keys)[..., None] * norm(memory)[:, None] + EPSILON))


def norm(x):
    return jnp.sqrt((x**2).sum(axis=-1) + EPSILON)


def allocation(usage):
    """Weights (B, N) that prefer the least used slots.

    Each slot needs the product of the usages before it in ascending order. Comparing all pairs instead of sorting (ties
    go by index) makes that one small product of matrices, in half the time.
    """
    usage = EPSILON + (1.0 - EPSILON) * usage
    one, other = usage[:, :, None], usage[:, None, :]
    index = jnp.arange(usage.shape[-1])
    is_before = (other < one) | ((other == one) & (index < index[:, None]))
    return (1.0 - usage) * jnp.exp(jnp.einsum("bij,bj->bi", is_before.astype(usage.dtype), jnp.log(usage)))
