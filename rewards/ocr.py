"""Whether a picture shows the text that its prompt quotes, as in Flow-GRPO (Liu et al. 2025, arXiv:2505.05470).

    score = 1 - min(d, n) / n

n is the length of the wanted text, d its edit distance to everything that was read, in reading order, both without
spaces and in lower case; d = 0 when the wanted text occurs in what was read. The wanted text is the first one in
quotation marks in the prompt, or `metadata["text"]`.

Flow-GRPO reads with PaddleOCR; rapidocr runs the same family of networks (PP-OCR) from its own wheel, no download.
"""

from __future__ import annotations

import re
from typing import final

import torch
from torch import Tensor

from rewards.base import Metadata
from rewards.card import Card
from rewards.optional import require
from rewards.preprocessing import encode_uint8
from rewards.registry import register

_QUOTED = re.compile(r'["“]([^"“”]+)["”]')


@register(
    "ocr",
    range=(0.0, 1.0),
    card=Card(
        origin="Liu et al., arXiv:2505.05470 (formula); PP-OCRv6 models in the wheel of rapidocr",
        licence="Apache-2.0",
        typical="0 no text, 0.6 Stable Diffusion 3.5, 1 all of it",
        extra="ocr",
        modules=("rapidocr", "onnxruntime"),
    ),
)
@final
class TextAccuracy:
    """Share of the quoted text that can be read in the image.

    Args:
        device: not used: the networks run on the CPU.
        threads: CPU threads of the networks.
    """

    def __init__(self, *, device: torch.device, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError(f"reward 'ocr': threads must be at least 1, got {threads}")
        rapidocr = require("rapidocr", extra="ocr", reward="ocr")
        require("onnxruntime", extra="ocr", reward="ocr")
        self._read = rapidocr.RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
        """Scores `(B,)`.

        Raises:
            ValueError: a prompt quotes no text and its metadata has none.
        """
        wanted = [wanted_text(prompt, extra) for prompt, extra in zip(prompts, metadata, strict=True)]
        scores = [accuracy(self.read(image[None]), text) for image, text in zip(images, wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def read(self, image: Tensor) -> str:
        """All text in an image `(1, 3, H, W)`, lines from top to bottom, without separators."""
        result = self._read(encode_uint8(image)[0].flip(-1).contiguous().numpy())  # the library expects BGR
        return "".join(result.txts or ())


def wanted_text(prompt: str, metadata: Metadata) -> str:
    """`metadata["text"]`, else the first text of the prompt in straight or curly double quotation marks.

    Raises:
        ValueError: there is none.
    """
    given = metadata.get("text")
    match = _QUOTED.search(prompt)
    text = given if isinstance(given, str) else (match[1] if match else "")
    if not normalise_text(text):
        raise ValueError(
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
