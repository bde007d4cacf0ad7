"""Pictures with known answers, for trying rewards out: photographs, text, noise, flat colours, and what spoils them.

Two photographs of 128 x 128 pixels come with the package, cat.png (Stefan van der Walt) and coffee.png (Rachel
Michetti), both CC0, cut from scikit-image's collection. The rest is computed from them or drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from rewards.base import Metadata
from rewards.builtin.shapes.render import SIZE as SHAPES_SIZE
from rewards.builtin.shapes.render import render
from rewards.builtin.shapes.scene import parse

SIZE = 128
PROMPT = 'a photo of an Egyptian cat next to a sign that says "open"'
_FOLDER = Path(__file__).with_name("pictures")
_FRAMES = 9


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """A pair of samples of which one must score higher.

    Attributes:
        better: Name of the sample that must score higher.
        worse: Name of the other.
        prompt: Of both.
        others: Further samples of the group, for rewards that compare the images of a group.
    """

    better: str
    worse: str
    prompt: str = PROMPT
    others: tuple[str, ...] = ()


_CAT = "a photo of an Egyptian cat"
_COFFEE = "a photo of an espresso"
_MATCHING = (
    Ordering(better="cat", worse="coffee", prompt=_CAT),
    Ordering(better="coffee", worse="cat", prompt=_COFFEE),
    Ordering(better="cat", worse="noise", prompt=_CAT),
)
_PREFERRED = (*_MATCHING, Ordering(better="cat", worse="cat_jpeg", prompt=_CAT))
_PRETTY = (Ordering(better="coffee", worse="noise"), Ordering(better="cat", worse="cat_jpeg"))
_SHAPES = (
    Ordering(better="circle", worse="flat", prompt="a red circle"),
    Ordering(better="circle", worse="blue_square", prompt="a red circle"),
    Ordering(better="blue_square", worse="circle", prompt="a blue square"),
)

ORDERINGS: dict[str, tuple[Ordering, ...]] = {
    "jpeg_compressibility": (Ordering(better="flat", worse="cat"), Ordering(better="cat", worse="noise")),
    "jpeg_incompressibility": (Ordering(better="cat", worse="flat"), Ordering(better="noise", worse="cat")),
    "jpeg_estimate": (Ordering(better="flat", worse="cat"), Ordering(better="cat", worse="noise")),
    "brightness": (Ordering(better="white", worse="cat"), Ordering(better="cat", worse="black")),
    "redness": (Ordering(better="red", worse="cat"), Ordering(better="flat", worse="blue")),
    "greenness": (Ordering(better="green", worse="cat"), Ordering(better="flat", worse="red")),
    "blueness": (Ordering(better="blue", worse="cat"), Ordering(better="flat", worse="red")),
    "sharpness": (
        Ordering(better="cat", worse="cat_blurred"),
        Ordering(better="noise", worse="cat"),
        Ordering(better="cat_blurred", worse="flat"),
    ),
    "colourfulness": (Ordering(better="cat", worse="cat_grey"), Ordering(better="coffee", worse="flat")),
    "entropy": (Ordering(better="cat", worse="text"), Ordering(better="text", worse="flat")),
    "symmetry": (Ordering(better="cat_mirrored", worse="cat"), Ordering(better="cat", worse="noise")),
    "ocr": (
        Ordering(better="text", worse="cat"),
        Ordering(better="text", worse="text_wrong"),
        Ordering(better="text_wrong", worse="text", prompt='a sign that says "shut"'),
    ),
    "imagenet_class": (*_MATCHING, Ordering(better="cat", worse="cat_blurred", prompt=_CAT)),
    "diversity": (
        Ordering(better="noise", worse="cat", others=("cat_jpeg", "cat_blurred")),
        Ordering(better="coffee", worse="cat", others=("cat_jpeg", "cat_blurred")),
    ),
    "clip_score": _MATCHING,
    "siglip_score": _MATCHING,
    "hpsv2": _PREFERRED,
    "pickscore": _PREFERRED,
    "imagereward": _PREFERRED,
    "safety": (),
    "safety_margin": (),
    "nsfw": (Ordering(better="cat", worse="cat_jpeg"), Ordering(better="coffee", worse="flat")),
    "nsfw_vit": (),
    "geneval": (Ordering(better="cat", worse="coffee"), Ordering(better="cat", worse="noise")),
    "vlm_judge": _MATCHING,
    "aesthetic": _PRETTY,
    "aesthetic_v2_5": _PRETTY,
    "shapes": _SHAPES,
    "shapes_strict": _SHAPES,
    "shapes_partial": _SHAPES,
    "motion_smoothness": (Ordering(better="flat", worse="cat"), Ordering(better="cat", worse="noise")),
}
METADATA: dict[str, Metadata] = {"geneval": {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}}
PROMPTS = dict.fromkeys(("shapes", "shapes_strict", "shapes_partial"), "a red circle")


def sample(name: str) -> Tensor:
    """A picture `(1, 3, 128, 128)` in [0, 1], multiples of 1/255.

    Raises:
        ValueError: There is no sample of that name.
    """
    if name not in _MAKERS:
        raise ValueError(f"there is no sample {name!r}; known: {', '.join(_MAKERS)}")
    pixels = np.asarray(_MAKERS[name]().convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def shot(name: str) -> Tensor:
    """A video `(1, 9, 3, 128, 128)` of that picture, which moves to the right by two pixels a frame, and round."""
    picture = sample(name)
    return torch.stack([picture.roll(2 * frame, dims=-1) for frame in range(_FRAMES)], dim=1)


def sample_names() -> tuple[str, ...]:
    """Names that `sample` takes."""
    return tuple(_MAKERS)


def _photograph(name: str) -> Image.Image:
    with Image.open(_FOLDER / f"{name}.png") as picture:
        return picture.convert("RGB")


def _cat() -> Image.Image:
    return _photograph("cat")


def _jpeg() -> Image.Image:
    buffer = BytesIO()
    _cat().save(buffer, format="JPEG", quality=3)
    return Image.open(buffer)


def _mirrored() -> Image.Image:
    pixels = np.asarray(_cat()).copy()
    pixels[:, SIZE // 2 :] = pixels[:, : SIZE // 2][:, ::-1]
    return Image.fromarray(pixels)


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def _text(words: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((SIZE / 2, SIZE / 2), words, font=ImageFont.load_default(size=36), fill="black", anchor="mm")
    return picture


def _shapes(text: str) -> Image.Image:
    pixels = render(parse(text), np.random.default_rng(0)).transpose(1, 2, 0)  # (32, 32, 3)
    enlarged = pixels.repeat(SIZE // SHAPES_SIZE, axis=0).repeat(SIZE // SHAPES_SIZE, axis=1)
    return Image.fromarray((enlarged * 255).round().clip(0, 255).astype(np.uint8))


def _flat(color: str) -> Callable[[], Image.Image]:
    return lambda: Image.new("RGB", (SIZE, SIZE), color)


_MAKERS: dict[str, Callable[[], Image.Image]] = {
    "cat": _cat,
    "coffee": lambda: _photograph("coffee"),
    "cat_blurred": lambda: _cat().filter(ImageFilter.GaussianBlur(3)),
    "cat_jpeg": _jpeg,
    "cat_grey": lambda: _cat().convert("L"),
    "cat_mirrored": _mirrored,
    "noise": _noise,
    "text": lambda: _text("open"),
    "text_wrong": lambda: _text("shut"),
    "circle": lambda: _shapes("a red circle"),
    "blue_square": lambda: _shapes("a blue square"),
    "flat": _flat("rgb(128,128,128)"),
    "white": _flat("white"),
    "black": _flat("black"),
    "red": _flat("rgb(255,0,0)"),
    "green": _flat("rgb(0,255,0)"),
    "blue": _flat("rgb(0,0,255)"),
}
