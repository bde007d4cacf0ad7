"""What the launcher (torchrun, accelerate) tells each process through the environment; torch is not needed for it."""

import os


def num_processes() -> int:
    """Processes of this job; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Index of this process, over all machines."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def prepare_threads() -> None:
    """Keeps waiting OpenMP threads from spinning where processes share cores; works only before torch is imported."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
