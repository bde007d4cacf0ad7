"""All processes of a run must mean the same one: what each has read is compared before anything is trained.

A process that differs would train apart without a word: gradients are averaged, weights are not. The error is raised on
all of them, and told by one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddpo.validation import UserError
from trainers.parallel.processes import Processes

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 4

Made = TypeVar("Made")


class ToldElsewhere(UserError):
    """An error that another process of the run tells."""


def on_main(work: Callable[[], Made], processes: Processes) -> Made | None:
    """Does on the main process what it alone does, and fails on all where it fails.

    Args:
        work: Meets no other process.
        processes: Who shares the run; all call this at the same place.

    Returns:
        What the work gives; None on the others.

    Raises:
        Exception: What the work raised on the main process; `ToldElsewhere` on the others.
    """
    made, failure = None, None
    if processes.is_main:
        try:
            made = work()
        except Exception as error:
            failure = error
    if processes.agreed(failure is not None):
        raise failure or ToldElsewhere("the main process has failed, and tells why")
    return made


def check_same_config(config: object, processes: Processes, **call: object) -> None:
    """Refuses processes whose configurations differ.

    Args:
        config: This process's, a dataclass.
        processes: Who shares the run.
        **call: What else they were told.

    Raises:
        UserError: The keys that differ, with both values; `ToldElsewhere` on all but the main process.
    """
    assert is_dataclass(config) and not isinstance(config, type)
    keys = _flattened(json.loads(json.dumps({**asdict(config), **call}, default=str)))
    _check(keys, processes, "was given another configuration", "start all with the same command line and file")


def check_same_weights(modules: Mapping[str, nn.Module], processes: Processes) -> None:
    """Refuses processes whose models differ, before a network is split.

    Args:
        modules: Networks by name; of one process alone nothing is read.
        processes: Who shares the run.

    Raises:
        UserError: The networks that differ; `ToldElsewhere` on all but the main process.
    """
    if processes.count > 1:
        hashes: dict[str, object] = {name: fingerprint(module) for name, module in modules.items()}
        _check(hashes, processes, "has loaded other weights", "give all machines the same model")


def fingerprint(module: nn.Module) -> str:
    """A hash of the names, types, shapes and sums of bits of all tensors: exact in any order, hence on any device."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict(keep_vars=True).items():
        digest.update(json.dumps([name, _summary(tensor.detach())]).encode())
    return digest.hexdigest()


def _summary(tensor: Tensor) -> object:
    """Type, shape and the sum of a tensor's bits as whole numbers, modulo 2^64; of a quantised one of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [_summary(getattr(tensor, part)) for part in tensor.__tensor_flatten__()[0]]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_meta or tensor.numel() == 0:
        return [str(tensor.dtype), list(tensor.shape)]
    words = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    total = words.contiguous().view(_WORDS[words.element_size()]).sum(dtype=torch.int64)
    return [str(tensor.dtype), list(tensor.shape), int(total)]


def _check(own: Mapping[str, object], processes: Processes, what: str, cure: str) -> None:
    everyones = processes.gather_json(dict(own))
    first = everyones[0]
    assert isinstance(first, dict)
    for rank, theirs in enumerate(everyones):
        assert isinstance(theirs, dict)
        names = [name for name in sorted({*first, *theirs}) if first.get(name) != theirs.get(name)]
        if names:
            shown = ", ".join(f"{name} {_value(theirs, name)}, not {_value(first, name)}" for name in names[:_SHOWN])
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            error = UserError if processes.is_main else ToldElsewhere
            raise error(f"process {rank} {what} than process 0: {shown}{more}; {cure}")


def _value(values: Mapping[str, object], name: str) -> str:
    """A value or a hash as it is shown: in few letters."""
    text = json.dumps(values.get(name)).strip('"')
    return text if len(text) <= 60 else f"{text[:12]}..."


def _flattened(value: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested mappings and lists, by dotted keys."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is None:
        return {prefix: value}
    return {
        name: leaf
        for key, item in entries
        for name, leaf in _flattened(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
