"""Why a pipeline could not be loaded, with the cure: what diffusers raises hides whether the network is at fault."""

import re
from collections.abc import Iterator
from pathlib import Path

from ddpo.validation import FieldError, check

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


def check_weights(path: Path, *, variant: str | None) -> None:
    """Refuses a file, and a folder whose weights all are of another variant.

    Args:
        path: A file or folder that exists.
        variant: Of the weight files; None for the plain ones.

    Raises:
        FieldError: It is a single file, or has only another variant.
    """
    if path.is_file():
        convert = f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained('FOLDER')"
        cure = f"a folder; this is a single file: {convert}, or the like with its own class, then name FOLDER"
        raise FieldError("path", str(path), cure)
    only = None if variant else only_variant(path)
    check(only is None, "variant", variant, f"{only}: {path} has no other weights")


def only_variant(folder: Path) -> str | None:
    """The variant that a pipeline folder's weights are of, where it has no plain ones, such as `fp16`."""
    files = [file for suffix in _WEIGHTS for file in folder.glob(f"*/*{suffix}")]
    variants = {_SHARD.sub("", file.stem).partition(".")[2] for file in files}
    return variants.pop() if len(variants) == 1 and "" not in variants else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
