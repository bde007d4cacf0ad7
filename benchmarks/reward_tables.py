"""Prints the tables of docs/rewards.md: what preprocessing makes of real photographs, and what rewards say of them.

    python benchmarks/reward_tables.py             both tables
    python benchmarks/reward_tables.py parity      differentiable preprocessing against the libraries' own on PIL
    python benchmarks/reward_tables.py scores      OCR, ImageNet class and nsfw scores of photographs and rendered text

Photographs are scikit-image's, text is drawn with PIL's own font.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewards import resolve
from rewards.builtin.geneval.detector import preprocess as owlv2_preprocess
from rewards.builtin.nsfw import VIT
from rewards.builtin.siglip_score import SIGLIP
from rewards.images.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from rewards.optional import require
from rewards.tools.table import table

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
Library = Callable[[Image.Image], Tensor]


def photograph(name: str) -> Image.Image:
    """One of scikit-image's."""
    return Image.fromarray(getattr(require("skimage.data", extra="dev", reward="the tables"), name)())


def tensor(picture: Image.Image) -> Tensor:
    """As `(1, 3, H, W)` in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def parity() -> str:
    """Mean and largest difference in grey levels of 255, over the photographs."""
    rows = []
    for label, ours, library, theirs, std in pairs():
        differences = torch.cat(
            [(ours(tensor(picture)) - theirs(picture)).flatten() for picture in map(photograph, PHOTOGRAPHS)]
        )
        levels = differences.abs() * 255 * std
        rows.append([label, library, f"{differences.abs().mean():.4f}", f"{levels.mean():.2f}", f"{levels.max():.1f}"])
    return table(["rewards", "library's own, on PIL pictures", "mean", "grey levels", "largest"], rows)


def pairs() -> list[tuple[str, Callable[[Tensor], Tensor], str, Library, float]]:
    """Rewards, our preprocessing, the library's name and function, and the mean divisor of its normalisation."""
    transformers = require("transformers", extra="", reward="the tables")
    open_clip = require("open_clip.transform", extra="open_clip", reward="the tables")
    clip, std = transformers.CLIPImageProcessor(), sum(CLIP_STD) / 3
    siglip = transformers.SiglipImageProcessor(size={"height": 384, "width": 384}, resample=3)
    vit = transformers.ViTImageProcessor()
    owlv2 = transformers.Owlv2ImageProcessor()
    transform = open_clip.image_transform(224, is_train=False, interpolation="bicubic")
    large = Preprocessing(size=(384, 384), fit=SIGLIP.fit, mean=SIGLIP.mean, std=SIGLIP.std)
    return [
        ("clip_score, aesthetic", Preprocessing(size=(224, 224)), "open_clip", lambda p: transform(p)[None], std),
        ("hpsv2", Preprocessing(size=(224, 224), fit="longest"), "PIL, as HPSv2 does", padded, std),
        ("pickscore, safety, geneval's colours", Preprocessing(size=(224, 224), offset="floor"),
         "transformers CLIPImageProcessor", processed(clip), std),
        ("siglip_score, aesthetic_v2_5", large, "transformers SiglipImageProcessor", processed(siglip), 0.5),
        ("nsfw_vit", VIT, "transformers ViTImageProcessor", processed(vit), 0.5),
        ("geneval", lambda images: owlv2_preprocess(images, 960), "transformers Owlv2ImageProcessor",
         processed(owlv2), std),
    ]  # fmt: skip


def processed(processor: Callable[..., dict[str, object]]) -> Library:
    """An image processor of transformers as a function of one picture."""
    return lambda picture: torch.as_tensor(np.asarray(processor(picture)["pixel_values"]))


def padded(picture: Image.Image) -> Tensor:
    """The longest side to 224 pixels, centred on black, normalised for CLIP."""
    scale = 224 / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    canvas = Image.new("RGB", (224, 224))
    small = picture.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(small, ((224 - width) // 2, (224 - height) // 2))
    return (tensor(canvas) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def scores() -> str:
    """Three tables."""
    return "\n\n".join([classes(), texts(), safety()])


def classes() -> str:
    """Log-probabilities and probabilities of ImageNet classes for photographs."""
    reward = resolve("imagenet_class")
    rows = []
    for name, label in (
        ("chelsea", "Egyptian cat"),
        ("chelsea", "tabby"),
        ("chelsea", "espresso"),
        ("coffee", "espresso"),
        ("coffee", "cup"),
        ("coffee", "Egyptian cat"),
        ("rocket", "missile"),
        ("astronaut", "espresso"),
    ):
        given = reward(tensor(photograph(name)), [f"a photo of {label}"], [{"label": label}])
        rows.append([name, label, f"{given.total.item():.2f}", f"{given.components['probability'].item():.4f}"])
    return table(["photograph", "asked for", "imagenet_class", "probability"], rows)


def texts() -> str:
    """OCR scores of drawn text, sharp and blurred, by both readers."""
    readers = [resolve("ocr", options={"engine": engine}) for engine in ("rapidocr", "tesseract")]
    rows = []
    for drawn, asked in (
        ("Hello World", "Hello World"),
        ("Hello Wurld", "Hello World"),
        ("Hello", "Hello World"),
        ("Goodbye", "Hello World"),
        ("", "Hello World"),
        ("Open 24 hours", "open 24 hours"),
        ("Grand Opening", "grand opening"),
    ):
        picture = tensor(draw(drawn))
        marks = [reader(picture, [f'a sign that says "{asked}"'], [{}]).total.item() for reader in readers]
        rows.append([repr(drawn), repr(asked), *(f"{mark:.3f}" for mark in marks)])
    return table(["drawn", "asked for", "ocr (rapidocr)", "ocr (tesseract)"], rows)


def safety() -> str:
    """Probability of safe by open_nsfw."""
    reward = resolve("nsfw")
    rows = [[name, f"{reward(tensor(photograph(name)), [''], [{}]).total.item():.4f}"] for name in PHOTOGRAPHS]
    return table(["photograph", "nsfw"], rows)


def draw(text: str) -> Image.Image:
    """Dark red on white, 320 x 96 pixels."""
    picture = Image.new("RGB", (320, 96), "white")
    ImageDraw.Draw(picture).text((20, 28), text, font=ImageFont.load_default(size=36), fill="darkred")
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("which", nargs="?", choices=["parity", "scores"], help="one of the two; both when left out")
    which = parser.parse_args(arguments).which
    print("\n\n".join(make() for name, make in (("parity", parity), ("scores", scores)) if which in (None, name)))


if __name__ == "__main__":
    main()
