"""From a registration to a reward that can be called: options are checked against the constructor before it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch

from rewards.base import RewardError, RewardFunction, UserError
from rewards.card import Card
from rewards.description import described
from rewards.frames import MIDDLE
from rewards.loading import running
from rewards.nearest import nearest
from rewards.reward import Reward, describe_exception


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What is known about a reward function or class before it is used.

    Attributes:
        name: The registered name.
        target: The function or class itself.
        differentiable: Whether gradients reach the images.
        range: Lowest and highest value, None when not stated.
        description: One sentence; the first line of the docstring when not given.
        source: `module.name (file:line)`.
        card: Provenance, licence and typical scores.
        groupwise: Whether it scores one whole group of images at a time.
        frames: Which frames of a video it takes.
    """

    name: str
    target: Callable[..., object]
    differentiable: bool
    range: tuple[float, float] | None
    description: str
    source: str
    card: Card = Card()
    groupwise: bool = False
    frames: str = MIDDLE

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of this package's own."""
        return self.target.__module__.partition(".")[0] == "rewards"

    def wrap(self, function: Callable[..., object]) -> Reward:
        """The reward that calls `function`, as its object describes it.

        Raises:
            UserError: It cannot be called with images, prompts and metadata.
        """
        check_call(function, name=self.name, source=self.source)
        reward = Reward(
            name=self.name,
            function=cast(RewardFunction, function),
            differentiable=self.differentiable,
            range=self.range,
            description=self.description,
            source=self.source,
            groupwise=self.groupwise,
            frames=self.frames,
        )
        return described(reward)


def construct(noted: Registration, *, device: torch.device | str, options: Mapping[str, object]) -> Reward:
    """Makes a reward: a class is constructed with `device` and `options`, a function takes neither.

    Raises:
        UserError: The options do not fit, the message names the valid ones; or it cannot be called as a reward is.
        RewardError: A constructor of the user's raised, or one called `exit`.
    """
    check_options(noted, options)
    if not inspect.isclass(noted.target):
        return noted.wrap(noted.target)
    try:
        with running(f"reward {noted.name!r}"):
            made = noted.target(**{"device": torch.device(device), **options})
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if noted.is_built_in and not isinstance(error, SystemExit):
            raise
        raise RewardError(
            f"reward {noted.name!r} {describe_exception(error)} when it was made ({noted.source})"
        ) from error
    if not callable(made):
        raise UserError(f"reward class {noted.name!r} needs __call__(self, images, prompts, metadata) ({noted.source})")
    return noted.wrap(made)


def check_call(function: Callable[..., object], *, name: str, source: str) -> None:
    """Compares the signature of a reward function with what it is called with, without calling it.

    Raises:
        UserError: It takes other arguments, or is asynchronous or a generator.
    """
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called) or inspect.isgeneratorfunction(called):
        kind = "a generator" if inspect.isgeneratorfunction(called) else "asynchronous"
        raise UserError(
            f"reward {name!r} is {kind} ({source}), its result would be no tensor; make it a plain function "
            f"{name}(images, prompts, metadata) that returns one number per image"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions in C do not tell
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise UserError(
            f"reward {name!r} is called as {name}(images, prompts, metadata), but it is {name}{signature} ({source}): "
            f"{error}; take these three, in this order"
        ) from error


def check_options(noted: Registration, options: Mapping[str, object]) -> None:
    """Compares options with what a reward's constructor takes, without calling it.

    Raises:
        UserError: The options do not fit; the message names the valid ones. Or a number in them is not finite.
    """
    for option, value in _numbers(options):
        if not math.isfinite(value):
            raise UserError(f"reward {noted.name!r}: option {option!r} must be a finite number, got {value}")
    if not inspect.isclass(noted.target):
        if options:
            raise UserError(
                f"reward {noted.name!r} is a function and takes no options, got {', '.join(options)} ({noted.source}); "
                f"make it a class whose constructor takes them"
            )
        return
    parameters = list(inspect.signature(noted.target).parameters.values())
    keywords = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if keywords.pop("device", None) is None:
        raise UserError(f"reward class {noted.name!r} must take a keyword argument `device` ({noted.source})")
    valid = ", ".join(keywords) or "none"
    for option in options:
        if option == "device":
            raise UserError(f"reward {noted.name!r}: `device` is not an option, the run sets it")
        if option not in keywords:
            close = nearest(option, list(keywords), most=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise UserError(f"reward {noted.name!r}: unknown option {option!r} ({hint}valid options: {valid})")
    missing = [name for name, p in keywords.items() if p.default is p.empty and name not in options]
    if missing:
        raise UserError(f"reward {noted.name!r} needs the option {missing[0]!r} (valid options: {valid})")


def _numbers(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every floating-point number in options, lists and mappings in them included, with its dotted key."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _numbers(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, tuple | list):
        for place, entry in enumerate(value):
            yield from _numbers(entry, f"{path}.{place}")
    elif isinstance(value, float):
        yield path, value
