"""Where a run happens: the facts one needs to repeat it."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

PACKAGES = ("ddpo", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def describe_environment() -> dict[str, object]:
    """Versions, machine, git commit of the working folder, command line and time, all JSON-able."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "working_folder": str(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": _device(),
        "git": git_state(Path.cwd()),
    }


def git_state(folder: Path) -> dict[str, object] | None:
    """Commit of the repository around `folder` and whether tracked files differ from it; None outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=10
    ).stdout


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, object]:
    if torch.cuda.is_available():
        return {
            "kind": "cuda",
            "names": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
        }
    return {"kind": "cpu", "names": [platform.processor() or platform.machine()], "cores": os.cpu_count()}
