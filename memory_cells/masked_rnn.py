"""The contract that every memory obeys, and the wrapper through which the scripts use it.

Arrays are time-major, with T steps, B environments, D input features and H output features.
`starts[t, b]` is True where `xs[t, b]` is the first observation of an episode. The memory is reset
to its own initial carry *before* it reads that observation. A script never has to touch the carry
when an episode ends.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memory_cells.parts.carry import detach, reset


class MemoryCell(nn.RNNCellBase):
    """A recurrent cell: Flax's contract for one step, plus a sequence form with resets.

    A subclass writes `initialize_carry` and `__call__`; `sequence` then works. A cell that has a
    faster way to read a whole sequence overrides `sequence`, which must return the same numbers.

    A cell may offer to learn the carry that episodes start with. Then it has a field
    `learned_carry: bool = False`, and if that is set, `setup` defines `self.initial_offset`: a tree
    of the structure of the carry that holds parameters, zero at initialisation, or 0.0 for leaves
    that are not learned. The offset is added only where an episode starts, so `initialize_carry`
    needs no parameters.

    Attributes:
      features: H, the size of the output.
    """

    features: int
    learned_carry = False

    def initialize_carry(self, rng, input_shape):
        """The carry before anything is read, without parameters.

        Args:
          rng: not used; Flax's contract has it.
          input_shape: (B, D).

        Returns:
          A tree of arrays with leading axis B.
        """
        raise NotImplementedError

    def __call__(self, carry, x):
        """One step without a reset: carry, x (B, D) -> carry, y (B, H)."""
        raise NotImplementedError

    def sequence(self, carry, xs, starts):
        """Many steps with resets.

        Args:
          carry: the memory before xs[0], leaves (B, ...).
          xs: (T, B, D).
          starts: (T, B) bool, True where xs[t] is the first observation of an episode.

        Returns:
          The carry after the last step, and ys (T, B, H).
        """
        return scan_steps(self, carry, xs, starts)

    def initial_carry_like(self, xs):
        """The carry at the start of an episode, for the environments of `xs` (T, B, D)."""
        initial = self.initialize_carry(jax.random.key(0), xs.shape[1:])

        def widen(leaf):  # to float64 if xs is
            is_single = leaf.dtype in (jnp.float32, jnp.complex64)
            return leaf.astype(jnp.promote_types(leaf.dtype, xs.dtype)) if is_single else leaf

        initial = jax.tree.map(widen, initial)
        if self.learned_carry:
            return jax.tree.map(jnp.add, initial, self.initial_offset)
        return initial

    @nn.nowrap
    def param(self, name, init_fn, *init_args, **options):
        """A parameter in float32, as in Flax's layers, where JAX_ENABLE_X64 would give float64."""

        def narrow(leaf):
            return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf

        def init(*args, **kwargs):
            return jax.tree.map(narrow, init_fn(*args, **kwargs))

        return super().param(name, init, *init_args, **options)

    @property
    def num_feature_axes(self) -> int:
        return 1


class SequenceCell(MemoryCell):
    """A cell whose subclass writes `sequence`; a step is a sequence of length 1."""

    def __call__(self, carry, x):
        no_starts = jnp.zeros((1, x.shape[0]), bool)
        carry, ys = self.sequence(carry, x[None], no_starts)
        return carry, ys[0]

    def sequence(self, carry, xs, starts):
        raise NotImplementedError


def scan_steps(cell, carry, xs, starts, valid=None):
    """Read `xs` with a loop over steps of `cell`.

    Where `valid` (T, B) is False, a step is skipped: the carry stays as it is and the output is 0.
    """
    initial = cell.initial_carry_like(xs)

    def step(cell, carry, inputs):
        x, start, valid = inputs
        if valid is not None:  # a nan in the padding would reach the gradients
            x = jnp.where(valid[:, None], x, 0.0)
        new_carry, y = cell(reset(carry, initial, start), x)
        if valid is not None:
            new_carry = reset(new_carry, carry, ~valid)
            y = jnp.where(valid[:, None], y, 0.0)
        return new_carry, y

    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return scan(cell, carry, (xs, starts, valid))


class Stack(MemoryCell):
    """Memories on top of each other: each reads the outputs of the one below.

    The carry is the tuple of their carries.
    """

    cells: tuple[MemoryCell, ...] = ()

    def initialize_carry(self, rng, input_shape):
        carries = []
        for cell in self.cells:
            carries.append(cell.initialize_carry(rng, input_shape))
            input_shape = (*input_shape[:-1], cell.features)
        return tuple(carries)

    def initial_carry_like(self, xs):
        carries = []
        for cell in self.cells:
            carries.append(cell.initial_carry_like(xs))
            xs = jax.ShapeDtypeStruct((*xs.shape[:-1], cell.features), xs.dtype)
        return tuple(carries)

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
    """The memory as a script sees it: the same call acts (T = 1) and learns (T = num_steps).

        memory = MaskedRNN(make_cell("gru", 128))
        carry = memory.initialize_carry((num_envs, num_inputs))
        carry, ys = memory.apply(params, carry, xs, starts)

    The carry passed in is data, not a function of the parameters. Gradients reach it only if the
    caller differentiates with respect to it (see `detach`).
    """

    cell: MemoryCell

    def __call__(self, carry, xs, starts, valid=None, burn_in=0, bptt=0):
        """Read a sequence.

        Args:
          carry: the memory before xs[0], leaves (B, ...).
          xs: (T, B, D) inputs.
          starts: (T, B) bool, True where xs[t] is the first observation of an episode.
          valid: optional (T, B) bool, for sequences of different lengths. Where False, the memory
            keeps its carry and outputs 0. Reads step by step, even if the cell has a faster form.
          burn_in: the first `burn_in` steps only update the carry: they have no outputs, and no
            gradient flows through them (R2D2, section 3).
          bptt: cut the gradient at every multiple of this many steps, the incoming carry included.
            T must be a multiple of it; 0 cuts nowhere.

        Returns:
          The carry after the last step, and outputs (T - burn_in, B, H).

        Raises:
          ValueError: T is not a multiple of bptt, or there are both `valid` and `bptt`.
        """
        if burn_in:
            early_valid = None if valid is None else valid[:burn_in]
            carry, _ = self(carry, xs[:burn_in], starts[:burn_in], early_valid)
            carry = detach(carry)
            xs = xs[burn_in:]
            starts = starts[burn_in:]
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
