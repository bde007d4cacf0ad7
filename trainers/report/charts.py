"""Charts as SVG texts: lines with bands, and heat maps. No script, no style of their own, all texts escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from trainers.report.marks import embedded

_WIDTH, _HEIGHT = 420.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 10.0, 10.0, 34.0  # of the plot, from the picture's edges
_DOTS = 30  # points up to which each is marked
_MOST = 400  # points of a line; more are averaged

Band = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve.

    Attributes:
        label: Whose it is.
        colour: Of it.
        x: Rising, or any order for a path.
        y: As many; NaN where nothing is.
        bands: Lower and upper ends of what is shaded around it, the widest first.
    """

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    bands: Sequence[Band] = ()

    @classmethod
    def with_errors(
        cls, *, label: str, colour: str, x: Sequence[float], y: Sequence[float], errors: Sequence[float]
    ) -> "Line":
        """A curve and one standard error to either side; an error of NaN counts as none."""
        sizes = np.nan_to_num(np.asarray(errors, dtype=np.float64))
        band = ((np.asarray(y) - sizes).tolist(), (np.asarray(y) + sizes).tolist())
        return cls(label=label, colour=colour, x=x, y=y, bands=[band] if sizes.any() else [])


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Where a value lies in the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def line_chart(lines: Sequence[Line], *, title: str, x_label: str = "epoch", whole: bool = True) -> str:
    """A titled figure; nothing where there is no finite point.

    Args:
        lines: The curves.
        title: Above it.
        x_label: Below it.
        whole: Whether x is counted in whole numbers.
    """
    lines = [_thinned(line) for line in lines]
    xs = _finite(*(line.x for line in lines))
    ys = _finite(*(line.y for line in lines), *(end for line in lines for band in line.bands for end in band))
    if not len(xs) or not len(ys):
        return ""
    across = _scale(xs, _LEFT, _WIDTH - _RIGHT, margin=0.02)
    up = _scale(ys, _HEIGHT - _BOTTOM, _TOP, margin=0.06)
    parts = [_grid(across, up, x_label, whole=whole), *(_drawn(line, across, up) for line in lines)]
    picture = (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{picture}</figure>'


def _finite(*series: Sequence[float]) -> NDArray[np.float64]:
    joined = np.concatenate([np.asarray(one, dtype=np.float64) for one in series]) if series else np.empty(0)
    return joined[np.isfinite(joined)]


def _thinned(line: Line) -> Line:
    """A long curve by the means of its stretches."""
    count = len(line.x)
    if count <= _MOST:
        return line
    edges = np.linspace(0, count, _MOST + 1).astype(int)[:-1]
    sizes = np.diff([*edges, count])

    def means(values: Sequence[float]) -> list[float]:
        return (np.add.reduceat(np.asarray(values, dtype=np.float64), edges) / sizes).tolist()

    bands = [(means(low), means(high)) for low, high in line.bands]
    return Line(label=line.label, colour=line.colour, x=means(line.x), y=means(line.y), bands=bands)


def _scale(values: NDArray[np.float64], start: float, end: float, *, margin: float) -> _Scale:
    low, high = float(values.min()), float(values.max())
    room = margin * (high - low) or 0.5 * abs(low) or 0.5
    return _Scale(low=low - room, high=high + room, start=start, end=end)


def _ticks(scale: _Scale, count: int, *, whole: bool = False) -> list[float]:
    places = MaxNLocator(count, integer=whole).tick_values(scale.low, scale.high)
    return [float(place) for place in places if scale.low <= place <= scale.high]


def _grid(across: _Scale, up: _Scale, x_label: str, *, whole: bool) -> str:
    """Lines and numbers of both axes."""
    parts = []
    for value in _ticks(up, 4):
        y = up(value)
        parts.append(f'<path class="rule" d="M{_LEFT:g} {y:.1f}H{_WIDTH - _RIGHT:g}"/>')
        parts.append(f'<text x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    floor = _HEIGHT - _BOTTOM
    for value in _ticks(across, 6, whole=whole):
        parts.append(f'<text x="{across(value):.1f}" y="{floor + 15:g}" text-anchor="middle">{value:.4g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{_HEIGHT - 4:g}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _drawn(line: Line, across: _Scale, up: _Scale) -> str:
    """Bands, curve, and dots where there are few."""
    bands = "".join(_band(line, band, across, up) for band in line.bands)
    points = [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points if len(points) <= _DOTS)
    curve = f'<polyline points="{path}" fill="none" stroke="{line.colour}"/>'
    return f'<g fill="{line.colour}"><title>{escape(line.label)}</title>{bands}{curve}{dots}</g>'


def _band(line: Line, band: Band, across: _Scale, up: _Scale) -> str:
    sides = [(x, low, high) for x, low, high in zip(line.x, *band, strict=True) if math.isfinite(low + high)]
    around = [*((x, high) for x, _, high in sides), *((x, low) for x, low, _ in reversed(sides))]
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in around)
    return f'<polygon points="{path}" opacity=".16"/>'


def heat_map(values: NDArray[np.float64], *, title: str, epochs: tuple[float, float], span: tuple[float, float]) -> str:
    """A number at each of T steps in each of N epochs, a pixel each.

    Args:
        values: (T, N), the first step at the top; NaN where nothing is.
        title: Above it.
        epochs: The first and the last one.
        span: What the darkest and the brightest colour stand for.
    """
    low, high = span
    shares = (values - low) / (high - low if high > low else 1.0)
    colours = mpl.colormaps["viridis"](np.clip(np.nan_to_num(shares), 0, 1), bytes=True)
    colours[~np.isfinite(values)] = (225, 225, 225, 255)
    source = embedded(Image.fromarray(colours[:, :, :3]), lossless=True)
    legend = f"step 0 (top) to {len(values) - 1}, epoch {epochs[0]:g} to {epochs[1]:g}"
    key = f'<span class="key">{low:.3g}<i></i>{high:.3g}</span>'
    return (
        f'<figure class="chart heat"><figcaption>{escape(title)}</figcaption>'
        f'<img src="{source}" alt="{escape(title)} by step and epoch"><div>{legend}{key}</div></figure>'
    )
