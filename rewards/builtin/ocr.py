"""Whether a picture shows the text that its prompt quotes, as in Flow-GRPO (Liu et al. 2025, arXiv:2505.05470).

    score = 1 - min(d, n) / n

n is the length of the wanted text, d its edit distance to everything that was read, in reading order, both without
spaces and in lower case; d = 0 when the wanted text occurs in what was read. The wanted text is the first one in
quotation marks in the prompt, or `metadata["text"]`.

Flow-GRPO reads with PaddleOCR; rapidocr runs the same family of networks (PP-OCR) from its own wheel, no download. The
option `engine: tesseract` reads with another program instead, for a held-out score that the trained one cannot fool.
"""

from __future__ import annotations

import re
from typing import final, get_args

import torch
from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.card import Alternative, Card
from rewards.models.text_readers import Engine, RapidReader, TesseractReader, TextReader
from rewards.registry import register

_QUOTED = re.compile(r'["“]([^"“”]+)["”]')


@register(
    "ocr",
    range=(0.0, 1.0),
    card=Card(
        origin="Liu et al., arXiv:2505.05470 (formula); PP-OCRv6 models in the wheel of rapidocr, or tesseract",
        licence="Apache-2.0",
        typical="0 no text, 0.6 Stable Diffusion 3.5, 1 all of it",
        extra="ocr",
        modules=("rapidocr", "onnxruntime"),
        alternatives=(
            Alternative(
                option="engine", value="tesseract", programs=("tesseract",), install="apt install tesseract-ocr"
            ),
        ),
    ),
)
@final
class TextAccuracy:
    """Share of the quoted text that can be read in the image.

    Args:
        device: Not used: both engines run on the CPU.
        threads: CPU threads of rapidocr, or pictures that tesseract reads at a time.
        engine: `rapidocr`, or `tesseract` (a program to install: `apt install tesseract-ocr`).
        language: Tesseract's language data, such as `eng` or `deu+eng`.
    """

    def __init__(
        self, *, device: torch.device, threads: int = 1, engine: Engine = "rapidocr", language: str = "eng"
    ) -> None:
        if threads < 1:
            raise UserError(f"reward 'ocr': threads must be at least 1, got {threads}")
        if engine not in get_args(Engine):
            raise UserError(f"reward 'ocr': engine must be one of {', '.join(get_args(Engine))}, got {engine!r}")
        self.read: TextReader
        if engine == "rapidocr":
            self.read = RapidReader(reward="ocr", threads=threads)
        else:
            self.read = TesseractReader(reward="ocr", language=language, threads=threads)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`.

        Raises:
            UserError: A prompt quotes no text and its metadata has none.
        """
        wanted = [wanted_text(prompt, extra) for prompt, extra in zip(prompts, metadata, strict=True)]
        scores = [accuracy(read, text) for read, text in zip(self.read(images), wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def wanted_text(prompt: str, metadata: Metadata) -> str:
    """`metadata["text"]`, else the first text of the prompt in straight or curly double quotation marks.

    Raises:
        UserError: There is none.
    """
    given = metadata.get("text")
    match = _QUOTED.search(prompt)
    text = given if isinstance(given, str) else (match[1] if match else "")
    if not normalise_text(text):
        raise UserError(
            f"reward 'ocr': the prompt {prompt!r} quotes no text; write it in double quotation marks, "
            f'a sign that says "open", or give metadata the key text'
        )
    return text


def accuracy(read: str, wanted: str) -> float:
    """1 minus the edit distance between texts in units of the wanted one's length, at least 0."""
    read, wanted = normalise_text(read), normalise_text(wanted)
    if wanted in read:
        return 1.0
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def normalise_text(text: str) -> str:
    """Lower case, without white space."""
    return "".join(text.split()).lower()


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
