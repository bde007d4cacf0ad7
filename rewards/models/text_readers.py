"""Optical character recognition: a picture to the text in it, lines from top to bottom.

`rapidocr`   the PP-OCR networks in the wheel of rapidocr, run by onnxruntime
`tesseract`  the program tesseract (Smith 2007), a process for each picture: a second opinion, 100 languages
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, final

from PIL import Image
from torch import Tensor

from rewards.base import UserError
from rewards.images.preprocessing import encode_uint8
from rewards.optional import require

Engine = Literal["rapidocr", "tesseract"]
TextReader = Callable[[Tensor], list[str]]
"""From images `(B, 3, H, W)` in [0, 1] to `B` texts."""

_TIMEOUT_SECONDS = 120.0


@final
class RapidReader:
    """Reads with rapidocr, one picture after the other.

    Args:
        reward: Name of the reward, for messages.
        threads: CPU threads of the networks.

    Raises:
        ImportError: The package rapidocr or onnxruntime is not installed.
    """

    def __init__(self, *, reward: str, threads: int) -> None:
        rapidocr = require("rapidocr", extra="ocr", reward=reward)
        require("onnxruntime", extra="ocr", reward=reward)
        self._read = rapidocr.RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, images: Tensor) -> list[str]:
        """The text of each image, without separators between lines."""
        pictures = encode_uint8(images).flip(-1).contiguous().numpy()  # the library expects BGR
        return ["".join(self._read(picture).txts or ()) for picture in pictures]


@final
class TesseractReader:
    """Reads with the program tesseract, several pictures at a time.

    Args:
        reward: Name of the reward, for messages.
        language: Its language data, such as `eng` or `deu+eng`.
        threads: Processes at a time.

    Raises:
        UserError: The program or its language data is not installed.
    """

    def __init__(self, *, reward: str, language: str, threads: int) -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise UserError(
                f"reward {reward!r} with engine tesseract needs the program tesseract, which is not on the PATH: "
                f"`apt install tesseract-ocr`, `brew install tesseract`, or engine: rapidocr"
            )
        self._program = program
        self._language = language
        self._threads = threads
        known = self._run(["--list-langs"], b"").split()
        missing = [part for part in language.split("+") if part not in known]
        if missing:
            raise UserError(
                f"reward {reward!r}: tesseract has no language data {missing[0]!r} (`tesseract --list-langs` shows "
                f"what it has): `apt install tesseract-ocr-{missing[0].lower()}`"
            )

    def __call__(self, images: Tensor) -> list[str]:
        """The text of each image, lines separated by line breaks."""
        pictures = [_encode_png(picture) for picture in encode_uint8(images)]
        with ThreadPoolExecutor(self._threads) as pool:
            return list(pool.map(self._read_png, pictures))

    def _read_png(self, picture: bytes) -> str:
        return self._run(["stdin", "stdout", "-l", self._language, "--dpi", "300"], picture)

    def _run(self, arguments: list[str], given: bytes) -> str:
        one_thread = {**os.environ, "OMP_THREAD_LIMIT": "1"}  # the result does not depend on it, the speed does
        done = subprocess.run(
            [self._program, *arguments], input=given, capture_output=True, timeout=_TIMEOUT_SECONDS, env=one_thread
        )
        if done.returncode != 0:
            said = " ".join(done.stderr.decode(errors="replace").split())[:300]
            raise RuntimeError(f"tesseract {' '.join(arguments)} ended with status {done.returncode}: {said}")
        return done.stdout.decode(errors="replace")


def _encode_png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
