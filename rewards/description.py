"""What a reward object says of itself once it is made, where `@register` cannot know it: options may decide.

A class that derives from `DescribedReward` returns a `Description`; what it leaves None stays as registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

from rewards.base import Metadata, UserError
from rewards.frames import check_frames
from rewards.reward import Reward


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What scored.

    Attributes:
        name: Of the reward.
        hash: SHA-256, hexadecimal, of what `rewards.identity` lists.
        form: How the hash was made; only hashes of one form compare.
        package_version: Of the package `ddpo` around the reward; empty when it is not installed.
        versions: Of Python and the libraries installed there.
        where: `this process`, or the address of a server.
    """

    name: str
    hash: str
    form: int = 2
    package_version: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    where: str = "this process"

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a reward object; None leaves what was registered.

    Attributes:
        name: What it reports as.
        differentiable: Whether gradients reach the images.
        groupwise: Whether it is called with one whole group at a time.
        frames: Which frames of a video it takes.
        range: Lowest and highest value.
        description: One sentence.
        source: Where it is defined, for messages.
        identity: What computes it, where that is elsewhere.

    Raises:
        UserError: A value is of another kind.
    """

    name: str | None = None
    differentiable: bool | None = None
    groupwise: bool | None = None
    frames: str | None = None
    range: tuple[float, float] | None = None
    description: str | None = None
    source: str | None = None
    identity: Identity | None = None

    def __post_init__(self) -> None:
        for field_name in ("differentiable", "groupwise"):
            value = getattr(self, field_name)
            if value is not None and not isinstance(value, bool):
                raise UserError(f"Description: {field_name} must be True, False or None, got {value!r}")
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise UserError(f"Description: name must be a non-empty text or None, got {self.name!r}")
        if self.frames is not None:
            check_frames(self.frames, "Description")
        check_range(self.range, "Description")

    def applied_to(self, reward: Reward) -> Reward:
        """The reward as described."""
        fields = ("name", "differentiable", "groupwise", "frames", "range", "description", "source")
        return replace(reward, **{name: value for name in fields if (value := getattr(self, name)) is not None})


class DescribedReward(ABC):
    """Base of reward classes whose objects describe themselves."""

    @abstractmethod
    def describe(self) -> Description:
        """What is known of this object; asked once, when it is made."""

    @abstractmethod
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor | dict[str, Tensor]:
        """Scores; see `rewards.base`."""


def described(reward: Reward) -> Reward:
    """A reward as its object describes it; unchanged where it says nothing.

    Raises:
        UserError: `describe` returned something else than a `Description`.
    """
    if not isinstance(reward.function, DescribedReward):
        return reward
    about = reward.function.describe()
    if not isinstance(about, Description):
        raise UserError(
            f"reward {reward.name!r}: describe() must return a rewards.Description, got {type(about).__name__} "
            f"({reward.source})"
        )
    return about.applied_to(reward)


def check_range(bounds: object, what: str) -> None:
    """Raises UserError unless a range is None or `(low, high)` with low < high."""
    if bounds is None:
        return
    pair = bounds if isinstance(bounds, tuple | list) else ()
    if not (len(pair) == 2 and all(isinstance(bound, int | float) for bound in pair) and pair[0] < pair[1]):
        raise UserError(f"{what}: range must be (low, high), low < high, got {bounds!r}")
