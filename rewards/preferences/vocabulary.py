"""Captions as rows of word indices, with the words of the training captions as vocabulary.

Index 0 pads, 1 stands for a word never seen in training. Words are runs of letters and digits in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = re.compile(r"\w+")
PADDING, UNKNOWN, FIRST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Words and the longest caption that is read.

    Attributes:
        words: In the order of their indices, from 2 on.
        length: `L`; longer captions are cut.
    """

    words: tuple[str, ...]
    length: int

    @classmethod
    def of(cls, captions: Iterable[str], *, max_words: int = 4096, max_length: int = 64) -> Vocabulary:
        """The words of captions, the most frequent ones first."""
        counts: dict[str, int] = {}
        longest = 1
        for caption in captions:
            words = split(caption)
            longest = max(longest, len(words))
            for word in words:
                counts[word] = counts.get(word, 0) + 1
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(words=tuple(ordered[:max_words]), length=min(longest, max_length))

    def __len__(self) -> int:
        return len(self.words) + FIRST

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to `(B, L)` int64."""
        index = {word: number for number, word in enumerate(self.words, FIRST)}
        rows = torch.full((len(captions), self.length), PADDING)
        for row, caption in zip(rows, captions, strict=True):
            numbers = [index.get(word, UNKNOWN) for word in split(caption)][: self.length] or [UNKNOWN]
            row[: len(numbers)] = torch.tensor(numbers)
        return rows


def split(caption: str) -> list[str]:
    """The words of a caption."""
    return _WORD.findall(caption.lower())
