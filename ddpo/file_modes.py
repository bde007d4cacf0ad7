"""Who may read weights: whoever may read the other files of this process.

safetensors writes files that their owner alone can read (0600), whatever the umask says: in a folder that is shared
with others they would be closed to them.
"""

import os
from pathlib import Path

_MODE = 0o666


def open_by_umask(path: Path) -> None:
    """Gives a weights file, or those in a folder and below, the mode of any new file.

    Args:
        path: What this process has just written.
    """
    mask = os.umask(0o077)  # it cannot be read alone; what another thread makes meanwhile is opened to nobody
    os.umask(mask)
    for file in path.rglob("*.safetensors") if path.is_dir() else (path,):
        file.chmod(_MODE & ~mask)
