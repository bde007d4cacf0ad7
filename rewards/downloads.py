"""What a reward downloads, and what is known of it beforehand: its place, revision and hash."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
MODEL = "configuration, tokenizer and weights"


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file, or the files of a model, that can be fetched.

    Attributes:
        file: Its name in the repository, or in the cache when it has an address; the files of a model when left out.
        repository: `owner/name` on the Hugging Face hub; empty when `url` is given.
        revision: Commit of the repository.
        url: Address of a file that is on no hub.
        library: What fetches it by itself, without a revision; empty for this package.
        sha256: Of the file, hexadecimal; empty when no published source states it.
    """

    file: str = MODEL
    repository: str = ""
    revision: str = "main"
    url: str = ""
    library: str = ""
    sha256: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether a commit says which file is meant."""
        return _COMMIT.search(self.url or self.revision) is not None and not self.library

    def __str__(self) -> str:
        """Place, revision and how a change is noticed."""
        place = self.library or self.repository or self.url
        revision = self.revision[:12] if self.repository else "the commit in its address"
        pinned = f"pinned to {revision}" if self.is_pinned else "not pinned"
        if self.sha256:
            known = f"sha256 {self.sha256[:12]}... as published"
        elif self.is_pinned and self.file == MODEL:
            known = "a commit names its contents"
        else:
            known = "no published hash: that of the first download is kept, another one is refused"
        return f"{self.file} of {place}, {pinned}; {known}"
