"""Output whose reader may go away: a closed pipe (`| head`) or terminal does not end the work that was asked for.

From then on it is written to `terminal.log` in the run folder, where there is one. A run's exit status says whether it
did what it was told, not whether somebody watched.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

LOG = "terminal.log"
_GONE = (errno.EPIPE, errno.EIO)  # of a pipe, of a terminal


class Output:
    """Where the standard streams go once nobody reads them.

    Attributes:
        folder: Where `terminal.log` is written; None for nowhere.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._lost: list[int] = []

    def leave(self, descriptor: int) -> None:
        """Takes a descriptor off its lost reader."""
        if descriptor not in self._lost:
            self._lost.append(descriptor)
        self._redirect()

    def keep_in(self, folder: Path) -> None:
        """Writes what nobody reads to a folder from now on."""
        self.folder = folder
        if self._lost:
            self._redirect()

    def _redirect(self) -> None:
        path = os.devnull if self.folder is None else self.folder / LOG
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if self.folder is not None:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            os.write(target, f"{time}: nobody reads the output any more; it goes on here\n".encode())
        for descriptor in self._lost:
            os.dup2(target, descriptor)
        os.close(target)


class LastingStream:
    """A standard stream that outlives its reader; all else is as in the stream itself."""

    def __init__(self, stream: TextIO, output: Output) -> None:
        self._stream = stream
        self.output = output

    def write(self, text: str) -> int:
        """Writes a text, to the log where the reader is gone."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return self._stream.write(text)

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)
            self._stream.flush()

    def _leave(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        self.output.leave(self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Makes both standard streams outlive their readers for the time of a `with` block."""
    output, before = Output(), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = (LastingStream(stream, output) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # while it can be taken off a lost reader; at its exit Python would end with status 120
        sys.stdout, sys.stderr = before


def keep_output_in(folder: Path) -> None:
    """Writes output that nobody reads to this folder, if the command has made its streams last."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, LastingStream):
            stream.output.keep_in(folder)
