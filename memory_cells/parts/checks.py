"""Options that several memories have, checked in the same words."""

import math

IMPLS = ("auto", "scan", "parallel")


def check_impl(owner, impl):
    """Refuse a form of the recurrence that is not one of `IMPLS`.

    Raises:
      ValueError: names the value and what is valid.
    """
    if impl not in IMPLS:
        raise ValueError(f"{owner} needs impl to be one of {', '.join(IMPLS)}, got {impl!r}")


def check_conv_width(owner, width):
    """Refuse a width that is no convolution and does not mean to leave it out either.

    Raises:
      ValueError: names the value and what is valid.
    """
    if width < 2 and width != 0:
        raise ValueError(f"{owner} needs conv_width to be 0 or at least 2, got {width}")


def check_num_heads(owner, features, num_heads):
    """Refuse a number of heads that does not divide the features among them.

    Raises:
      ValueError: names the values and what is valid.
    """
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"{owner} needs hidden_size to be a multiple of num_heads, got {features} and {num_heads}")


def check_at_least(owner, cell, **least):
    """Refuse attributes of `cell` that are less than the number given for them.

    Raises:
      ValueError: names the attribute, its value and what is valid.
    """
    for name, limit in least.items():
        if getattr(cell, name) < limit:
            raise ValueError(f"{owner} needs {name} to be at least {limit}, got {getattr(cell, name)}")


def check_ring(owner, r_min, r_max, max_phase):
    """Refuse limits of |lambda| and of its phase that leave no ring inside the unit circle.

    Raises:
      ValueError: names the values and what is valid.
    """
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(f"{owner} needs 0 <= r_min < r_max <= 1, got {r_min} and {r_max}")
    if not 0 < max_phase <= math.tau:
        raise ValueError(f"{owner} needs max_phase to be above 0 and at most 2 pi, got {max_phase}")


def check_beta_scale(owner, cell):
    if cell.beta_scale not in (1, 2):
        raise ValueError(f"{owner} needs beta_scale to be 1 or 2, got {cell.beta_scale}")
