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


def alone_though_asked_for_more() -> str:
    """What to say where somebody asked for several processes and this one was started by itself; empty elsewhere.

    `accelerate launch --num_processes 2` starts one process where it finds no GPU, and neither srun nor mpirun tells
    processes of each other.
    """
    if "WORLD_SIZE" in os.environ:
        return ""
    torchrun = "torchrun --standalone --nproc_per_node N -m trainers train CONFIG"
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        return (
            "WARNING: accelerate was asked for several processes and started this one only, which trains alone; "
            f"two or more on CPUs: ACCELERATE_USE_CPU=true {torchrun}"
        )
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 1:
            return (
                f"WARNING: {name} is {os.environ[name]}, but no launcher has told this process of the others, so it "
                f"trains alone; start them by {torchrun} (scripts/slurm has the job scripts)"
            )
    return ""
