"""Reads judged images: pairs of which one is better, or single ones that are liked or not.

A `.jsonl` source has one object a line, paths relative to the file; a file has one of these:

    {"prompt": "a red circle", "chosen": "003.png", "rejected": "017.png"}
    {"prompt": "a red circle", "a": "003.png", "b": "017.png", "label": 1}     as `ddpo rewards label` writes them
    {"prompt": "a red circle", "image": "003.png", "liked": true}

Any other source is a Hugging Face dataset in the columns of Pick-a-Pic: `caption`, `jpg_0`, `jpg_1`, `label_0` (1 where
the first is better, 0 where the second is, 0.5 for a tie) and, where there is one, `has_label`. Ties, and what was
skipped or has no label, are left out.

Each entry is a prompt whose metadata hold its images and their scores, 1 for the better or a liked one, else 0: so
that they are drawn, counted and recorded as prompts are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ddpo.pipeline.input_images import check_image
from ddpo.validation import UserError, check
from rewards.preferences.pairs import parse_pair
from rewards.preferences.pictures import parse_object
from trainers.offline.pictures import Cell, Judged, open_picture, size_of
from trainers.prompt_files import open_dataset
from trainers.prompts import Prompt, to_prompt

IMAGES, SCORES = "judged images", "scores"
SHOWN = 10
NEEDED = ("caption", "jpg_0", "jpg_1", "label_0")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig:
    """Images that were judged already, to learn from in place of samples.

    Attributes:
        source: A `.jsonl` file of pairs (`chosen` and `rejected`, or the labels of `ddpo rewards label`) or of single
            images (`image`, `liked`), or the name or folder of a Hugging Face dataset in the columns of Pick-a-Pic.
        split: Split of a dataset.
        limit: Take the first so many entries; null takes all.
        shuffle: Draw in a new random order on each pass, else in the order of the source.
        cache: Folder of the images' latents, which are encoded once; null takes `latents` in `run.output_dir`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str
    split: str = "train"
    limit: int | None = None
    shuffle: bool = True
    cache: str | None = None

    def __post_init__(self) -> None:
        check(bool(self.source.strip()), "source", self.source, "a .jsonl file, or a dataset's name or folder")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1 or null")
        check(self.cache is None or bool(self.cache.strip()), "cache", self.cache, "a folder or null")


class OfflineError(UserError):
    """Judged images cannot be used."""


def load_judged(config: OfflineConfig) -> list[Prompt]:
    """Reads all entries of a source, each of as many images, and every image of a file to its end.

    Raises:
        OfflineError: The source is missing, empty or malformed, or an image is missing or unreadable; the message names
            the line, at most ten of them.
    """
    if Path(config.source).suffix.lower() == ".jsonl":
        entries = list(_from_file(Path(config.source).expanduser()))
    else:
        entries = list(_from_dataset(config))
    if not entries:
        raise OfflineError(
            f"{config.source}: has nothing to learn from; ties, skipped and unlabelled pairs do not count"
        )
    first = len(images_of(entries[0]))
    odd = next((number for number, entry in enumerate(entries) if len(images_of(entry)) != first), None)
    if odd is not None:
        raise OfflineError(f"{config.source}: holds pairs and single images; put them into two files")
    return entries[: config.limit]


def images_of(entry: Prompt) -> Sequence[Judged]:
    """The images of an entry, two of a pair."""
    return entry.metadata[IMAGES]  # type: ignore[return-value]


def scores_of(entry: Prompt) -> Sequence[float]:
    """Their scores: 1 for the better or a liked one, else 0."""
    return entry.metadata[SCORES]  # type: ignore[return-value]


def count_cropped(entries: Sequence[Prompt], size: tuple[int, int]) -> tuple[int, int]:
    """How many image files have another size than (width, height), and how many files there are."""
    files = {image for entry in entries for image in images_of(entry) if isinstance(image, Path)}
    return sum(size_of(file) != size for file in files), len(files)


# ---- files -----------------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[Prompt]:
    if not path.is_file():
        raise OfflineError(f"{path}: no such file of pairs (looked for {path.absolute()})")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise OfflineError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    wrong: list[str] = []
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            entry = _judged(line, where, path.parent) if line.strip() else None
        except ValueError as error:
            text = str(error)
            wrong.append(text if text.startswith(where) else f"{where}: {text}")
            continue
        if entry is not None:
            yield entry
    if wrong:
        more = [f"{path}: {len(wrong) - SHOWN} more such lines"] if len(wrong) > SHOWN else []
        raise OfflineError("\n".join(wrong[:SHOWN] + more))


def _judged(line: str, where: str, folder: Path) -> Prompt | None:
    """The entry of a line; None for a tie or a skipped pair."""
    images: Sequence[Path]
    scores: Sequence[float]
    entry = parse_object(line, wanted='an object such as {"prompt": "a cat", "chosen": "1.png", "rejected": "2.png"}')
    if "a" in entry or "b" in entry:
        pair = parse_pair(line, folder=folder, labelled=True)
        if pair is None or pair.label is None or pair.label == 0.5:
            return None
        images, scores = (pair.a, pair.b), (pair.label, 1 - pair.label)
    elif "image" in entry:
        if not isinstance(entry.get("liked"), bool):
            raise OfflineError(f"'liked' must be true or false, got {entry.get('liked')!r}")
        images, scores = (_file(entry, "image", folder),), (float(entry["liked"] is True),)
    else:
        images, scores = (_file(entry, "chosen", folder), _file(entry, "rejected", folder)), (1.0, 0.0)
    for image in images:
        check_image(image)
    return _entry(entry.get("prompt"), images, scores, where)


def _file(entry: Mapping[str, object], key: str, folder: Path) -> Path:
    value = entry.get(key)
    if not isinstance(value, str) or not value:
        raise OfflineError(f"{key!r} must be the path of a picture, got {value!r}")
    return (folder / Path(value).expanduser()).absolute()


def _entry(text: object, images: Sequence[Judged], scores: Sequence[float], where: str) -> Prompt:
    prompt = to_prompt({"prompt": text}, where=where)
    return Prompt(text=prompt.text, metadata={IMAGES: tuple(images), SCORES: tuple(scores)})


# ---- datasets --------------------------------------------------------------------------------------------------------


def _from_dataset(config: OfflineConfig) -> Iterator[Prompt]:
    name = config.source
    others, nor = " (or give a .jsonl file)", ", nor is it .jsonl"
    data = open_dataset(name, config.split, others=others, error=OfflineError, nor=nor)
    missing = [column for column in NEEDED if column not in data.column_names]
    if missing:
        raise OfflineError(
            f"{name}: has no column {', '.join(missing)}, as Pick-a-Pic has; columns: {', '.join(data.column_names)}"
        )
    known = [column for column in ("caption", "label_0", "has_label") if column in data.column_names]
    checked = False
    for row, entry in enumerate(data.select_columns(known)):
        label = entry["label_0"]
        if entry.get("has_label") is False or label is None or label == 0.5:
            continue
        if label not in (0, 1):
            raise OfflineError(f"{name}: row {row}: 'label_0' must be 1, 0 or 0.5 (a tie), got {label!r}")
        cells = tuple(Cell(data=data, row=row, column=column) for column in ("jpg_0", "jpg_1"))
        if not checked:  # all would take as long as encoding them; one that is broken later ends the run with its row
            for cell in cells:
                open_picture(cell)
            checked = True
        yield _entry(entry["caption"], cells, (float(label), 1.0 - float(label)), f"{name}: row {row}")
