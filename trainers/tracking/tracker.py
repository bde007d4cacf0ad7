"""Where a run's numbers and pictures go besides metrics.jsonl: a table of trackers, opened and guarded as one.

A tracker that cannot start is an error, before anything heavy. One that fails later (network, full disk) never ends a
run: it warns at its first failure, is tried again at every call, and says at the end how many calls were lost.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.tracking.base import Identity, NullTracker, Picture, Session, Tracker, TrackerError
from trainers.tracking.tensorboard import TensorboardTracker
from trainers.tracking.trackio import TrackioTracker, default_directory, directory_of, load_trackio
from trainers.tracking.wandb import WandbTracker

__all__ = ["NullTracker", "Picture", "Tracker", "TrackerError", "open_trackers", "show_dashboard"]

TRACKERS: dict[str, Callable[[Session], Tracker]] = {
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
}
PACKAGED = frozenset({"trackio", "wandb", "tensorboard"})
"""Trackers that need the package of their name, which the extra of that name installs."""
IDENTITIES = "tracking.json"


def open_trackers(
    names: Sequence[str],
    *,
    run: Path,
    project: str,
    config: Mapping[str, object],
    main_process: bool = True,
    first_step: int = 0,
) -> Tracker:
    """Starts trackers for a run folder, or continues those recorded in its tracking.json.

    Args:
        names: Keys of `TRACKERS`; none is allowed.
        run: The run folder.
        project: Groups runs in a dashboard.
        config: The resolved configuration, JSON-able.
        main_process: Elsewhere nothing is started and nothing is written.
        first_step: The first step that will be logged; above 0 for a resumed run.

    Returns:
        One tracker that passes everything on to all of them, finite numbers only.

    Raises:
        TrackerError: One cannot start.
    """
    unknown = [name for name in names if name not in TRACKERS]
    if unknown:
        raise TrackerError(f"there is no tracker {unknown[0]!r}; there are {', '.join(TRACKERS)}")
    if not main_process or not names:
        return NullTracker()
    identities = _identities(run)
    members: dict[str, Tracker] = {}
    for name in names:
        session = Session(run=run, project=project, config=config, first_step=first_step, identity=identities.get(name))
        members[name] = TRACKERS[name](session)
        identities[name] = members[name].identity()
        _write_identities(run, identities)
    return Trackers(members)


class Trackers(Tracker):
    """Passes every call on to each member and turns a member's failure into a warning."""

    def __init__(self, members: Mapping[str, Tracker]) -> None:
        self._members = dict(members)
        self._lost = dict.fromkeys(members, 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers; those that are not finite are left out (metrics.jsonl has them as null)."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._each(lambda member: member.log(finite, step))

    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """Pictures."""
        self._each(lambda member: member.images(key, pictures, step))

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """The distribution of those values that are finite, if any."""
        finite = [float(value) for value in values if math.isfinite(value)]
        if finite:
            self._each(lambda member: member.histogram(key, finite, step))

    def page(self, key: str, file: Path, step: int) -> None:
        """A page of HTML."""
        self._each(lambda member: member.page(key, file, step))

    def identity(self) -> Identity:
        """Each member's own is in tracking.json."""
        return {}

    def close(self) -> None:
        """Closes all, and reports what was lost."""
        self._each(lambda member: member.close())
        for name, lost in self._lost.items():
            if lost:
                warnings.warn(
                    f"the tracker {name} lost {lost} calls during this run; metrics.jsonl is complete", stacklevel=2
                )

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, member in self._members.items():
            try:
                call(member)
            except Exception as error:  # whatever kind: a dashboard must not end a run
                self._lost[name] += 1
                if self._lost[name] == 1:
                    warnings.warn(
                        f"the tracker {name} failed ({type(error).__name__}: {error}); the run goes on, "
                        "metrics.jsonl stays complete, and the tracker is tried again at every log",
                        RuntimeWarning,
                        stacklevel=3,
                    )


def _identities(run: Path) -> dict[str, Identity]:
    path = Path(run) / IDENTITIES
    if not path.is_file():
        return {}
    try:
        identities = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(identities, dict) or not all(isinstance(one, dict) for one in identities.values()):
            raise ValueError("it is no table of trackers")
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}): the run begins new records in its trackers", stacklevel=3)
        return {}
    return identities


def _write_identities(run: Path, identities: Mapping[str, Identity]) -> None:
    partial = Path(run) / f".{IDENTITIES}.partial"
    partial.write_text(json.dumps(identities, indent=1) + "\n", encoding="utf-8")
    partial.replace(Path(run) / IDENTITIES)


# --- dashboard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """A running local page.

    Attributes:
        url: Its address.
        close: Stops it.
    """

    url: str
    close: Callable[[], None]


def show_dashboard(
    run: Path | None = None,
    *,
    port: int | None = None,
    open_browser: bool = True,
    block: bool = True,
    output_dir: Path = Path("runs"),
) -> Dashboard:
    """Serves the local trackio page of a run's project, live while the run goes on.

    Args:
        run: A run folder; None shows every project of `output_dir`.
        port: Port on this machine; None takes the first free one from 7860 on.
        open_browser: Whether to open a tab.
        block: Whether to serve until Ctrl-C; else the page lives until `Dashboard.close` or the end of the process.
        output_dir: Where runs are, when none is given.

    Raises:
        TrackerError: The run was not logged with trackio, there are no runs yet, or the port is taken.
    """
    directory, project = _location(run, output_dir)
    trackio = load_trackio(directory)
    try:
        server, url, _, _ = trackio.show(
            project=project, server_port=port, open_browser=open_browser, block_thread=block
        )
    except OSError as error:
        raise TrackerError(f"cannot serve the page on port {port}: {error}; choose another with --port") from error
    return Dashboard(url=f"{url.rstrip('/')}/?project={project}" if project else url, close=server.close)


def _location(run: Path | None, output_dir: Path) -> tuple[str, str | None]:
    """The folder of trackio and the project to show; None for all of them."""
    if run is None:
        directory = default_directory(Path(output_dir))
        if not Path(directory).is_dir():
            raise TrackerError(
                f"there is no trackio data in {directory}: start a run, or name one: `ddpo dashboard RUN`"
            )
        return directory, None
    if not Path(run).is_dir():
        raise TrackerError(f"there is no run folder {run}")
    identities = _identities(run)
    if "trackio" not in identities:
        used = ", ".join(identities) or "no tracker"
        raise TrackerError(
            f"{run} was logged with {used}, not with trackio; its numbers are in metrics.jsonl, TensorBoard's with "
            f"`tensorboard --logdir {run}`, wandb's on its page"
        )
    return directory_of(Path(run), identities["trackio"]), identities["trackio"]["project"]
