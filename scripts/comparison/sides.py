"""The two things compared: commits, each checked out in a folder of its own, or the working tree."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WORKING_TREE = "."


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two.

    Attributes:
        title: As the user calls it, and its commit.
        checkout: Folder with its code.
        folder: Where its runs go.
    """

    title: str
    checkout: Path
    folder: Path

    def run_folder(self, name: str) -> Path:
        """The run folder of a configuration."""
        return self.folder / "runs" / name


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Side]:
    """A side whose code is that of a commit, in a git worktree while the block runs; `.` is the tree as it lies here.

    Args:
        commit: Anything that git knows as a commit, or `.`.
        folder: Of the side; made here.

    Raises:
        ValueError: git knows no such commit.
    """
    folder.mkdir(parents=True)
    if commit == WORKING_TREE:
        yield Side(title="the working tree", checkout=ROOT, folder=folder)
        return
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "--short", f"{commit}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        raise ValueError(f"A and B must be commits of {ROOT}, or '.' for its working tree, got {commit!r}")
    checkout, short = folder / "checkout", found.stdout.strip()
    title = commit if commit.startswith(short) else f"{commit} ({short})"
    git("worktree", "add", "--quiet", "--detach", str(checkout), short)
    try:
        yield Side(title=title, checkout=checkout, folder=folder)
    finally:
        git("worktree", "remove", "--force", str(checkout))


def git(*arguments: str) -> None:
    """Runs git in this repository."""
    subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
