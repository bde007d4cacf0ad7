"""Find weights on disk or on the Hugging Face hub, check what they are, and read them without unpickling objects.

A download is named by repository and revision (a commit) or by an address; its SHA-256 is compared where it is known.
Local paths work everywhere, so that machines without a network are served. Errors say which file is missing, why the
download failed, and how to fetch it by hand.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewards.optional import require

TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
OPEN_CLIP_FILES = (*TOKENIZER_FILES, "open_clip_model.safetensors")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Download:
    """A file that can be fetched.

    Attributes:
        file: its name in the repository, or in the cache when it has an address.
        repository: `owner/name` on the Hugging Face hub; empty when `url` is given.
        revision: commit of the repository.
        url: address of a file that is on no hub.
        sha256: of the file, hexadecimal; empty when the publisher's file was not available to compute it.
    """

    file: str
    repository: str = ""
    revision: str = "main"
    url: str = ""
    sha256: str = ""


def local_file(reward: str, path: str | Path, *, option: str, sha256: str = "") -> Path:
    """A file of the user's.

    Args:
        reward: name of the reward, for messages.
        path: the file.
        option: the reward's option that names it, for messages.
        sha256: its expected hash; empty = not compared.

    Raises:
        ValueError: no such file, or its hash differs.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise ValueError(f"reward {reward!r}: option {option}: there is no file {found}")
    check_hash(reward, found, sha256)
    return found


def locate_file(reward: str, path: str | Path | None, download: Download, *, option: str, sha256: str = "") -> Path:
    """The file a reward needs: the user's, else the published one, downloaded once.

    Args:
        reward: name of the reward, for messages.
        path: a local file, or None to download.
        download: the published file.
        option: the reward's option that takes a local path, for messages.
        sha256: expected hash of a local file; a downloaded one is compared with `download.sha256` when this is empty.

    Raises:
        ValueError: no such file, it cannot be downloaded, or its hash differs.
        ImportError: downloading needs huggingface_hub.
    """
    if path is not None:
        return local_file(reward, path, option=option, sha256=sha256)
    found = _fetch(reward, download, option=option)
    check_hash(reward, found, sha256 or download.sha256)
    return found


def locate_folder(
    reward: str,
    model: str,
    *,
    revision: str = "main",
    option: str,
    sha256: str = "",
    files: Sequence[str] = MODEL_FILES,
) -> Path:
    """The folder of a model in the format of transformers: a local one, else a snapshot of a hub repository.

    Args:
        reward: name of the reward, for messages.
        model: a local folder or `owner/name` on the hub.
        revision: commit of the repository; ignored for a local folder.
        option: the reward's option that names the model, for messages.
        sha256: expected hash of `model.safetensors` in it; empty = not compared.
        files: patterns of what is downloaded.

    Raises:
        ValueError: neither a folder nor downloadable, or the hash differs.
        ImportError: downloading needs huggingface_hub.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise ValueError(f"reward {reward!r}: option {option}: there is no folder {folder}")
        hub = require("huggingface_hub", extra="", reward=reward)
        try:
            folder = Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(files)))
        except Exception as error:
            raise ValueError(
                f"reward {reward!r} needs the model {model} (revision {revision}), which could not be downloaded "
                f"({_reason(error)}); on a machine with network run `hf download {model} --revision {revision} "
                f"--local-dir DIR`, copy DIR here and set the option {option}: DIR"
            ) from error
    if sha256:
        check_hash(reward, folder / "model.safetensors", sha256)
    return folder


def pinned(model: str, revision: str, *, default: tuple[str, str]) -> str:
    """The revision to use: the one given, else the pinned one of the default model, else `main`.

    Args:
        model: `owner/name` that was asked for.
        revision: commit that was asked for; empty when none was.
        default: the reward's own model and the commit it is pinned to.
    """
    return revision or (default[1] if model == default[0] else "main")


def check_hash(reward: str, path: Path, sha256: str) -> None:
    """Compare a file with its expected SHA-256, unless that is empty.

    Raises:
        ValueError: they differ, or the file is missing.
    """
    if not sha256:
        return
    if not path.is_file():
        raise ValueError(f"reward {reward!r}: there is no file {path} to compare with sha256 {sha256}")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != sha256.lower():
        raise ValueError(
            f"reward {reward!r}: {path} has sha256 {digest.hexdigest()}, expected {sha256.lower()}; it is another or a "
            f"damaged file: delete it and fetch it again, or give the hash of the file you mean"
        )


def load_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """Read a state dict on the CPU: `.safetensors`, or a torch file of tensors only, also under the key `state_dict`.

    Raises:
        ValueError: the file holds anything else.
    """
    if path.suffix == ".safetensors":
        loaded = require("safetensors.torch", extra="", reward=reward).load_file(str(path))
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"reward {reward!r}: {path} cannot be read as tensors alone ({_reason(error)}); it is damaged or holds "
                f"pickled objects, which are refused: convert it to safetensors where you trust it"
            ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not (isinstance(loaded, dict) and loaded and all(isinstance(v, Tensor) for v in loaded.values())):
        raise ValueError(f"reward {reward!r}: {path} holds a {type(loaded).__name__}, not a state dict of tensors")
    return loaded


def cache_folder() -> Path:
    """Where files without a hub are kept: `$DDPO_CACHE/rewards`, else `~/.cache/ddpo/rewards`."""
    return Path(os.environ.get("DDPO_CACHE", Path.home() / ".cache" / "ddpo")) / "rewards"


def _fetch(reward: str, download: Download, *, option: str) -> Path:
    try:
        if download.url:
            return _fetch_url(download)
        hub = require("huggingface_hub", extra="", reward=reward)
        return Path(hub.hf_hub_download(download.repository, download.file, revision=download.revision))
    except ImportError:
        raise
    except Exception as error:
        by_hand = download.url or f"hf download {download.repository} {download.file} --revision {download.revision}"
        raise ValueError(
            f"reward {reward!r} needs the weights {download.file}, which could not be downloaded ({_reason(error)}); "
            f"on a machine with network fetch {by_hand}, copy the file here and set the option {option}: FILE"
        ) from error


def _fetch_url(download: Download) -> Path:
    target = cache_folder() / download.file
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(download.url, str(target), progress=False)  # moves a whole file into place
    return target


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}".rstrip(": ")
