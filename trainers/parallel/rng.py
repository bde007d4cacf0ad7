"""The global random states of a process, in a form that a checkpoint holds and that restores bit-exactly."""

import random
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ddpo.seeds import Purpose, one_seed, stream

RandomValues = dict[str, dict[str, int | float | None]]


def rng_state() -> tuple[dict[str, Tensor], RandomValues]:
    """States of the global generators of Python, numpy and torch (CPU and this process's CUDA device).

    Returns:
        Tensors (large states) and values (the rest), as `save_checkpoint` takes them. They are those of this process
        only: with several processes gather them and keep one pair for each rank.
    """
    version, internal, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  the state itself is what is wanted
    assert isinstance(numpy, dict) and numpy["bit_generator"] == "MT19937", "numpy's global generator was replaced"
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    values: RandomValues = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    return tensors, values


def seed_rng(run_seed: int, rank: int) -> None:
    """Seeds the global generators of Python, numpy and torch, those of a reward's own code, as run and process say."""
    seed = one_seed(run_seed, 0, rank, purpose=Purpose.GLOBAL)
    random.seed(seed)
    np.random.seed(stream(seed).integers(2**32, size=624, dtype=np.uint32))  # noqa: NPY002  the global one is meant
    torch.manual_seed(seed)


def set_rng_state(tensors: Mapping[str, Tensor], values: RandomValues) -> None:
    """Restores what `rng_state` returned. Warns when that holds a CUDA state and there is no CUDA device."""
    python, numpy = values["python"], values["numpy"]
    random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
    key = tensors["numpy"].numpy().astype(np.uint32)
    state = {"key": key, "pos": numpy["pos"]}
    np.random.set_state(  # noqa: NPY002
        {"bit_generator": "MT19937", "state": state, "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
    )
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    elif "cuda" in tensors:
        warnings.warn(
            "the checkpoint was taken on a CUDA device and there is none here: its random state is dropped",
            stacklevel=2,
        )
