"""What exactly scored: a hash of a reward's definition, arguments and weights, and the versions around it.

Two rewards of one hash are the same code with the same arguments and the same weights. The hash covers

    definition   bytes of the file that defines the function or class, and its name
    arguments    the options it was made with
    weights      name, type, shape and bytes of every tensor that the reward object holds, networks included
    packages     versions of the packages that carry weights or models of their own (`Card.modules`)
    parts        the same of every reward inside it

It does not cover the modules that the file imports, so versions of Python and the main libraries are noted beside it.
A run keeps the identities of its rewards in `rewards.json`; a server sends its own with every reply.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rewards.base import Reward
from rewards.registry import card_of

LIBRARIES = ("torch", "numpy", "pillow", "transformers")
_MAX_DEPTH = 6


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What scored.

    Attributes:
        name: of the reward.
        hash: SHA-256, hexadecimal, of what the module docstring lists.
        package_version: of the package `ddpo` around the reward; empty when it is not installed.
        versions: of Python and the libraries installed there.
        where: `this process`, or the address of a server.
    """

    name: str
    hash: str
    package_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    where: str = "this process"

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


@runtime_checkable
class DeclaresIdentity(Protocol):
    """A reward object that is computed elsewhere and was told what computes it."""

    identity: Identity


def identify(reward: Reward, *, options: Mapping[str, object] | None = None) -> Identity:
    """The identity of a reward that is made; reads all its weights once.

    Args:
        reward: the reward.
        options: the keyword arguments it was made with.
    """
    if isinstance(reward.function, DeclaresIdentity):
        return reward.function.identity
    return Identity(
        name=reward.name,
        hash=_hash(reward, options or {}).hexdigest(),
        package_version=_version("ddpo"),
        versions={"python": platform.python_version(), **_versions(LIBRARIES)},
    )


def _hash(reward: Reward, options: Mapping[str, object]) -> hashlib._Hash:
    digest = hashlib.sha256()
    target = reward.function
    definition = target if inspect.isfunction(target) else type(target)
    _add(digest, "name", f"{reward.name} {definition.__qualname__}")
    _add(digest, "definition", _source(definition))
    _add(digest, "arguments", json.dumps(options, sort_keys=True, default=str))
    _add(digest, "packages", json.dumps(_versions(card_of(target).modules), sort_keys=True))
    home = definition.__module__.partition(".")[0]
    for path, part in _parts(target, "", home, set(), 0):
        if isinstance(part, Reward):
            _add(digest, f"part {path}", identify(part).hash)
        else:
            _add(digest, f"weights {path} {part.dtype} {tuple(part.shape)}", _bytes(part))
    return digest


def _add(digest: hashlib._Hash, label: str, data: str | bytes) -> None:
    data = data.encode() if isinstance(data, str) else data
    digest.update(f"{label}\0{len(data)}\0".encode())
    digest.update(data)


def _source(definition: object) -> bytes:
    try:
        file = inspect.getsourcefile(definition)  # type: ignore[arg-type]
        return Path(file).read_bytes() if file else b""
    except (OSError, TypeError):  # defined in a console, or in C
        return b""


def _parts(value: object, path: str, home: str, seen: set[int], depth: int) -> Iterator[tuple[str, Tensor | Reward]]:
    """Tensors and rewards that an object holds, itself excepted, in an order that does not depend on the process."""
    if id(value) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, Tensor) or (isinstance(value, Reward) and depth):
        yield path, value
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", tensor) for name, tensor in sorted(value.state_dict().items()))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _parts(value[key], f"{path}[{key}]", home, seen, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _parts(item, f"{path}[{index}]", home, seen, depth + 1)
    elif type(value).__module__.partition(".")[0] in (home, "rewards") and not isinstance(value, type):
        for name, item in sorted(_attributes(value).items()):
            yield from _parts(item, f"{path}.{name}", home, seen, depth + 1)


def _attributes(value: object) -> Mapping[str, object]:
    try:
        return vars(value)
    except TypeError:  # slots, enumerations
        return {}


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _versions(modules: tuple[str, ...]) -> dict[str, str]:
    found = {module: _version(module) for module in modules}
    return {module: version for module, version in found.items() if version}


@cache
def _version(module: str) -> str:
    """The version of the distribution that holds a module; empty when it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(module)  # most are called as their module is
    for name in importlib.metadata.packages_distributions().get(module, []):  # reads every installed package
        return importlib.metadata.version(name)
    return ""
