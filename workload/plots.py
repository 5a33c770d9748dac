"""What the simulator's and the load test's plots have in common. Imported only when plots are asked for: matplotlib
takes half a second to load.
"""

# matplotlib's own annotations leave the keyword arguments of nearly every method open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

#: Points of a curve, and dots of a scatter plot: what an eye can tell apart.
CURVE_POINTS = 400
SCATTER_POINTS = 4000

PLAIN_NUMBERS = StrMethodFormatter("{x:,g}")

_DPI = 110
_SHADES = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2")


def panels(
    rows: int, columns: int, *, width: float, height: float, share_time: bool = False
) -> tuple[Figure, list[Axes]]:
    """Inches; the panels row by row."""
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_time)
    return figure, [axis for row in grid for axis in row]


def scale(axis: Axes, values: NDArray[np.float64]) -> None:
    """Logarithmic along the width where the values, ascending, differ by much."""
    if 0 < 20 * values[0] < values[-1]:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(PLAIN_NUMBERS)


def finish(axis: Axes, *, legend_above: bool = False) -> None:
    """Grid, and a legend where anything has a label."""
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    names = axis.get_legend_handles_labels()[1]
    if names and legend_above:
        axis.legend(fontsize="small", frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1.0, 0.98))
    elif names:
        axis.legend(fontsize="small", framealpha=0.85)


def shades(count: int) -> tuple[str, ...]:
    """Of targets: one colour for each SLO class."""
    return tuple(_SHADES[index % len(_SHADES)] for index in range(count))


def quantiles_ms(values_s: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the values that are known; empty of none."""
    known = values_s[~np.isnan(values_s)]
    return np.quantile(known, shares) * 1e3 if len(known) else known


def thinned(rows: NDArray[np.intp], most: int) -> NDArray[np.intp]:
    """At most so many of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.intp)]
