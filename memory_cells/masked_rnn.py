"""The contract every memory obeys, and the wrapper through which the scripts use it.

Arrays are time-major: T steps, B environments, D input features, H output features.
`starts[t, b]` is True where `xs[t, b]` is the first observation of an episode: the memory is reset to its own initial
carry *before* it reads that observation. Nothing else in a script ever has to touch the carry at an episode's end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.parts.carry import detach, reset


class MemoryCell(nn.RNNCellBase):
    """A recurrent cell: flax's contract for one step, plus the sequence form with resets.

    A subclass writes `initialize_carry` and `__call__`; `sequence` then works. A cell that knows a faster way through
    a whole sequence overrides `sequence`, and must give the same numbers.

    A cell can offer to learn the carry that an episode starts with: a field `learned_carry: bool = False`, and in
    `setup`, if it is set, `self.initial_offset`: the parameters, zeros at first, in the structure of the carry (0.0 for
    a leaf that is not learned). They come in only where an episode starts, so that what holds the carry between calls
    stays free of parameters.

    Attributes:
      features: H, the size of the output.
    """

    features: int
    learned_carry = False

    def initialize_carry(self, rng, input_shape):
        """The carry before anything is read, for `input_shape` = (B, D): leaves have leading axis B, no parameters."""
        raise NotImplementedError

    def __call__(self, carry, x):
        """One step without a reset: carry, x (B, D) -> carry, y (B, H)."""
        raise NotImplementedError

    def sequence(self, carry, xs, starts):
        """Many steps with resets: carry, xs (T, B, D), starts (T, B) bool -> carry after the last, ys (T, B, H)."""
        return scan_steps(self, carry, xs, starts)

    def initial_carry_like(self, xs):
        """The carry at an episode's start, for the environments of `xs` (T, B, D)."""
        initial = self.initialize_carry(jax.random.key(0), xs.shape[1:])
        return jax.tree.map(jnp.add, initial, self.initial_offset) if self.learned_carry else initial

    @property
    def num_feature_axes(self) -> int:
        return 1


class SequenceCell(MemoryCell):
    """A cell that is written as a sequence: a subclass writes `sequence`, of which a step is one of length 1."""

    def __call__(self, carry, x):
        carry, ys = self.sequence(carry, x[None], jnp.zeros((1, len(x)), bool))
        return carry, ys[0]

    def sequence(self, carry, xs, starts):
        raise NotImplementedError


def scan_steps(cell, carry, xs, starts, valid=None):
    """Step `cell` through `xs`; where `valid` (T, B) is False the step is skipped: the carry stays, the output is 0."""
    initial = cell.initial_carry_like(xs)

    def step(cell, carry, inputs):
        x, start, valid = inputs
        if valid is not None:  # padding is not read: nan in it would reach the gradients
            x = jnp.where(valid[:, None], x, 0.0)
        new_carry, y = cell(reset(carry, initial, start), x)
        if valid is not None:
            new_carry, y = reset(new_carry, carry, ~valid), jnp.where(valid[:, None], y, 0.0)
        return new_carry, y

    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return scan(cell, carry, (xs, starts, valid))


class Stack(MemoryCell):
    """Memories on top of each other: layer l + 1 reads what layer l puts out. The carry is the tuple of theirs."""

    cells: tuple[MemoryCell, ...] = ()

    def initialize_carry(self, rng, input_shape):
        shapes = [input_shape] + [(*input_shape[:-1], cell.features) for cell in self.cells]
        return tuple(cell.initialize_carry(rng, shape) for cell, shape in zip(self.cells, shapes, strict=False))

    def initial_carry_like(self, xs):
        inputs = [xs] + [jax.ShapeDtypeStruct((*xs.shape[:-1], cell.features), xs.dtype) for cell in self.cells]
        return tuple(cell.initial_carry_like(x) for cell, x in zip(self.cells, inputs, strict=False))

    def __call__(self, carry, x):
        carries = []
        for cell, layer_carry in zip(self.cells, carry, strict=True):
            layer_carry, x = cell(layer_carry, x)
            carries.append(layer_carry)
        return tuple(carries), x

    def sequence(self, carry, xs, starts):
        carries = []
        for cell, layer_carry in zip(self.cells, carry, strict=True):
            layer_carry, xs = cell.sequence(layer_carry, xs, starts)
            carries.append(layer_carry)
        return tuple(carries), xs


class MaskedRNN(nn.Module):
    """What a script calls its memory: the same call acts (T = 1) and learns (T = num_steps).

        memory = MaskedRNN(make_cell("gru", 128))
        carry = memory.initialize_carry((num_envs, num_inputs))
        carry, ys = memory.apply(params, carry, xs, starts)

    The incoming carry is data, not a function of the parameters: gradients reach it only if the caller differentiates
    with respect to it (see `detach`).
    """

    cell: MemoryCell

    def __call__(self, carry, xs, starts, valid=None, burn_in=0, bptt=0):
        """Read a sequence.

        Args:
          carry: the memory before xs[0], leaves (B, ...).
          xs: (T, B, D) inputs.
          starts: (T, B) bool, True where xs[t] is the first of an episode.
          valid: optional (T, B) bool for sequences of different lengths: where False the memory keeps its carry and
            puts out 0. Costs the step-by-step scan, also for cells that have a faster form.
          burn_in: the first `burn_in` steps only bring the carry up to date: no output, no gradient (R2D2, section 3).
          bptt: cut the gradient's way back at every multiple of this many steps, the incoming carry included; 0 means
            nowhere. T must be a multiple of it.

        Returns:
          The carry after the last step, and outputs (T - burn_in, B, H).
        """
        if burn_in:
            early = slice(0, burn_in)
            carry, _ = self(carry, xs[early], starts[early], None if valid is None else valid[early])
            carry, xs, starts = detach(carry), xs[burn_in:], starts[burn_in:]
            valid = None if valid is None else valid[burn_in:]
        if valid is not None:
            if bptt:
                raise ValueError("MaskedRNN takes either a valid mask or a bptt length, not both")
            return scan_steps(self.cell, carry, xs, starts, valid)
        if bptt and bptt < len(xs):
            return self._truncated(carry, xs, starts, bptt)
        return self.cell.sequence(carry, xs, starts)

    def _truncated(self, carry, xs, starts, bptt):
        """`cell.sequence` over chunks of `bptt` steps, with the gradient cut between them."""
        if len(xs) % bptt:
            raise ValueError(f"bptt ({bptt}) must divide the sequence length ({len(xs)})")

        def chunk(cell, carry, inputs):
            return cell.sequence(detach(carry), *inputs)

        chunks = jax.tree.map(lambda a: a.reshape(-1, bptt, *a.shape[1:]), (xs, starts))
        scan = nn.scan(chunk, variable_broadcast="params", split_rngs={"params": False})
        carry, ys = scan(self.cell, carry, chunks)
        return carry, ys.reshape(-1, *ys.shape[2:])

    @nn.nowrap
    def initialize_carry(self, input_shape):
        """The carry before anything is read, for `input_shape` = (B, D)."""
        return self.cell.initialize_carry(jax.random.key(0), input_shape)
