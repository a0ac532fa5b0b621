"""Checks of options that several memories have.

Every check takes the name of the memory as `owner` and raises a ValueError that says which value
it got and which values are valid.
"""

import math

IMPLS = ("auto", "scan", "parallel")


def check_impl(owner, impl):
    """The implementation of the recurrence must be one of `IMPLS`."""
    if impl not in IMPLS:
        raise ValueError(f"{owner} needs impl to be one of {', '.join(IMPLS)}, got {impl!r}")


def check_conv_width(owner, width):
    """A convolution must see at least two steps; 0 leaves it out."""
    if width < 2 and width != 0:
        raise ValueError(f"{owner} needs conv_width to be 0 or at least 2, got {width}")


def check_num_heads(owner, features, num_heads):
    """The features must divide evenly among the heads."""
    if num_heads < 1 or features % num_heads:
        raise ValueError(
            f"{owner} needs hidden_size to be a multiple of num_heads, "
            f"got {features} and {num_heads}"
        )


def check_at_least(owner, cell, **limits):
    """The attributes of `cell` named in `limits` must not be below their limits."""
    for name, limit in limits.items():
        value = getattr(cell, name)
        if value < limit:
            raise ValueError(f"{owner} needs {name} to be at least {limit}, got {value}")


def check_ring(owner, r_min, r_max, max_phase):
    """The limits of |lambda| and of its phase must enclose a ring inside the unit circle."""
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(f"{owner} needs 0 <= r_min < r_max <= 1, got {r_min} and {r_max}")
    if not 0 < max_phase <= math.tau:
        raise ValueError(f"{owner} needs max_phase to be above 0 and at most 2 pi, got {max_phase}")


def check_beta_scale(owner, beta_scale):
    """The write strength of a delta rule must be limited to 1 or 2."""
    if beta_scale not in (1, 2):
        raise ValueError(f"{owner} needs beta_scale to be 1 or 2, got {beta_scale}")
