"""What a tracker is: somewhere to send numbers, pictures and distributions while a run goes on."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

from ddpo.validation import UserError

Identity = dict[str, str]


class TrackerError(UserError):
    """A tracker cannot start; the message names the cure."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A captioned image.

    Attributes:
        image: RGB, any size; trackers enlarge tiny ones.
        caption: Prompt and reward, as `trainers.tracking.pictures.caption` writes them.
    """

    image: Image.Image
    caption: str


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a tracker is told when it starts.

    Attributes:
        run: The run folder; its name is the run's name.
        project: Groups runs in a dashboard.
        config: The resolved configuration, JSON-able.
        first_step: The first step this process will log; above 0 for a resumed run.
        identity: What `Tracker.identity` returned when the run began; None for a new run.
    """

    run: Path
    project: str
    config: Mapping[str, object]
    first_step: int = 0
    identity: Identity | None = None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.resolve().name


class Tracker(ABC):
    """Receives metrics. `step` is the epoch, and never decreases within a process."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers by name.

        Args:
            metrics: Numbers; a `/` in a name groups it.
            step: The epoch.
        """

    @abstractmethod
    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """Pictures that show the same thing at later steps.

        Args:
            key: Their name, the same at every step.
            pictures: With their captions.
            step: The epoch.
        """

    @abstractmethod
    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """A distribution.

        Args:
            key: Its name, the same at every step.
            values: Finite.
            step: The epoch.
        """

    @abstractmethod
    def page(self, key: str, file: Path, step: int) -> None:
        """A page of HTML that needs nothing else; dropped where a tracker shows none.

        Args:
            key: Its name.
            file: The page.
            step: The epoch.
        """

    @abstractmethod
    def identity(self) -> Identity:
        """What a resumed run needs to continue this record rather than begin another."""

    @abstractmethod
    def close(self) -> None:
        """Sends what is left. Nothing may be logged afterwards."""


class NullTracker(Tracker):
    """Drops everything: on all processes but the main one, and where no tracker is wanted."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """Nothing."""

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Nothing."""

    def page(self, key: str, file: Path, step: int) -> None:
        """Nothing."""

    def identity(self) -> Identity:
        """Nothing to remember."""
        return {}

    def close(self) -> None:
        """Nothing."""


def optional_import(module: str, *, tracker: str) -> ModuleType:
    """The module, or a `TrackerError` that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise TrackerError(
            f"the tracker {tracker} needs the package {error.name}, which is not installed: "
            f"pip install 'ddpo[{tracker}]', or choose others with --tracking.trackers"
        ) from error
