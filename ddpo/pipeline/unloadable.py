"""Why a pipeline could not be loaded, with the cure: what diffusers raises hides whether the network is at fault."""

import re
from collections.abc import Iterator
from pathlib import Path

from ddpo.validation import check

SINGLE_FILE = ".safetensors"
"""Ending of files that hold all weights of a pipeline."""

_WEIGHTS = (".safetensors", ".bin")
_SHARD = re.compile(r"-\d+-of-\d+$")


def reason(error: Exception, source: str, *, revision: str | None) -> str:
    """What went wrong, in a sentence without its final dot.

    Args:
        error: What loading raised.
        source: A folder, or a hub id.
        revision: Of the hub repository.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    first = str(error).strip().partition("\n")[0]
    if Path(source).exists():
        return f"{type(error).__name__}: {first}" if isinstance(error, KeyError | TypeError) else first
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "it is gated: accept its licence on its page, and call `hf auth login`"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"it has no revision {revision!r}"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "the hub has no such model, or it is private: call `hf auth login`"
    if constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE forbids the network: unset it, or name a folder in its place"
    if any(isinstance(cause, OSError) and "cached" in str(cause) for cause in causes):
        return (
            "it is not in the cache, and the hub cannot be reached: connect to the network (`hf auth login` where it "
            "is gated), or copy the model here and name its folder"
        )
    return first


def check_single_file(path: Path, *, config: str | None, **of_folders: str | None) -> None:
    """Refuses what does not go together with a single file, or with anything else.

    Args:
        path: A file, a folder, or a hub id.
        config: Where the file's configuration is.
        **of_folders: Options of folders and of the hub alone, by name.

    Raises:
        FieldError: The file is of no kind that is read, or an option is for the other one.
    """
    if not path.is_file():
        check(config is None, "config", config, f"null: {path} is no single file")
        return
    kind = f"a {SINGLE_FILE} file, or a folder (other forms of checkpoint may run code when they are loaded)"
    check(path.suffix == SINGLE_FILE, "path", str(path), kind)
    for name, value in of_folders.items():
        check(value is None, name, value, f"null for a single file, as {path} is")


def check_weights(folder: Path, *, variant: str | None) -> None:
    """Refuses a folder whose weights all are of another variant.

    Args:
        folder: Of a pipeline.
        variant: Of the weight files; None for the plain ones.

    Raises:
        FieldError: It has only another variant.
    """
    only = None if variant else only_variant(folder)
    check(only is None, "variant", variant, f"{only}: {folder} has no other weights")


def only_variant(folder: Path) -> str | None:
    """The variant that a pipeline folder's weights are of, where it has no plain ones, such as `fp16`."""
    files = [file for suffix in _WEIGHTS for file in folder.glob(f"*/*{suffix}")]
    variants = {_SHARD.sub("", file.stem).partition(".")[2] for file in files}
    return variants.pop() if len(variants) == 1 and "" not in variants else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
