"""The page's small parts: escaped texts, tables, pictures in the page itself."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07c00", "#56b4e9", "#444444", "#999999")
"""Of runs, told apart by the colour-blind too (Okabe and Ito)."""
_LARGEST, _SMALL = 256, 96  # pixels of a picture; below the second one it is kept as it is


def colour(index: int) -> str:
    """A run's."""
    return COLOURS[index % len(COLOURS)]


def number(value: object, digits: int = 4) -> str:
    """A number, or a dash where there is none."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}"


def section(title: str, *parts: str) -> str:
    """A headed part of the page; nothing where it has no content."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def folded(title: str, body: str) -> str:
    """What opens on a click; nothing without content."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def paragraph(text: str, kind: str = "note") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Cells are plain texts; those of the first column head their rows."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def run_label(name: str, index: int) -> str:
    """A run's name with its colour."""
    return f'<span class="run"><i style="background:{colour(index)}"></i>{escape(name)}</span>'


def embedded(image: Image.Image, *, lossless: bool) -> str:
    """An image as an address that holds it."""
    file = io.BytesIO()
    if lossless:
        image.save(file, format="png", optimize=True)
    else:
        image.save(file, format="jpeg", quality=88)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: Image.Image) -> str:
    """A sample, small ones pixel by pixel, large ones shrunk."""
    small = max(image.size) <= _SMALL
    if not small:
        image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    source = embedded(image, lossless=small)
    return f'<img src="{source}" width="{image.width}" height="{image.height}" alt=""{" class=tiny" if small else ""}>'
