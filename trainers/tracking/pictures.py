"""Pictures that answer at a glance what a run did: captioned grids, before and after, curves.

Images are tensors (B, 3, H, W) in [0, 1]. A tile shows its image at a whole multiple of its size (nearest neighbour, so
that a 32-pixel image stays what it is), at least `MIN_TILE` wide so that its caption can be read; large images shrink
to `MAX_TILE`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # the dashboard draws without waiting for torch to be imported
    from torch import Tensor

MIN_TILE = 144  # pixels
MAX_TILE = 384
MARGIN = 10
PAIR_MARGIN = 4
FONT_SIZE = 13
PROMPT_LINES = 3

PAPER, INK, GREY = (255, 255, 255), (25, 25, 25), (110, 110, 110)
BETTER, WORSE = (16, 125, 60), (190, 35, 35)

_BLUE, _MARKED = "#1f5fa8", 30  # of a curve, and points up to which each is marked
Colour = tuple[int, int, int]
Line = tuple[str, Colour]


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, evenly over `total`."""
    count = min(total, count)
    return [index * total // count for index in range(count)]


def to_pil(image: "Tensor") -> Image.Image:
    """One image (3, H, W) in [0, 1] as 8-bit RGB."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def enlarge(image: Image.Image, scale: int | None = None) -> Image.Image:
    """Brings an image to the size of a tile.

    Args:
        image: Any size.
        scale: Whole factor; None takes the smallest that makes it at least `MIN_TILE` wide, and shrinks an image
            wider or higher than `MAX_TILE`.
    """
    if scale is None and max(image.size) > MAX_TILE:
        factor = MAX_TILE / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        return image.resize(size, Image.Resampling.LANCZOS)
    scale = scale or max(1, math.ceil(MIN_TILE / image.width))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def caption(prompt: str, score: float, *, name: str = "reward") -> str:
    """The caption of a sample: its prompt and, on a line of its own, its score."""
    return f"{prompt}\n{name} {score:.3g}"


def grid(
    images: "Tensor | Sequence[Image.Image]",
    captions: Sequence[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Lays captioned images out in rows.

    Args:
        images: (B, 3, H, W) in [0, 1], or B pictures.
        captions: One per image. A first line too long for the tile is wrapped, and cut after three lines; lines after a
            newline (the score, see `caption`) are always shown.
        columns: Images in a row; None for a nearly square grid.
        scale: Whole enlargement factor; None to choose one (see `enlarge`).
    """
    assert len(images) == len(captions) > 0, f"{len(captions)} captions for {len(images)} images"
    drawn = [image if isinstance(image, Image.Image) else to_pil(image) for image in images]
    tiles = [captioned(image, text, scale=scale) for image, text in zip(drawn, captions, strict=True)]
    return _arrange(tiles, columns or math.ceil(math.sqrt(len(tiles))))


def captioned(image: Image.Image, text: str, *, scale: int | None = None) -> Image.Image:
    """One image with its caption drawn below it."""
    tile = enlarge(image, scale)
    return _stack(tile, _caption_lines(text, tile.width))


def with_inputs(images: "Tensor", inputs: Sequence[Image.Image] | None) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1], each with the image that was edited to its left, if there are any."""
    made = [to_pil(image) for image in images]
    if inputs is None:
        return made
    return [_arrange([enlarge(given), enlarge(image)], 2, margin=0) for given, image in zip(inputs, made, strict=True)]


def side_by_side(
    before: "Tensor",
    after: "Tensor",
    prompts: Sequence[str],
    scores_before: Sequence[float],
    scores_after: Sequence[float],
    *,
    columns: int | None = None,
    scale: int | None = None,
    inputs: Sequence[Image.Image] | None = None,
    names: tuple[str, str] = ("pretrained", "fine-tuned"),
) -> Image.Image:
    """Pairs of images from the same prompts and seeds: left the pretrained model's, right the fine-tuned one's.

    Args:
        before: (B, 3, H, W) in [0, 1].
        after: The same shape.
        prompts: One per pair, wrapped over the width of the pair.
        scores_before: One per pair; NaN for none.
        scores_after: One per pair; green where higher than before, red where lower.
        columns: Pairs in a row; None for about as wide as high.
        scale: Whole enlargement factor; None to choose one.
        inputs: The images that were edited, one per pair, shown left of it; None for none.
        names: What the two columns are headed; that of the images that were edited is `input`.
    """
    counts = {len(before), len(after), len(prompts), len(scores_before), len(scores_after)}
    assert len(counts) == 1 and 0 not in counts, f"the same number of everything is needed, at least 1, got {counts}"
    headers = names if inputs is None else ("input", *names)
    blocks = []
    for b, (prompt, old, new) in enumerate(zip(prompts, scores_before, scores_after, strict=True)):
        tiles: list[tuple[Image.Image, list[Line]]] = [
            (to_pil(before[b]), [(_number(old), GREY)]),
            (to_pil(after[b]), [(_number(new), _verdict(old, new))]),
        ]
        if inputs is not None:
            tiles.insert(0, (inputs[b], [("", GREY)]))
        pair = [_stack(enlarge(image, scale), lines) for image, lines in tiles]
        pair_image = _arrange(pair, len(pair), margin=PAIR_MARGIN)
        lines = [(line, INK) for line in _wrap(prompt, pair_image.width - 2 * PAIR_MARGIN, PROMPT_LINES)]
        blocks.append(_stack(pair_image, lines, above=True, indent=PAIR_MARGIN))
    columns = min(columns or max(1, math.ceil(math.sqrt(len(blocks) / 2))), len(blocks))
    body = _arrange(blocks, columns, margin=MARGIN * 2, bottom=True)
    return _with_headers(body, headers, columns=columns, margin=MARGIN * 2)


def save_curves(rows: Sequence[Mapping[str, object]], keys: Sequence[str], path: Path) -> Path:
    """Draws one small plot per key against the epoch and writes them as a PNG.

    Args:
        rows: As `read_metrics` returns them; rows without a key, or with null there, are skipped in its plot. `KEY_se`
            is the standard error of `KEY`, drawn as a bar.
        keys: Metrics to draw; those no row has are left out.
        path: The PNG to write.

    Raises:
        ValueError: No row has any of the keys; the message lists what there is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    series = {
        key: [(row["epoch"], row[key], row.get(f"{key}_se") or 0.0) for row in rows if row.get(key) is not None]
        for key in keys
    }
    series = {key: points for key, points in series.items() if points}
    if not series:
        known = sorted({key for row in rows for key in row})
        raise ValueError(
            f"none of {', '.join(keys)} is in the {len(rows)} rows of metrics, which hold {', '.join(known)}"
        )
    columns = min(3, len(series))
    height = math.ceil(len(series) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * height), layout="constrained", dpi=110)
    for index, (key, points) in enumerate(series.items(), start=1):
        axes = figure.add_subplot(height, columns, index, title=key, xlabel="epoch")
        epochs, values, errors = zip(*points, strict=True)
        marker = "o" if len(points) < _MARKED else ""
        axes.errorbar(
            epochs, values, errors if any(errors) else None, color=_BLUE, marker=marker, markersize=3, capsize=2
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
    return path


# --- drawing ----------------------------------------------------------------------------------------------------------


@cache
def _font(size: int = FONT_SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line_height() -> int:
    top, bottom = _font().getbbox("Ápg|")[1::2]
    return math.ceil(bottom - top) + 3


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Breaks text into lines no wider than `width` pixels; an ellipsis ends the last one when text is left over."""
    font = _font()
    lines = [""]
    for word in _pieces(text, width):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last}…"]


def _pieces(text: str, width: int) -> list[str]:
    """Words; one too long for a line is cut into parts that fit."""
    font, pieces = _font(), []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            fits = next(n for n in range(1, len(word)) if font.getlength(word[: n + 1]) > width)
            pieces.append(word[:fits])
            word = word[fits:]
        pieces.append(word)
    return pieces


def _caption_lines(text: str, width: int) -> list[Line]:
    prompt, *rest = text.split("\n")
    lines: list[Line] = [(line, INK) for line in _wrap(prompt, width, PROMPT_LINES)]
    return lines + [(_wrap(line, width, 1)[0], GREY) for line in rest]


def _number(score: float) -> str:
    return "" if math.isnan(score) else f"{score:.3g}"


def _verdict(old: float, new: float) -> Colour:
    if new == old or math.isnan(new):
        return GREY
    return BETTER if new > old else WORSE


def _stack(image: Image.Image, lines: Sequence[Line], *, above: bool = False, indent: int = 0) -> Image.Image:
    """An image with lines of text below (or above) it, left-aligned."""
    step = _line_height()
    band = step * len(lines) + 4
    canvas = Image.new("RGB", (image.width, image.height + band), PAPER)
    canvas.paste(image, (0, band if above else 0))
    draw = ImageDraw.Draw(canvas)
    start = 0 if above else image.height + 2
    for index, (line, colour) in enumerate(lines):
        draw.text((indent, start + index * step), line, fill=colour, font=_font())
    return canvas


def _arrange(tiles: Sequence[Image.Image], columns: int, *, margin: int = MARGIN, bottom: bool = False) -> Image.Image:
    """Tiles in rows, each as high as its highest tile, to whose top (or bottom) edge the others are aligned."""
    columns = min(columns, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = max(tile.width for tile in tiles)
    heights = [max(tile.height for tile in row) for row in rows]
    size = (columns * (width + margin) + margin, sum(heights) + margin * (len(rows) + 1))
    canvas = Image.new("RGB", size, PAPER)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for index, tile in enumerate(row):
            slack = height - tile.height if bottom else 0
            canvas.paste(tile, (margin + index * (width + margin), top + slack))
        top += height + margin
    return canvas


def _with_headers(body: Image.Image, headers: Sequence[str], *, columns: int, margin: int) -> Image.Image:
    """The column headers above every block of a `side_by_side` body."""
    font = _font(FONT_SIZE + 3)
    band = FONT_SIZE + 14
    canvas = Image.new("RGB", (body.width, body.height + band), PAPER)
    canvas.paste(body, (0, band))
    draw = ImageDraw.Draw(canvas)
    pair = (body.width - margin) // columns
    for column in range(columns):
        for side, header in enumerate(headers):
            centre = margin + column * pair + (pair - margin) * (1 + 2 * side) // (2 * len(headers))
            draw.text((centre, band), header, fill=INK, font=font, anchor="ms")
    return canvas
