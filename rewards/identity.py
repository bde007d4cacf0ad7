"""What exactly scored: a hash of a reward's definition, arguments and weights, and the versions around it.

Two rewards of one hash are the same code with the same arguments and the same weights, as far as the hash sees:

    definition   the source of the function or class and of what it uses in its own module (`rewards.source`), and its
                 name; of a reward of this package its registered name and the version of its scores (`Card.version`)
    arguments    the options it was made with; of a `functools.partial` its own
    weights      name, type, shape and bytes of every tensor and array that the reward object holds, networks included
    numbers      plain ones that the object holds
    packages     versions of the packages that carry weights or models of their own (`Card.modules`)
    parts        the same of every reward inside it

A bound method is hashed with the object it is bound to. Not seen are what a function closes over, texts among the
attributes of an object (paths differ between machines), and the modules that the file imports; versions of Python and
the main libraries are noted beside the hash. Where the parts of a reward of this package are kept, and in which file it
stands, does not count.
A run keeps the identities of its rewards in `rewards.json`; a server sends its own with every reply.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from rewards.description import DescribedReward, Identity
from rewards.registry import card_of
from rewards.reward import Reward
from rewards.source import computed_source

LIBRARIES = ("torch", "numpy", "pillow", "transformers")
_MAX_DEPTH = 6
_OURS = "rewards"


def identify(reward: Reward, *, options: Mapping[str, object] | None = None) -> Identity:
    """The identity of a reward that is made; reads all its weights once.

    Args:
        reward: The reward.
        options: The keyword arguments it was made with.
    """
    if isinstance(reward.function, DescribedReward) and (given := reward.function.describe().identity):
        return given
    return Identity(
        name=reward.name,
        hash=_hash(reward, options or {}).hexdigest(),
        package_version=_version("ddpo"),
        versions={"python": platform.python_version(), **_versions(LIBRARIES)},
    )


def _hash(reward: Reward, options: Mapping[str, object]) -> hashlib._Hash:
    digest = hashlib.sha256()
    target = reward.function
    definition = _definition(target)
    home, card = _home(definition), card_of(target)
    is_ours = home == _OURS
    _add(digest, "name", f"{reward.name} {'' if is_ours else definition.__qualname__}")
    _add(digest, "definition", f"version {card.version}" if is_ours else computed_source(definition))
    _add(digest, "arguments", json.dumps(options, sort_keys=True, default=str))
    _add(digest, "packages", json.dumps(_versions(card.modules), sort_keys=True))
    parts = [_digest("" if is_ours else path, part) for path, part in _parts(target, "", home, set(), 0)]
    for part in sorted(parts) if is_ours else parts:
        digest.update(part)
    return digest


def _digest(path: str, part: object) -> bytes:
    """Of one thing that a reward holds."""
    digest = hashlib.sha256()
    if isinstance(part, Reward):
        _add(digest, f"part {path}", identify(part).hash)
    elif isinstance(part, Tensor):
        _add(digest, f"weights {path} {part.dtype} {tuple(part.shape)}", _bytes(part))
    elif isinstance(part, np.ndarray):
        _add(digest, f"array {path} {part.dtype} {part.shape}", np.ascontiguousarray(part).tobytes())
    else:
        _add(digest, f"value {path}", repr(part))
    return digest.digest()


def _definition(target: object) -> Callable[..., object]:
    """The function or class behind a reward function, a method, a partial or an object."""
    if isinstance(target, functools.partial):
        return _definition(target.func)
    if inspect.ismethod(target):
        return target.__func__
    return target if inspect.isfunction(target) or inspect.isclass(target) else type(target)


def _add(digest: hashlib._Hash, label: str, data: str | bytes) -> None:
    data = data.encode() if isinstance(data, str) else data
    digest.update(f"{label}\0{len(data)}\0".encode())
    digest.update(data)


def _parts(value: object, path: str, home: str, seen: set[int], depth: int) -> Iterator[tuple[str, object]]:
    """What an object holds that decides its scores, itself excepted, in an order that does not depend on the process.

    Yields tensors, arrays and rewards as they are, and plain values for their `repr`.
    """
    if isinstance(value, int | float | complex | np.generic):
        yield path, value.item() if isinstance(value, np.generic) else value
        return
    if id(value) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(value))
    members: Iterable[tuple[str, object]] = ()
    if isinstance(value, Tensor) or (isinstance(value, Reward) and depth):
        yield path, value
    elif isinstance(value, np.ndarray):
        if not value.dtype.hasobject:
            yield path, value
    elif isinstance(value, functools.partial):
        plain = [*value.args, *sorted(value.keywords.items())]
        yield path, json.dumps(plain, skipkeys=True, default=lambda item: type(item).__qualname__)
        members = ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif inspect.ismethod(value):
        home, members = _home(type(value.__self__)), ((".self", value.__self__),)
    elif isinstance(value, nn.Module):
        yield from ((f"{path}.{name}", tensor) for name, tensor in sorted(value.state_dict().items()))
        members = _plain_attributes(value) if _home(type(value)) in (home, _OURS) else ()
    elif isinstance(value, Mapping):
        members = ((f"[{key}]", value[key]) for key in sorted(value, key=str))
    elif isinstance(value, list | tuple):
        members = ((f"[{index}]", item) for index, item in enumerate(value))
    elif _home(type(value)) in (home, _OURS) and not isinstance(value, type):
        members = ((f".{name}", item) for name, item in sorted(_attributes(value).items()))
    for name, item in members:
        yield from _parts(item, f"{path}{name}", home, seen, depth + 1)


def _home(definition: Callable[..., object]) -> str:
    """The package of a function or class."""
    return definition.__module__.partition(".")[0]


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What a module holds besides parameters, buffers, submodules and its mode."""
    own = sorted(vars(module).items())
    return ((f".{name}", item) for name, item in own if not name.startswith("_") and name != "training")


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
