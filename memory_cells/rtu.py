"""Recurrent trace unit (Elelimy et al. 2024, arXiv 2409.01449).

    r = exp(-exp(nu)),  phi = exp(theta)                   as in the LRU
    p = r cos(phi) h1 - r sin(phi) h2 + sqrt(1 - r^2) W1 x
    q = r cos(phi) h2 + r sin(phi) h1 + sqrt(1 - r^2) W2 x

    nonlinear:  h1', h2' = f(p), f(q)     y = [h1', h2']
    linear:     h1', h2' = p, q           y = f([h1', h2'])

This is a complex diagonal recurrence in real numbers. The paper made it for real-time recurrent
learning, which here costs only O(N D) per step. This cell learns by backpropagation through time
like every other one, which gives the same gradients.

The paper starts from r between 0 and 1 and phases up to 2 pi. The defaults here are half lives of 7
to 700 steps and f = relu. With them, four seeds need 559 to 758 updates in the task recall of
benchmark/recall.py. From the paper's start they need 669 to more than 1000, and with f = tanh none
learns it in 1000.

Carry: (h1, h2), each (B, N) with N = H / 2, zeros.
Cost per step: 2 D H floating-point operations per environment.
Sequences: in a loop; if linear, in a loop or in parallel (see `parts/linear_scan.py`).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_impl, check_ring
from memory_cells.parts.dense import Dense
from memory_cells.parts.initializers import log_phase_init, log_rate_init
from memory_cells.parts.linear_scan import linear_scan
from memory_cells.parts.recurrent_scan import recurrent_scan

ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu}


class RTU(SequenceCell):
    """Recurrent trace unit; see the module's docstring.

    Attributes:
      features: H, the size of both states together and of the output; even.
      nonlinear: whether f is applied in the recurrence or after it.
      activation: f, "tanh" or "relu".
      r_min: smallest initial r.
      r_max: largest initial r.
      max_phase: largest initial phi, in radians per step.
      impl: "auto", "scan" or "parallel"; see `parts/linear_scan.py`. Only the linear unit has a
        parallel form.
      learned_carry: learn the h1 and h2 that an episode starts with.
    """

    nonlinear: bool = True
    activation: str = "relu"
    r_min: float = 0.9
    r_max: float = 0.999
    max_phase: float = 3.14
    impl: str = "auto"
    learned_carry: bool = False

    def __post_init__(self):
        check_impl("rtu", self.impl)
        check_ring("rtu", self.r_min, self.r_max, self.max_phase)
        if self.features % 2:
            raise ValueError(f"rtu needs hidden_size to be even, got {self.features}")
        if self.activation not in ACTIVATIONS:
            valid = ", ".join(ACTIVATIONS)
            raise ValueError(f"rtu needs activation to be one of {valid}, got {self.activation!r}")
        if self.nonlinear and self.impl == "parallel":
            raise ValueError(
                "rtu has a parallel form only with nonlinear=False, got impl 'parallel'"
            )
        super().__post_init__()

    def setup(self):
        states = self.features // 2
        self.input_1 = Dense(states, use_bias=False)
        self.input_2 = Dense(states, use_bias=False)
        self.nu = self.param("nu", log_rate_init(self.r_min, self.r_max), (states,))
        self.theta = self.param("theta", log_phase_init(self.max_phase), (states,))
        if self.learned_carry:
            pair = self.param("initial_h", nn.initializers.zeros, (2, states))
            self.initial_offset = tuple(pair)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        zeros = jnp.zeros((*input_shape[:-1], self.features // 2), jnp.float32)
        return zeros, zeros

    def sequence(self, carry, xs, starts):
        initial = self.initial_carry_like(xs)
        f = ACTIVATIONS[self.activation]
        rate = jnp.exp(self.nu)
        phi = jnp.exp(self.theta)
        scale = jnp.sqrt(-jnp.expm1(-2.0 * rate))
        inputs = scale * self.input_1(xs), scale * self.input_2(xs)
        if self.nonlinear:
            rotation = jnp.exp(-rate) * jnp.cos(phi), jnp.exp(-rate) * jnp.sin(phi)
            nonlinear_step = partial(step, f)
            carry, hs = recurrent_scan(
                rotate, nonlinear_step, rotation, carry, inputs, starts, initial
            )
            return carry, jnp.concatenate(hs, axis=-1)
        decay = jnp.exp(jax.lax.complex(-rate, phi))
        inputs = jax.lax.complex(*inputs)
        carry = jax.lax.complex(*carry)
        initial = jax.lax.complex(*initial)
        hs = linear_scan(decay, inputs, carry, starts, initial, self.impl)
        return (hs[-1].real, hs[-1].imag), f(jnp.concatenate([hs.real, hs.imag], axis=-1))


def rotate(rotation, carry):
    """The recurrent half of p and q."""
    cos, sin = rotation
    h1, h2 = carry
    return cos * h1 - sin * h2, cos * h2 + sin * h1


def step(f, carry, x, rotated):
    """One nonlinear step, from the input half `x` and the recurrent half `rotated` of p and q."""
    h = f(x[0] + rotated[0]), f(x[1] + rotated[1])
    return h, h
