"""A folder of pictures that were asked for, with a record of what each is: what `ddpo sample` leaves."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image
from torch import Tensor

from ddpo.pipeline.input_images import IMAGE, check_image
from ddpo.validation import UserError
from trainers.prompts import Prompt
from trainers.run_folder.ledger import replace_text
from trainers.tracking.pictures import to_pil

RECORD = "samples.json"


def check_new(output: Path | None) -> None:
    """Refuses a folder in which there is something.

    Raises:
        UserError: There is.
    """
    if output is not None and output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output: {output} exists already: choose another folder")


def numbered_folder(parent: Path, prompt: str) -> Path:
    """The next free number, with what the first prompt says."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    taken = [int(path.name[:4]) for path in parent.glob("[0-9]" * 4 + "*")] if parent.is_dir() else []
    return parent / f"{max(taken, default=0) + 1:04d}{'_' if words else ''}{words}"


def write_pictures(output: Path, images: Tensor, picture: Image, record: Mapping[str, object], *, name: str) -> Path:
    """Writes a folder that appears when it is complete.

    Args:
        output: The folder.
        images: (B, 3, H, W) in [0, 1], written as `000.png`, ...
        picture: What they are seen in together.
        record: Written as `samples.json`.
        name: File name of the picture.

    Returns:
        The picture.
    """
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for i, image in enumerate(images):
        to_pil(image).save(partial / f"{i:03d}.png")
    picture.save(partial / name)
    replace_text(partial / RECORD, json.dumps(record, indent=1) + "\n")
    if output.is_dir():
        output.rmdir()  # it is empty
    partial.rename(output)
    return output / name


def with_images(texts: Sequence[str], images: Sequence[Path]) -> list[Prompt]:
    """Prompts with the names of their input images, each of which is read once to check it.

    Raises:
        UserError: There are several images and not one for each prompt, or one cannot be read.
    """
    count = len(texts)
    if len(images) not in (0, 1, count):
        raise UserError(f"give one image for all {count} prompts or one for each, got {len(images)}")
    for image in images:
        check_image(image)
    each = [*images] * count if len(images) == 1 else images
    metadata: list[dict[str, object]] = [{IMAGE: str(image)} for image in each] if images else [{} for _ in texts]
    return [Prompt(text=text, metadata=entry) for text, entry in zip(texts, metadata, strict=True)]
