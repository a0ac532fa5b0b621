"""Small things that the memories with several heads have in common."""


def split_heads(x, num_heads):
    """(..., H) -> (..., heads, H / heads)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x):
    """(..., heads, d) -> (..., heads * d)."""
    return x.reshape(*x.shape[:-2], -1)
