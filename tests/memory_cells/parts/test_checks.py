"""Checks of options that several memories have."""

import pytest

from memory_cells import make_cell

WITH_HEADS = ["mlstm", "xlstm", "linear_attention", "retnet", "deltanet", "gated_deltanet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "multiple of num_heads, got 8 and 3"),
        ({"conv_width": 1}, "conv_width to be 0 or at least 2, got 1"),
        ({"impl": "chunks"}, "impl to be one of auto, scan, parallel, got 'chunks'"),
    ],
)
def test_cells_refuse(options, message):
    for name in WITH_HEADS:
        with pytest.raises(ValueError, match=f"{name} needs .*{message}"):
            make_cell(name, 8, **options)
