"""S5, the simplified state space layer (Smith et al. 2023, arXiv 2208.04933).

In reinforcement learning: Lu et al. 2023, arXiv 2303.03982.

    u = norm(x)                                        layer normalisation
    a = exp(lambda dt),  lambda = min(l, -1e-4) + i w  zero-order hold of the continuous system
    h' = a * h + (a - 1) / lambda * (B u)              (eq. 6), elementwise as it is diagonal
    s  = 2 Re(C h') + d * u                            h has one state of each conjugate pair
    y  = (W v + b) * sigmoid(V v + c),  v = gelu(s)    gated linear unit

This is the layer of the official code without its residual connection. B and C are complex
matrices, stored as pairs of real ones. lambda starts at the eigenvalues of the normal part of
HiPPO-LegS, block by block, with B and C transformed accordingly. dt starts log-uniformly between
dt_min and dt_max.

Before the transformation, entries of B have a variance of 1 / H, so that B u starts at the size of
u. In the official code it is 1 / (2 P), because its lecun_normal takes the shape (2 P, H) for 2 P
inputs. With the default, 2 P = H, this is the same.

The paper's dt_max is 0.1, for half lives of 14 to 1400 steps. The default here is 1, which adds
shorter ones: in the task 4-back of benchmark/recall.py, four seeds need 56 to 66 updates instead of
102 to 173. Unlike by default in the official code, the real parts of lambda stay negative, because
a positive one overflows in the end.

Carry: h (B, P) complex64, zeros.
Cost per step: 8 H P + 4 H^2 floating-point operations per environment.
Sequences: in a loop or in parallel (see `parts/linear_scan.py`).
"""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memory_cells.masked_rnn import SequenceCell
from memory_cells.parts.checks import check_impl
from memory_cells.parts.dense import Dense
from memory_cells.parts.gated_linear_unit import GatedLinearUnit
from memory_cells.parts.linear_scan import linear_scan


class S5(SequenceCell):
    """S5 layer; see the module's docstring.

    Attributes:
      features: H, the size of the output.
      state_size: 2 P, the number of states with both of each conjugate pair; 0 takes `features`,
        made even.
      num_blocks: blocks of the initial state matrix; 2 P must be a multiple of twice as many.
      dt_min: smallest initial time step.
      dt_max: largest initial time step.
      norm: normalise the input; without it, u = x.
      glu: end with the gated linear unit; without it, y = s.
      impl: "auto", "scan" or "parallel"; see `parts/linear_scan.py`.
      learned_carry: learn the h that an episode starts with.
    """

    state_size: int = 0
    num_blocks: int = 1
    dt_min: float = 0.001
    dt_max: float = 1.0
    norm: bool = True
    glu: bool = True
    impl: str = "auto"
    learned_carry: bool = False

    def __post_init__(self):
        check_impl("s5", self.impl)
        full = self.full_state_size
        blocks = self.num_blocks
        if blocks < 1 or full < 1 or full % (2 * blocks):
            raise ValueError(
                f"s5 needs state_size to be a multiple of 2 num_blocks, got {full} and {blocks}"
            )
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"s5 needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        super().__post_init__()

    @property
    def full_state_size(self):
        return self.state_size or self.features + self.features % 2

    def setup(self):
        features = self.features
        full = self.full_state_size
        self.embed = Dense(features)
        self.normalise = nn.LayerNorm(use_fast_variance=False)

        eigenvalues, vectors = hippo(full // self.num_blocks)
        eigenvalues = np.tile(eigenvalues, self.num_blocks)
        vectors = np.kron(np.eye(self.num_blocks), vectors)  # (2 P, P), block-diagonal
        lambda_re = eigenvalues.real.astype(np.float32)
        lambda_im = eigenvalues.imag.astype(np.float32)
        self.lambda_re = self.param("lambda_re", lambda _: jnp.asarray(lambda_re))
        self.lambda_im = self.param("lambda_im", lambda _: jnp.asarray(lambda_im))

        def log_dt_init(key, shape):
            limits = np.log(self.dt_min), np.log(self.dt_max)
            return jax.random.uniform(key, shape, jnp.float32, *limits)

        # B and C are drawn for all 2 P states, then transformed to the basis of the eigenvectors.
        def B_init(key, shape):
            B = nn.initializers.lecun_normal()(key, shape)
            return as_pair(B @ vectors.conj())

        def C_init(key, shape):
            C = nn.initializers.normal(full**-0.5, jnp.complex64)(key, shape)
            return as_pair(2**0.5 * vectors.T @ C)

        self.log_dt = self.param("log_dt", log_dt_init, (full // 2,))
        self.B = self.param("B", B_init, (features, full))
        self.C = self.param("C", C_init, (full, features))
        self.d = self.param("d", nn.initializers.normal(1.0), (features,))
        self.output = GatedLinearUnit(features)
        if self.learned_carry:
            pair = self.param("initial_h", nn.initializers.zeros, (2, full // 2))
            self.initial_offset = jax.lax.complex(*pair)

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], self.full_state_size // 2), jnp.complex64)

    def sequence(self, carry, xs, starts):
        if xs.shape[-1] != self.features:  # d * u needs as many inputs as features
            xs = self.embed(xs)
        if self.norm:
            xs = self.normalise(xs)
        eigenvalues = jax.lax.complex(jnp.minimum(self.lambda_re, -1e-4), self.lambda_im)
        exponent = eigenvalues * jnp.exp(self.log_dt)
        scale = jnp.expm1(exponent) / eigenvalues
        inputs = scale * jax.lax.complex(xs @ self.B[0], xs @ self.B[1])
        decay = jnp.exp(exponent)
        initial = self.initial_carry_like(xs)
        hs = linear_scan(decay, inputs, carry, starts, initial, self.impl)
        ys = 2.0 * (hs.real @ self.C[0] - hs.imag @ self.C[1]) + self.d * xs
        return hs[-1], self.output(ys) if self.glu else ys


@cache
def hippo(size):
    """The normal part of HiPPO-LegS: half of its eigenvalues and their eigenvectors.

    Returns:
      Eigenvalues (size / 2,) with negative imaginary part, eigenvectors (size, size / 2).
    """
    n = np.arange(size)
    lower = np.tril(0.5 * np.sqrt(np.outer(2 * n + 1, 2 * n + 1)), -1)
    skew = lower.T - lower  # the normal part is this matrix minus 1/2 I
    imaginary, vectors = np.linalg.eigh(-1j * skew)
    half = size // 2
    return -0.5 + 1j * imaginary[:half], vectors[:, :half]


def as_pair(z):
    """Complex (...) -> real (2, ...): real and imaginary part."""
    return jnp.stack([z.real, z.imag])
