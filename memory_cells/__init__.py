"""Memories for recurrent agents, one file each, behind one interface (see `masked_rnn.py`).

    cell = make_cell("slstm", 128, num_heads=8)
    memory = MaskedRNN(cell)

To add a memory, write `memory_cells/<name>.py` with a subclass of `MemoryCell` and enter the class
in `CELLS`. Every recurrent script then offers it, and the tests of `tests/memory_cells` check it.
"""

import dataclasses
import math

from harness.errors import check_options, did_you_mean
from memory_cells.deltanet import DeltaNet
from memory_cells.dnc import DNC
from memory_cells.ffm import FFM
from memory_cells.gated_deltanet import GatedDeltaNet
from memory_cells.gpt2 import GPT2
from memory_cells.gru import GRU
from memory_cells.gtrxl import GTrXL
from memory_cells.linear_attention import LinearAttention
from memory_cells.lru import LRU
from memory_cells.lstm import LSTM
from memory_cells.mamba import Mamba
from memory_cells.masked_rnn import MaskedRNN, MemoryCell, Stack
from memory_cells.mingru import MinGRU
from memory_cells.mlstm import MLSTM
from memory_cells.none import NoMemory
from memory_cells.parts.carry import as_sequence, detach, take
from memory_cells.retnet import RetNet
from memory_cells.rtu import RTU
from memory_cells.s5 import S5
from memory_cells.shm import SHM
from memory_cells.slstm import SLSTM
from memory_cells.xlstm import XLSTM

__all__ = ["CELLS", "MaskedRNN", "MemoryCell", "as_sequence", "detach", "make_cell", "take"]

CELLS: dict[str, type[MemoryCell]] = {
    "gru": GRU,
    "lstm": LSTM,
    "slstm": SLSTM,
    "mlstm": MLSTM,
    "xlstm": XLSTM,
    "gtrxl": GTrXL,
    "gpt2": GPT2,
    "s5": S5,
    "shm": SHM,
    "dnc": DNC,
    "ffm": FFM,
    "lru": LRU,
    "mingru": MinGRU,
    "mamba": Mamba,
    "linear_attention": LinearAttention,
    "retnet": RetNet,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "rtu": RTU,
    "none": NoMemory,
}


def make_cell(name: str, hidden_size: int, num_layers: int = 1, /, **options) -> MemoryCell:
    """A memory by name.

    Args:
      name: a key of `CELLS`.
      hidden_size: features of the output.
      num_layers: how many cells of this kind to stack.
      **options: the cell's own hyper-parameters, which its class documents as attributes.

    Raises:
      ValueError: unknown name or option, or a value that the cell cannot have.
    """
    if name not in CELLS:
        hint = did_you_mean(name, CELLS.keys())
        raise ValueError(f"unknown cell {name!r}{hint}; valid cells: {', '.join(CELLS)}")
    cell_class = CELLS[name]
    inherited = {field.name for field in dataclasses.fields(MemoryCell)}
    own_fields = [field for field in dataclasses.fields(cell_class) if field.name not in inherited]
    defaults = {field.name: field.default for field in own_fields}
    check_options(f"cell {name!r}", options, defaults)
    for option, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"option {option} of cell {name!r} must be finite, got {value}")
    for size, value in (("hidden_size", hidden_size), ("num_layers", num_layers)):
        if value < 1:
            raise ValueError(f"a memory needs {size} to be at least 1, got {value}")
    cells = tuple(cell_class(features=hidden_size, **options) for _ in range(num_layers))
    return cells[0] if num_layers == 1 else Stack(features=hidden_size, cells=cells)
