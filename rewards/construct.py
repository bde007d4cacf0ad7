"""From a registration to a reward that can be called: options are checked against the constructor before it runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, cast, runtime_checkable

import torch

from rewards.base import Reward, RewardFunction
from rewards.card import Card


@runtime_checkable
class DeclaresGradient(Protocol):
    """A reward object that knows only once it is made whether gradients reach the images, by its options."""

    differentiable: bool


@runtime_checkable
class ReportsAs(Protocol):
    """A reward object that stands for another reward, and reports under that one's name and range."""

    def reported_as(self, reward: Reward) -> Reward:
        """`reward`, which calls this object, as it is to be shown."""


@runtime_checkable
class DeclaresGroups(Protocol):
    """A reward object that knows only once it is made whether it compares the images of a group, by its options."""

    groupwise: bool


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What is known about a reward function or class before it is used.

    Attributes:
        name: the registered name.
        target: the function or class itself.
        differentiable: whether gradients reach the images.
        range: lowest and highest value, None when not stated.
        description: one sentence; the first line of the docstring when not given.
        source: `module.name (file:line)`.
        card: provenance, licence and typical scores.
        groupwise: whether it scores one whole group of images at a time.
    """

    name: str
    target: Callable[..., object]
    differentiable: bool
    range: tuple[float, float] | None
    description: str
    source: str
    card: Card = Card()
    groupwise: bool = False

    def wrap(self, function: RewardFunction) -> Reward:
        """The reward that calls `function`."""
        return Reward(
            name=self.name,
            function=function,
            differentiable=self.differentiable,
            range=self.range,
            description=self.description,
            source=self.source,
            groupwise=self.groupwise,
        )


def construct(noted: Registration, *, device: torch.device | str, options: Mapping[str, object]) -> Reward:
    """Make a reward: a class is constructed with `device` and `options`, a function takes neither.

    Raises:
        ValueError: the options do not fit; the message names the valid ones.
    """
    function: object = noted.target
    check_options(noted, options)
    if inspect.isclass(noted.target):
        function = noted.target(**{"device": torch.device(device), **options})
    if not callable(function):
        raise ValueError(
            f"reward class {noted.name!r} needs __call__(self, images, prompts, metadata) ({noted.source})"
        )
    reward = noted.wrap(cast(RewardFunction, function))
    if isinstance(function, ReportsAs):
        return function.reported_as(reward)
    if isinstance(function, DeclaresGradient):
        reward = replace(reward, differentiable=noted.differentiable and function.differentiable)
    if isinstance(function, DeclaresGroups):
        reward = replace(reward, groupwise=function.groupwise)
    return reward


def check_options(noted: Registration, options: Mapping[str, object]) -> None:
    """Compares options with what a reward's constructor takes, without calling it.

    Raises:
        ValueError: the options do not fit; the message names the valid ones.
    """
    if not inspect.isclass(noted.target):
        if options:
            raise ValueError(
                f"reward {noted.name!r} is a function and takes no options, got {', '.join(options)} ({noted.source}); "
                f"make it a class whose constructor takes them"
            )
        return
    parameters = list(inspect.signature(noted.target).parameters.values())
    keywords = {p.name: p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if keywords.pop("device", None) is None:
        raise ValueError(f"reward class {noted.name!r} must take a keyword argument `device` ({noted.source})")
    valid = ", ".join(keywords) or "none"
    for option in options:
        if option == "device":
            raise ValueError(f"reward {noted.name!r}: `device` is not an option, the run sets it")
        if option not in keywords:
            close = difflib.get_close_matches(option, list(keywords), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"reward {noted.name!r}: unknown option {option!r} ({hint}valid options: {valid})")
    missing = [name for name, p in keywords.items() if p.default is p.empty and name not in options]
    if missing:
        raise ValueError(f"reward {noted.name!r} needs the option {missing[0]!r} (valid options: {valid})")
