"""From a name to a reward, once, at the configuration boundary.

    jpeg_compressibility        a registered name: built in, registered by your code, or an installed plug-in
    my_rewards.py:sharpness     a function or class in a file
    my_package.scores:sharpness a function or class in an importable module

A function is used as it is. A class is constructed with `device` and the options of the configuration as keyword
arguments; its instances are then the reward functions. Installed packages offer rewards through the entry point group
`ddpo.rewards`. Built-in modules are imported when one of their names is first asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TypeVar, overload

import torch

from rewards.base import UserError
from rewards.card import Card
from rewards.construct import Registration, construct
from rewards.description import check_range
from rewards.frames import MIDDLE, check_frames
from rewards.loading import load, load_file, running
from rewards.nearest import nearest
from rewards.reward import Reward, describe_exception

__all__ = ["as_reward", "available", "find", "load_file", "register", "resolve"]

ENTRY_POINT_GROUP = "ddpo.rewards"

BUILT_IN = {
    "jpeg_compressibility": "rewards.builtin.jpeg",
    "jpeg_incompressibility": "rewards.builtin.jpeg",
    "jpeg_estimate": "rewards.builtin.jpeg_estimate",
    "brightness": "rewards.builtin.color",
    "redness": "rewards.builtin.color",
    "greenness": "rewards.builtin.color",
    "blueness": "rewards.builtin.color",
    "sharpness": "rewards.builtin.statistics",
    "colourfulness": "rewards.builtin.statistics",
    "entropy": "rewards.builtin.statistics",
    "symmetry": "rewards.builtin.statistics",
    "clip_score": "rewards.builtin.clip_score",
    "aesthetic": "rewards.builtin.aesthetic",
    "hpsv2": "rewards.builtin.hpsv2",
    "pickscore": "rewards.builtin.pickscore",
    "siglip_score": "rewards.builtin.siglip_score",
    "aesthetic_v2_5": "rewards.builtin.aesthetic_v2_5",
    "imagereward": "rewards.builtin.imagereward",
    "ocr": "rewards.builtin.ocr",
    "imagenet_class": "rewards.builtin.imagenet",
    "diversity": "rewards.builtin.diversity",
    "motion_smoothness": "rewards.builtin.motion",
    "framewise": "rewards.combine.framewise",
    "rank": "rewards.combine.rank",
    "win_rate": "rewards.combine.rank",
    "safety": "rewards.builtin.safety",
    "safety_margin": "rewards.builtin.safety",
    "geneval": "rewards.builtin.geneval.reward",
    "vlm_judge": "rewards.builtin.vlm_judge",
    "nsfw": "rewards.builtin.nsfw",
    "nsfw_vit": "rewards.builtin.nsfw",
    "chebyshev": "rewards.combine.scalarize",
    "geometric": "rewards.combine.scalarize",
    "straight_through": "rewards.combine.surrogate",
    "remote": "rewards.serving.remote",
    "learned": "rewards.preferences.learned",
    "shapes": "rewards.builtin.shapes.reward",
    "shapes_strict": "rewards.builtin.shapes.reward",
    "shapes_partial": "rewards.builtin.shapes.reward",
}

Target = TypeVar("Target", bound=Callable[..., object])

_registrations: dict[str, Registration] = {}


@overload
def register(name: Target) -> Target: ...
@overload
def register(
    name: str | None = None,
    *,
    differentiable: bool = False,
    range: tuple[float, float] | None = None,
    description: str = "",
    card: Card | None = None,
    groupwise: bool = False,
    frames: str = MIDDLE,
) -> Callable[[Target], Target]: ...
def register(
    name: Target | str | None = None,
    *,
    differentiable: bool = False,
    range: tuple[float, float] | None = None,
    description: str = "",
    card: Card | None = None,
    groupwise: bool = False,
    frames: str = MIDDLE,
) -> Target | Callable[[Target], Target]:
    """Registers a reward function or class under a name; returns it unchanged.

    Args:
        name: The name used in configurations; the function's own name when left out (`@register` alone works too).
        differentiable: Whether gradients reach the images through it.
        range: Lowest and highest value, infinities allowed.
        description: One sentence for `ddpo rewards list`; the docstring's first line when empty.
        card: Provenance, licence and typical scores for `ddpo rewards list --verbose`.
        groupwise: Whether it takes one whole group, the images of one prompt, at a time.
        frames: Which frames of a video it takes: `middle`, a picture; `all` or `every N`, `(B, F, 3, H, W)`.

    Raises:
        UserError: The name is taken by another reward, or is not usable as a name.
    """
    if name is not None and not isinstance(name, str):
        _add(_describe(name, None))
        return name

    def decorate(target: Target) -> Target:
        noted = _describe(
            target,
            name,
            differentiable=differentiable,
            range=range,
            description=description,
            card=card,
            groupwise=groupwise,
            frames=frames,
        )
        _add(noted)
        return target

    return decorate


def resolve(spec: str, *, device: torch.device | str = "cpu", options: Mapping[str, object] | None = None) -> Reward:
    """Finds a reward by name and makes it ready to call.

    Args:
        spec: A registered name, `file.py:name`, or `module:name`.
        device: Where a reward with weights puts them; passed to classes only.
        options: Keyword arguments for a reward class.

    Raises:
        UserError: Nothing goes by that name, or the options do not fit; the message says what would.
        ImportError: The reward needs an optional dependency; the message names the extra to install.
    """
    return construct(find(spec), device=device, options=options or {})


def find(spec: str) -> Registration:
    """Finds a reward's registration without constructing it; see `resolve` for the forms of `spec`."""
    spec = spec.strip()
    where, colon, name = spec.rpartition(":")
    if colon:
        return _find_in(load(where), name, where=where)
    if spec.endswith(".py"):
        raise UserError(f"reward {spec!r} names a file but not what is in it; write {spec}:name")
    return _find_registered(spec)


def as_reward(target: Callable[..., object], *, name: str | None = None) -> Reward:
    """Wraps a reward function or a constructed reward object, using what `@register` noted about it if anything.

    Args:
        target: The callable; a `Reward` is returned as it is.
        name: The name to show for an unregistered one instead of its own.
    """
    if isinstance(target, Reward):
        return target
    if inspect.isclass(target):
        raise UserError(f"{target.__name__} is a class; construct it first: {target.__name__}(device=...)")
    noted = _noted(target) or _noted(type(target)) or _describe(target, name)
    return noted.wrap(target)


def card_of(target: object) -> Card:
    """The card that a reward function, or the class of a reward object, was registered with; empty without one."""
    noted = _noted(target) or _noted(type(target))
    return noted.card if noted else Card()


def available() -> dict[str, str]:
    """Every name that `resolve` knows, sorted, with where it comes from; imports nothing."""
    names = {point.name: f"entry point {point.value}" for point in entry_points(group=ENTRY_POINT_GROUP)}
    names |= {name: f"built in ({module})" for name, module in BUILT_IN.items()}
    names |= {name: noted.source for name, noted in _registrations.items()}
    return dict(sorted(names.items()))


# ------------------------------------------------------------------------------------------------ noting


def _add(new: Registration) -> None:
    if not new.name or any(letter.isspace() or letter in ":/" for letter in new.name):
        raise UserError(f"reward name {new.name!r} ({new.source}) must be non-empty, without spaces, ':' or '/'")
    check_range(new.range, f"reward {new.name!r} ({new.source})")
    home = BUILT_IN.get(new.name)
    old = _registrations.get(new.name)
    taken_by = None
    if home is not None and new.target.__module__ != home:
        taken_by = f"the built-in module {home}"
    elif old is not None and _identity(old.target) != _identity(new.target):
        taken_by = old.source
    if taken_by is not None:
        raise UserError(
            f"reward name {new.name!r} is already taken by {taken_by}; "
            f"give {new.source} another name: @register('other_name')"
        )
    _registrations[new.name] = new


def _identity(target: object) -> tuple[str, str]:
    """Module and qualified name: equal when a module is reloaded or a notebook cell is run again."""
    return getattr(target, "__module__", ""), getattr(target, "__qualname__", type(target).__qualname__)


def _describe(
    target: Callable[..., object],
    name: str | None,
    *,
    differentiable: bool = False,
    range: tuple[float, float] | None = None,
    description: str = "",
    card: Card | None = None,
    groupwise: bool = False,
    frames: str = MIDDLE,
) -> Registration:
    own_name = getattr(target, "__name__", type(target).__name__)
    check_frames(frames, f"reward {name or own_name!r}")
    return Registration(
        name=own_name if name is None else name,
        target=target,
        differentiable=differentiable,
        range=range,
        description=description or (inspect.getdoc(target) or "").partition("\n")[0],
        source=_source(target),
        card=card or Card(),
        groupwise=groupwise,
        frames=frames,
    )


def _source(target: object) -> str:
    definition = target if inspect.isclass(target) or inspect.isfunction(target) else type(target)
    label = ".".join(_identity(definition))
    try:
        return f"{label} ({inspect.getsourcefile(definition)}:{inspect.getsourcelines(definition)[1]})"
    except (OSError, TypeError):  # defined in a console, or in C
        return label


# ----------------------------------------------------------------------------------------------- finding


def _find_registered(name: str) -> Registration:
    if name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
        assert name in _registrations, f"{BUILT_IN[name]} does not register {name!r}"
    noted = _registrations.get(name)
    known = [] if noted is None else [noted.source]
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    foreign = [point for point in points if noted is None or not _leads_to(point, noted)]
    if len(foreign) + len(known) > 1:
        sources = " and ".join(known + [f"entry point {point.value}" for point in foreign])
        raise UserError(f"reward name {name!r} is claimed by {sources}; uninstall one, or write it as module:name")
    if foreign:
        return _load_entry_point(foreign[0])
    if noted is None:
        raise UserError(_unknown(name))
    return noted


def _leads_to(point: EntryPoint, noted: Registration) -> bool:
    """Whether an entry point stands for what is registered, perhaps through another module than defines it."""
    if point.module == noted.target.__module__:
        return True
    try:
        return _identity(point.load()) == _identity(noted.target)
    except Exception:  # whatever a plug-in that cannot be loaded raises: it is no such export
        return False


def _load_entry_point(point: EntryPoint) -> Registration:
    try:
        with running(point.value):
            target = point.load()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"reward {point.name!r}: its entry point {point.value} cannot be loaded, it {describe_exception(error)}"
        ) from error
    return _noted(target) or _describe_unregistered(target, point.name, where=f"entry point {point.value}")


def _unknown(name: str) -> str:
    names = list(available())
    close = nearest(name, names, alike=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(names)}."
    return f"unknown reward {name!r}; {hint} Your own function is written file.py:name or module:name"


def _find_in(module: ModuleType, name: str, *, where: str) -> Registration:
    """The reward of a module that is registered as `name` or is simply called so."""
    own = {key: noted for key, noted in _registrations.items() if noted.target.__module__ == module.__name__}
    if name in own:
        return own[name]
    if name in vars(module):
        target = vars(module)[name]
        return _noted(target) or _describe_unregistered(target, name, where=where)
    defined = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    choices = sorted(set(own) | {key for key in defined if not key.startswith("_")})
    close = nearest(name, choices, most=1, alike=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"it defines {', '.join(choices) or 'nothing'}"
    raise UserError(f"{where} has no reward {name!r}; {hint}")


def _noted(target: object) -> Registration | None:
    return next((noted for noted in _registrations.values() if noted.target is target), None)


def _describe_unregistered(target: object, name: str, *, where: str) -> Registration:
    if not callable(target):
        raise UserError(
            f"{where}: {name!r} is a {type(target).__name__}, not a reward; a reward is a function "
            f"(images, prompts, metadata) -> Tensor (B,), or a class whose instances are"
        )
    return _describe(target, name)
