"""Named axes that may exist where a function is traced: environments, and devices."""

import jax

DEVICES = "devices"


def axes_in_use(*names: str) -> tuple[str, ...]:
    """Those of the named axes that exist where this is traced."""
    found = []
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError:
            continue
        found.append(name)
    return tuple(found)


def mean_over_devices(tree):
    """The mean over the devices that share the environments of a seed; on one device, the same."""
    return jax.lax.pmean(tree, axes) if (axes := axes_in_use(DEVICES)) else tree
