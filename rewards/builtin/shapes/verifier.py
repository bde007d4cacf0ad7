"""Checks pictures of shapes against their captions, in the manner of GenEval (Ghosh et al. 2023), without a network.

    1. A pixel belongs to an object where its chroma exceeds a threshold, and has the color of the nearest hue.
    2. Objects are the 4-connected components of each color; specks of fewer than `_MIN_PIXELS` are ignored.
    3. A component's shape is the template of largest intersection over union with its mask, stretched to 12 x 12.
    4. Objects are matched to those that the caption asks for; a relation is read from the centres.

`strict` asks for everything and nothing besides. `partial` is the mean credit of the matched objects, where missing and
extra objects count as zero, and of the relation; it is 1 exactly where `strict` is.

Axes: `B` images, `n` found objects, `m` wanted objects.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from rewards.builtin.shapes.render import PALETTE, SIZE, coverage
from rewards.builtin.shapes.scene import COLORS, SHAPES, Group, Scene, category, parse

_MIN_CHROMA = 0.36
_MIN_PIXELS = 10
_MIN_IOU = 0.6
_GRID = 12
_RELATION_WEIGHT = 0.25
_MIN_OFFSET = 4.0
_AXES = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found about each picture.

    Attributes:
        strict: (B,) float32, 1 where the picture shows what the caption says and nothing else, else 0.
        partial: (B,) float32 in [0, 1], the share of the requirements that is met.
        categories: B categories of the captions, as in `rewards.builtin.shapes.scene.CATEGORIES`.
    """

    strict: np.ndarray
    partial: np.ndarray
    categories: list[str]

    def accuracies(self) -> dict[str, float]:
        """Returns the mean of `strict` in each category that occurs."""
        names = np.array(self.categories)
        return {name: float(self.strict[names == name].mean()) for name in sorted(set(self.categories))}


@dataclass(frozen=True, kw_only=True)
class Found:
    """The objects of one picture.

    Attributes:
        colors: (n,) index into `COLORS`.
        overlaps: (n, 4) intersection over union with the template of each of `SHAPES`.
        centers: (n, 2) row and column of the middle of the bounding box, in pixels of the 32 x 32 picture.
    """

    colors: np.ndarray
    overlaps: np.ndarray
    centers: np.ndarray

    @property
    def shapes(self) -> np.ndarray:
        """(n,) index into `SHAPES`, -1 where no template overlaps enough."""
        if not len(self.overlaps):
            return np.zeros(0, int)
        return np.where(self.overlaps.max(1) >= _MIN_IOU, self.overlaps.argmax(1), -1)


def verify(images: ArrayLike, prompts: list[str]) -> Verdict:
    """Checks a batch of pictures.

    Args:
        images: (B, 3, H, W) RGB in [0, 1], H and W multiples of 32; larger pictures are averaged down to 32 x 32.
        prompts: B captions of the grammar of `rewards.builtin.shapes.scene`.

    Returns:
        The verdict.

    Raises:
        ValueError: If the pictures have another shape or a prompt is no caption.
    """
    pictures = _downscale(np.asarray(images, dtype=np.float32))
    if len(pictures) != len(prompts):
        raise ValueError(f"Got {len(pictures)} images and {len(prompts)} prompts: give one prompt an image.")
    scenes = [parse(prompt) for prompt in prompts]
    labels = _label_colors(pictures)
    partial = np.array([score(detect(label), scene) for label, scene in zip(labels, scenes, strict=True)], np.float32)
    strict = (partial == 1).astype(np.float32)
    return Verdict(strict=strict, partial=partial, categories=[category(scene) for scene in scenes])


def _downscale(images: np.ndarray) -> np.ndarray:
    """Averages (B, 3, 32 h, 32 w) to (B, 3, 32, 32)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % SIZE or images.shape[3] % SIZE or not images.size:
        raise ValueError(f"Images have shape {images.shape}: give (B, 3, H, W) with H and W multiples of {SIZE}.")
    blocks = images.reshape(len(images), 3, SIZE, images.shape[2] // SIZE, SIZE, images.shape[3] // SIZE)
    return blocks.mean(axis=(3, 5))


def _chroma(rgb: np.ndarray) -> np.ndarray:
    """Returns the point of the hue plane as a complex number; its modulus is the chroma. (..., 3) to (...)."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return red - (green + blue) / 2 + 1j * np.sqrt(0.75) * (green - blue)


def _label_colors(images: np.ndarray) -> np.ndarray:
    """Labels each pixel with 1 + the index of its color, or 0: (B, 3, 32, 32) to (B, 32, 32) int."""
    chroma = _chroma(np.moveaxis(images, 1, -1))
    hues = _chroma(PALETTE)
    hues = hues / np.abs(hues)
    alignment = chroma.real[..., None] * hues.real + chroma.imag[..., None] * hues.imag
    return np.where(np.abs(chroma) > _MIN_CHROMA, 1 + alignment.argmax(-1), 0)


def detect(labels: np.ndarray) -> Found:
    """Finds the objects of one picture.

    Args:
        labels: (32, 32) integers, 0 for the background, else 1 + the index of a color.

    Returns:
        The objects.
    """
    from scipy import ndimage

    colors, masks, centers = [], [], []
    for color in np.unique(labels[labels > 0]):
        components, _ = ndimage.label(labels == color)
        sizes = np.bincount(components.ravel())
        for index, box in enumerate(ndimage.find_objects(components), start=1):
            if sizes[index] < _MIN_PIXELS:
                continue
            colors.append(color - 1)
            masks.append(_stretch(components[box] == index))
            centers.append([(side.start + side.stop - 1) / 2 for side in box])
    overlaps = _overlaps(np.array(masks).reshape(-1, 1, _GRID, _GRID), _templates())
    return Found(colors=np.array(colors, int), overlaps=overlaps, centers=np.array(centers).reshape(-1, 2))


def _stretch(mask: np.ndarray) -> np.ndarray:
    """Samples a mask of any size on a 12 x 12 grid, linearly between pixels."""
    return _weights(mask.shape[0]) @ mask @ _weights(mask.shape[1]).T


@cache
def _weights(size: int) -> np.ndarray:
    """Returns the (12, size) matrix that averages `size` pixels into 12 cells of equal length."""
    edges = np.arange(_GRID + 1) * size / _GRID
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * _GRID / size


def _overlaps(masks: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Returns the soft intersection over union of (n, 1, 12, 12) masks with (4, 12, 12) templates: (n, 4)."""
    return np.minimum(masks, templates).sum((2, 3)) / np.maximum(masks, templates).sum((2, 3))


@cache
def _templates() -> np.ndarray:
    """Returns the mean stretched mask of each shape over renders of many sizes and sub-pixel positions: (4, 12, 12)."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    templates = np.zeros((len(SHAPES), _GRID, _GRID))
    num = 64
    for index, shape in enumerate(SHAPES):
        for _ in range(num):
            x, y = SIZE / 2 + rng.random(2)
            mask = coverage(shape, center=(x, y), radius=rng.uniform(4.8, 8.0)) > 0.4
            templates[index] += _stretch(mask[ndimage.find_objects(mask.astype(int))[0]]) / num
    return templates


def score(found: Found, scene: Scene) -> float:
    """Returns the share of a scene's requirements that the found objects meet.

    Args:
        found: What is in the picture.
        scene: What should be.

    Returns:
        A number in [0, 1], 1 only where everything is met and nothing is extra.
    """
    from scipy.optimize import linear_sum_assignment

    credit = np.concatenate([np.repeat(_credit(found, group)[None], group.count, 0) for group in scene.groups])
    rows, columns = linear_sum_assignment(credit, maximize=True)
    objects = credit[rows, columns].sum() / max(credit.shape)
    if scene.relation is None:
        return float(objects)
    relation = 0.0
    if len(columns) == 2:
        relation = _relation_credit(found.centers[columns[0]] - found.centers[columns[1]], scene.relation)
    return float((1 - _RELATION_WEIGHT) * objects + _RELATION_WEIGHT * relation)


def _credit(found: Found, group: Group) -> np.ndarray:
    """Returns (n,) what each object is worth as one of a group: half for the color, half for the shape."""
    shape = SHAPES.index(group.shape)
    sharpened = np.exp((found.overlaps - found.overlaps.max(1, keepdims=True, initial=0)) / 0.1)
    likeness = sharpened[:, shape] / sharpened.sum(1)
    shape_credit = np.where(found.shapes == shape, 1.0, np.minimum(likeness, 0.5))
    color_credit = np.ones(len(found.colors)) if group.color is None else found.colors == COLORS.index(group.color)
    return (color_credit + shape_credit) / 2


def _relation_credit(offset: np.ndarray, relation: str) -> float:
    """Returns 1 where the first object lies as asked, less where it does only somewhat.

    As in GenEval, the offset must exceed a minimum and point within 60 degrees of the direction, so that a diagonal
    arrangement satisfies two relations.

    Args:
        offset: (2,) rows and columns from the second object to the first, in pixels.
        relation: One of `RELATIONS`.
    """
    axis, sign = _AXES[relation]
    along, distance = sign * offset[axis], np.hypot(*offset)
    if along >= _MIN_OFFSET and along >= 0.5 * distance:
        return 1.0
    return float(np.clip(0.5 + along / (2 * SIZE), 0, 0.9))
