"""Find weights on disk or on the Hugging Face hub, check what they are, and read them without unpickling objects.

A download is named by repository and revision (a commit) or by an address; its SHA-256 is compared where it is
published, else with that of the first download (`rewards.models.first_download`).
Local paths work everywhere, so that machines without a network are served. Errors say which file is missing, why the
download failed, and how to fetch it by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewards.base import UserError
from rewards.downloads import Download
from rewards.models.first_download import cache_folder, check_first, sha256_of
from rewards.optional import require

TOKENIZER_FILES = ("*.json", "*.txt", "*.model")
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors")
OPEN_CLIP_FILES = (*TOKENIZER_FILES, "open_clip_model.safetensors")
_COMMIT_LETTERS = 40


def local_file(reward: str, path: str | Path, *, option: str, sha256: str = "") -> Path:
    """A file of the user's.

    Args:
        reward: Name of the reward, for messages.
        path: The file.
        option: The reward's option that names it, for messages.
        sha256: Its expected hash; empty = not compared.

    Raises:
        UserError: No such file, or its hash differs.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise UserError(f"reward {reward!r}: option {option}: there is no file {found}")
    check_hash(reward, found, sha256)
    return found


def locate_file(reward: str, path: str | Path | None, download: Download, *, option: str, sha256: str = "") -> Path:
    """The file a reward needs: the user's, else the published one, downloaded once.

    Args:
        reward: Name of the reward, for messages.
        path: A local file, or None to download.
        download: The published file.
        option: The reward's option that takes a local path, for messages.
        sha256: Expected hash of a local file; a downloaded one is compared with `download.sha256` when this is empty.

    Raises:
        UserError: No such file, it cannot be downloaded, or its hash differs.
        ImportError: Downloading needs huggingface_hub.
    """
    if path is not None:
        return local_file(reward, path, option=option, sha256=sha256)
    found = _fetch(reward, download, option=option)
    if sha256 or download.sha256:
        check_hash(reward, found, sha256 or download.sha256)
    else:
        name = download.url or f"{download.repository}@{download.revision}/{download.file}"
        check_first(reward, name, found, cure="fetch the old file by hand and name it in the option " + option)
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
        reward: Name of the reward, for messages.
        model: A local folder or `owner/name` on the hub.
        revision: Commit of the repository; ignored for a local folder.
        option: The reward's option that names the model, for messages.
        sha256: Expected hash of `model.safetensors` in it; empty = not compared.
        files: Patterns of what is downloaded.

    Raises:
        UserError: Neither a folder nor downloadable, or the hash differs.
        ImportError: Downloading needs huggingface_hub.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UserError(f"reward {reward!r}: option {option}: there is no folder {folder}")
        hub = require("huggingface_hub", extra="", reward=reward)
        try:
            folder = Path(hub.snapshot_download(model, revision=revision, allow_patterns=list(files)))
        except Exception as error:
            raise UserError(
                f"reward {reward!r} needs the model {model} (revision {revision}), which could not be downloaded "
                f"({_reason(error)}); on a machine with network run `hf download {model} --revision {revision} "
                f"--local-dir DIR`, copy DIR here and set the option {option}: DIR"
            ) from error
        if not sha256:
            _check_first_weights(reward, f"{model}@{revision}", folder)
    if sha256:
        check_hash(reward, folder / "model.safetensors", sha256)
    return folder


def _check_first_weights(reward: str, name: str, folder: Path) -> None:
    """Compares the weights in a snapshot with those of the first download."""
    for weights in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        commit = folder.name if len(folder.name) == _COMMIT_LETTERS else "COMMIT"
        check_first(reward, f"{name}/{weights.name}", weights, cure=f"set its revision (this one is {commit})")


def pinned(model: str, revision: str, *, default: tuple[str, str]) -> str:
    """The revision to use: the one given, else the pinned one of the default model, else `main`.

    Args:
        model: `owner/name` that was asked for.
        revision: Commit that was asked for; empty when none was.
        default: The reward's own model and the commit it is pinned to.
    """
    return revision or (default[1] if model == default[0] else "main")


def check_hash(reward: str, path: Path, sha256: str) -> None:
    """Compares a file with its expected SHA-256, unless that is empty.

    Raises:
        UserError: They differ, or the file is missing.
    """
    if not sha256:
        return
    if not path.is_file():
        raise UserError(f"reward {reward!r}: there is no file {path} to compare with sha256 {sha256}")
    digest = sha256_of(path)
    if digest != sha256.lower():
        raise UserError(
            f"reward {reward!r}: {path} has sha256 {digest}, expected {sha256.lower()}; it is another or a "
            f"damaged file: delete it and fetch it again, or give the hash of the file you mean"
        )


def load_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """Reads a state dict on the CPU: `.safetensors`, or a torch file of tensors only, also under the key `state_dict`.

    Raises:
        UserError: The file holds anything else.
    """
    if path.suffix == ".safetensors":
        loaded = require("safetensors.torch", extra="", reward=reward).load_file(str(path))
    else:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(
                f"reward {reward!r}: {path} cannot be read as tensors alone ({_reason(error)}); it is damaged or holds "
                f"pickled objects, which are refused: convert it to safetensors where you trust it"
            ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not (isinstance(loaded, dict) and loaded and all(isinstance(v, Tensor) for v in loaded.values())):
        raise UserError(f"reward {reward!r}: {path} holds a {type(loaded).__name__}, not a state dict of tensors")
    return loaded


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
        raise UserError(
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
