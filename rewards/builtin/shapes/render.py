"""Draws scenes: 32 x 32 pixels, anti-aliased, on a greyish background that the caption does not mention.

A pixel's coverage by a shape is `clip(1/2 - d, 0, 1)` with `d` the signed distance (pixels, negative inside) of its
centre to the outline. Positions are uniform without overlap; sizes shrink with the number of objects. The background
is plain, striped or checked, so that a reward on the file size or the texture has something free to change.
"""

from collections.abc import Callable

import numpy as np

from rewards.builtin.shapes.scene import COLORS, Scene

SIZE = 32
PALETTE = np.array(
    [
        [0.87, 0.13, 0.15],
        [0.95, 0.83, 0.10],
        [0.13, 0.68, 0.25],
        [0.12, 0.76, 0.84],
        [0.15, 0.25, 0.90],
        [0.78, 0.18, 0.80],
    ],
    dtype=np.float32,
)
"""(6, 3) RGB in [0, 1], in the order of `COLORS`; neighbouring hues are at least 45 degrees apart."""

_RADII = {1: (6.0, 9.0), 2: (5.5, 7.5), 3: (5.0, 6.5), 4: (4.8, 6.0)}
_GAP = 2.0
_MARGIN = 0.5
_BLOCK = 4  # pixels; the stride of the autoencoder, so that stripes cost the denoiser little
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5
_AXES = {"above": (1, -1), "below": (1, 1), "left of": (0, -1), "right of": (0, 1)}

Distance = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def _circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - 0.95 * radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    side = 0.874 * np.abs(x) - 0.485 * (y + radius)
    return np.maximum(side, y - 0.8 * radius)


def _cross(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.32 * radius, np.maximum(x, y) - radius)


DISTANCES: dict[str, Distance] = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def coverage(shape: str, *, center: tuple[float, float], radius: float) -> np.ndarray:
    """Returns how much of each pixel a shape covers.

    Args:
        shape: A key of `DISTANCES`.
        center: (x, y) in pixels from the upper left corner.
        radius: Half the extent of the shape, in pixels.

    Returns:
        (32, 32) float32 in [0, 1].
    """
    return np.clip(0.5 - DISTANCES[shape](_COLUMNS - center[0], _ROWS - center[1], radius), 0, 1)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene at random positions and sizes, on a random background.

    Args:
        scene: What to draw.
        rng: Source of randomness.

    Returns:
        (3, 32, 32) float32 RGB in [0, 1].
    """
    image = background(rng)
    centers, radii = _place(scene, rng)
    objects = [group for group in scene.groups for _ in range(group.count)]
    for group, center, radius in zip(objects, centers, radii, strict=True):
        index = rng.integers(len(COLORS)) if group.color is None else COLORS.index(group.color)
        color = np.clip(PALETTE[index] + rng.uniform(-0.04, 0.04), 0, 1).astype(np.float32)
        alpha = coverage(group.shape, center=(center[0], center[1]), radius=radius)
        image += alpha * (color[:, None, None] - image)
    return image


def background(rng: np.random.Generator) -> np.ndarray:
    """Draws a plain, striped or checked background of low saturation.

    Args:
        rng: Source of randomness.

    Returns:
        (3, 32, 32) float32 RGB in [0, 1].
    """
    base = rng.uniform(0.3, 0.85) + rng.uniform(-0.025, 0.025, size=3)
    contrast = rng.uniform(0.06, 0.16)
    columns, rows = np.floor(_COLUMNS / _BLOCK) % 2, np.floor(_ROWS / _BLOCK) % 2
    patterns = (np.zeros_like(rows), columns, rows, np.abs(columns - rows))
    pattern = patterns[rng.choice(4, p=(0.55, 0.15, 0.15, 0.15))]
    image = base[:, None, None] + contrast * (pattern - 0.5)
    return np.clip(image, 0, 1).astype(np.float32)


def _place(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws centres (n, 2) and radii (n,) in pixels, by rejection, with slowly shrinking radii."""
    num = scene.num_objects
    low, high = _RADII[num]
    above_diagonal = np.triu_indices(num, 1)
    while True:
        radii = rng.uniform(low, high, size=(64, num))
        reach = radii + _MARGIN
        centers = reach[..., None] + rng.random((64, num, 2)) * (SIZE - 2 * reach)[..., None]
        offsets = centers[:, :, None] - centers[:, None]
        free = np.hypot(offsets[..., 0], offsets[..., 1]) - radii[:, :, None] - radii[:, None] - _GAP
        fits = (free[:, *above_diagonal] > 0).all(axis=1)
        if scene.relation is not None:
            axis, sign = _AXES[scene.relation]
            along, across = sign * offsets[:, 0, 1, axis], np.abs(offsets[:, 0, 1, 1 - axis])
            fits &= along > np.maximum(8.0, across)
        if fits.any():
            first = int(np.argmax(fits))
            return centers[first], radii[first]
        high = max(low, 0.98 * high)
