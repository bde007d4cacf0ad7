"""How figures look: one palette that stays apart without colour vision, thin frames, exact answers in black.

The colours are those of Okabe and Ito (2008).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"
BLACK, GREY = "#000000", "#8C8C8C"

DPI = 110


def new_figure(height: float, *, width: float = 8.2) -> "Figure":
    """An empty figure, sizes in inches of 110 pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panel(axes: "Axes", title: str, x_label: str, y_label: str) -> None:
    """Titles and frame of one panel."""
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(axes: "Axes", location: str = "best", *, size: float = 7.5) -> None:
    """The legend of a panel, without a box."""
    axes.legend(fontsize=size, loc=location, frameon=False, handlelength=1.8, labelspacing=0.35)
