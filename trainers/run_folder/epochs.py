"""How files and folders of a run are named after finished epochs: `epoch_000010`."""

import re

_NAME = re.compile(r"epoch_(\d{6,})")


def epoch_name(epoch: int) -> str:
    """The name of what belongs to so many finished epochs."""
    return f"epoch_{epoch:06d}"


def epoch_in(name: str) -> int | None:
    """The number of finished epochs in a name, without a suffix; None where it is another name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])
