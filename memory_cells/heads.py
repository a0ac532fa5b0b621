"""Small things that the memories with several heads have in common."""

IMPLS = ("auto", "scan", "parallel")


def split_heads(x, num_heads):
    """(..., H) -> (..., heads, H / heads)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x):
    """(..., heads, d) -> (..., heads * d)."""
    return x.reshape(*x.shape[:-2], -1)


def check_heads(owner, cell):
    """Refuse numbers of heads, widths of the convolution and forms of the recurrence that the cell cannot have.

    Raises:
      ValueError: names the value and what is valid.
    """
    if cell.num_heads < 1 or cell.features % cell.num_heads:
        raise ValueError(
            f"{owner} needs hidden_size to be a multiple of num_heads, got {cell.features} and {cell.num_heads}"
        )
    if cell.conv_width < 2 and cell.conv_width != 0:
        raise ValueError(f"{owner} needs conv_width to be 0 or at least 2, got {cell.conv_width}")
    if cell.impl not in IMPLS:
        raise ValueError(f"{owner} needs impl to be one of {', '.join(IMPLS)}, got {cell.impl!r}")
