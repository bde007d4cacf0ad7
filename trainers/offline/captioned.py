"""A folder of images with captions: NAME.png (.jpg, .jpeg, .webp) beside NAME.txt."""

from pathlib import Path

from ddpo.validation import UserError
from trainers.prompts import Prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_captioned(folder: str | Path) -> list[tuple[Path, Prompt]]:
    """The images of a folder, in the order of their names, with their captions; an empty file is an empty caption.

    Raises:
        UserError: There is no such folder, it has no image, or an image has no caption.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"there is no folder {place} (looked for {place.absolute()})")
    images = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if not images:
        raise UserError(f"{place} has no image ({', '.join(SUFFIXES)})")
    entries = []
    for image in images:
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise UserError(f"{image} has no caption; write it into {text.name} beside it (empty for none)")
        try:
            entries.append((image, Prompt(text=text.read_text(encoding="utf-8").strip())))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{text} cannot be read as UTF-8: {error}") from error
    return entries
