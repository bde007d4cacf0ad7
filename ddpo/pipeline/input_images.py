"""Input images of pipelines that edit or follow a picture: read, brought to one size, told apart.

A prompt's metadata carries its images under the pipeline's own names of them (`image`, `control_image`, `mask_image`),
as files or PIL images. All images of a policy are cropped at the centre and resized to the size of the pictures that it
makes, since the rows of a batch share one grid of positions.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ddpo.validation import UserError

IMAGE = "image"
MASK = "mask_image"
INPUT_NAMES = (IMAGE, "control_image", MASK)
DEFAULT_SIDE = 1024  # pixels of a square picture, where the sampler does not say: what editing pipelines are trained on

MAX_PIXELS = 1 << 26  # 8192 x 8192: a small file can hold a huge flat picture

Source = str | Path | Image.Image
Inputs = Mapping[str, Image.Image]
"""The input images of one prompt by the pipeline's names of them."""


class InputImageError(UserError):
    """An input image cannot be used; the message names it."""


def read_image(source: object) -> Image.Image:
    """An input image as 8-bit RGB, turned upright, 16-bit grey brought to 8 bits, transparent pixels on white.

    Args:
        source: A file or a PIL image.

    Raises:
        InputImageError: It is neither, the file is missing or no image, or the image is too large.
    """
    if isinstance(source, Image.Image):
        _check_size(source, "an image")
        return _to_rgb(ImageOps.exif_transpose(source))
    if not isinstance(source, str | Path):
        raise InputImageError(f"an input image must be a file or a PIL image, got {type(source).__name__}")
    try:
        with Image.open(source) as opened:
            _check_size(opened, f"the image {source}")
            return _to_rgb(ImageOps.exif_transpose(opened))
    except InputImageError:
        raise
    except Image.DecompressionBombError as error:
        raise InputImageError(
            f"the image {source} is too large, at most {MAX_PIXELS} pixels are read; shrink it"
        ) from error
    except FileNotFoundError as error:
        raise InputImageError(f"there is no image {source} (looked for {Path(source).absolute()})") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:  # what PIL raises for damaged files
        raise InputImageError(f"the image {source} cannot be read: {error}") from error


def _check_size(image: Image.Image, what: str) -> None:
    """Refuses too many pixels before one of them is decoded: PIL decodes an opened file when it is first asked for."""
    if image.width * image.height > MAX_PIXELS:
        raise InputImageError(
            f"{what} of {image.width} x {image.height} pixels is too large, at most {MAX_PIXELS} are read; shrink it"
        )


def check_image(source: object) -> None:
    """Reads an input image to its end, a file only once in a process.

    Raises:
        InputImageError: As `read_image`.
    """
    if isinstance(source, str | Path):
        _check_file(Path(source))
    else:
        read_image(source)


@cache
def _check_file(path: Path) -> None:
    read_image(path)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of an image at `size` = (width, height), in pixels; nothing is stretched."""
    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def sources(metadata: Mapping[str, object]) -> dict[str, object]:
    """The input images that a prompt's metadata carries, as they are written there, by their names."""
    return {name: metadata[name] for name in INPUT_NAMES if name in metadata}


def first_input(metadata: Mapping[str, object]) -> object:
    """The input image that is shown beside a prompt's picture, as it is written; None for none."""
    return next(iter(sources(metadata).values()), None)


def identities(metadata: Mapping[str, object]) -> str:
    """What tells a prompt's input images from others; empty without one."""
    return ", ".join(
        identity(source) if name == IMAGE else f"{name}: {identity(source)}"
        for name, source in sources(metadata).items()
    )


def identity(source: object) -> str:
    """A text that is equal for equal images: the path of a file, what `read_image` makes of a PIL image."""
    if isinstance(source, Image.Image):
        image = read_image(source)
        content = hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()
        return f"{image.mode} {image.size} {content}"
    return str(source)


def rewards_metadata(metadata: Mapping[str, object], images: Inputs) -> dict[str, object]:
    """Metadata as rewards see it: `image` is what the pipeline was given, `image_path` the file it came from."""
    given = {name: source for name, source in sources(metadata).items() if name in images}
    paths = {f"{name}_path": str(source) for name, source in given.items() if not isinstance(source, Image.Image)}
    return {**metadata, **paths, **images}


def inputs_of(metadata: Sequence[Mapping[str, object]], size: tuple[int, int]) -> list[Image.Image] | None:
    """The first input image of each prompt at `size` = (width, height), to be shown; None where some come without."""
    found = [first_input(entry) for entry in metadata]
    return None if None in found else [fit(read_image(source), size) for source in found]


def probe_images(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Images to try a pipeline with: smooth, all different, the same on every machine.

    Args:
        count: How many.
        size: (width, height) in pixels.
    """
    width, height = size
    across = Image.linear_gradient("L").rotate(90).resize(size)
    down = Image.linear_gradient("L").resize(size)
    return [Image.merge("RGB", (across, down, Image.new("L", (width, height), 37 * i % 256))) for i in range(count)]


def probe_inputs(names: Sequence[str], count: int, size: tuple[int, int]) -> list[dict[str, Image.Image]]:
    """Such images for the inputs of so many prompts by their names, all but the first one mirrored."""
    images = probe_images(count, size)
    return [{name: ImageOps.mirror(image) if turn else image for turn, name in enumerate(names)} for image in images]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # PIL's own conversion cuts off at 255
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    ground = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(ground, layered).convert("RGB")
