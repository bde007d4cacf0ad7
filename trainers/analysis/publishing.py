"""Exported weights on the Hugging Face hub, with their model card and picture, in one commit: `ddpo export --push`."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ddpo.validation import UserError
from trainers.epoch.report import BEFORE_AFTER
from trainers.run_folder.model_card import CARD

_FOLDER = '"FOLDER"'  # what a card calls the place that it is loaded from


def check_push(repository: str) -> None:
    """Refuses what cannot be uploaded, before anything is loaded.

    Args:
        repository: `OWNER/NAME`.

    Raises:
        UserError: It is no such name, the hub is switched off, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {error}") from error
    if repository.count("/") != 1:
        raise UserError(f"--push must be OWNER/NAME, got {repository!r}")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {repository}: HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it")
    if get_token() is None:
        raise UserError(f"--push {repository}: nobody is logged in: run `hf auth login`, or set HF_TOKEN")


def push(weights: Path, card: Path, repository: str, *, private: bool) -> str:
    """Makes the repository if it is not there, and uploads.

    Args:
        weights: An exported file or folder.
        card: The folder whose model card, with its picture, belongs to them.
        repository: `OWNER/NAME`.
        private: Whether a new repository is to be.

    Returns:
        Its address.

    Raises:
        UserError: The hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private or None, exist_ok=True))
        api.create_commit(
            repository, operations=_operations(weights, card, repository), commit_message=f"{weights.stem}, by ddpo"
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push {repository}: {reason}; the weights are in {weights}") from error
    return address


def _operations(weights: Path, card: Path, repository: str) -> list[CommitOperationAdd]:
    """Every file under its name there."""
    root = weights if weights.is_dir() else weights.parent
    files = [path for path in sorted(weights.rglob("*")) if path.is_file()] if weights.is_dir() else [weights]
    found: dict[str, Path | bytes] = {path.relative_to(root).as_posix(): path for path in files}
    if (card / BEFORE_AFTER).is_file():
        found[BEFORE_AFTER] = card / BEFORE_AFTER
    if (card / CARD).is_file():
        text = (card / CARD).read_text(encoding="utf-8")
        found[CARD] = text.replace(_FOLDER, f'"{repository}"').encode()
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in found.items()]
