"""The figures of report.py, readable without colours.

Where many memories are compared, each has a panel of its own: it is a black line there, the
reference is dashed, and all others are grey.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

# The page tells methods apart by colour, dash and symbol together. The colours are those of Okabe
# and Ito, without their yellow, which white hides. Lengths without common divisors: no two of the
# first 70 methods have the same colour and dash and symbol.
LOOKS = {
    "colors": ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B57A00"],
    "dashes": ["solid", "dash", "dot", "dashdot", "longdash"],
    "symbols": [
        "circle",
        "square",
        "diamond",
        "triangle-up",
        "x",
        "triangle-down",
        "cross",
        "star",
        "hexagram",
        "pentagon",
        "hourglass",
    ],
}
COLUMNS = 5
BLUE = "#0072B2"


def draw_all(found: dict, reference: str, thresholds, shares, paths: dict[str, Path]) -> None:
    """Write the figures of one comparison.

    Args:
      found: memory -> its statistics, as `report.statistics` has them.
      paths: name of a figure -> where to write it.
    """
    save(intervals(found, reference), paths["iqm"])
    profiles = panels(found, reference, "profile", thresholds)
    profiles.supxlabel("have a score above", fontsize=10)
    profiles.supylabel("share of seeds and tasks", fontsize=10)
    save(profiles, paths["profiles"])
    efficiency = panels(found, reference, "efficiency", 100 * np.asarray(shares))
    efficiency.supxlabel("share of the environment steps, %", fontsize=10)
    efficiency.supylabel("IQM of the scores", fontsize=10)
    save(efficiency, paths["efficiency"])


def save(figure, path: Path) -> None:
    """Write a figure; the same numbers give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def intervals(found: dict, reference: str):
    """IQM and probability of improvement: a row for each memory, the best on top."""
    order = sorted(found, key=lambda memory: (found[memory]["iqm"][0][0], memory))
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 1.3 + 0.27 * len(order)), layout="constrained", sharey=True
    )
    heads = ("IQM of the scores", f"probability to be better than {reference}")
    for axis, name, head in zip(axes, ("iqm", "better"), heads, strict=True):
        for place, memory in enumerate(order):
            if name not in found[memory] or (name == "better" and memory == reference):
                continue
            point, low, high = (x[0] for x in found[memory][name])
            axis.plot(
                [low, high], [place, place], color=BLUE, lw=5, alpha=0.35, solid_capstyle="butt"
            )
            is_reference = memory == reference
            axis.plot(point, place, "D" if is_reference else "o", color="black", ms=5)
        axis.set(xlabel=head)
        axis.grid(axis="x", alpha=0.4)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].axvline(0.5, color="black", ls="--", lw=1)
    axes[1].set_xlim(-0.02, 1.02)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(-0.6, len(order) - 0.4)
    return figure


def panels(found: dict, reference: str, name: str, xs):
    """One panel for each memory, with its interval; the reference is dashed, the others grey."""
    rows = -(-len(found) // COLUMNS)
    columns = min(COLUMNS, len(found))
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(0.9 + 2.1 * columns, 0.8 + 1.7 * rows),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (memory, own) in zip(axes.flat, found.items(), strict=False):
        for other in found:
            if other not in (memory, reference):
                axis.plot(xs, found[other][name][0], color="0.8", lw=0.7)
        if reference in found and memory != reference:
            axis.plot(xs, found[reference][name][0], color="black", ls="--", lw=1.1)
        point, low, high = own[name]
        axis.fill_between(xs, low, high, color=BLUE, alpha=0.35, lw=0)
        axis.plot(xs, point, color="black", lw=2)
        axis.set_title(memory, fontsize=10)
        axis.set_ylim(-0.03, 1.05)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if reference in found and len(found) > 1:
        figure.suptitle(
            f"black: the memory, with its 95 % interval; dashed: {reference}; grey: the others",
            fontsize=9,
        )
    return figure
