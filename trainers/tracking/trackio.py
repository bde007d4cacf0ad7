"""trackio: a local page, live, without an account or a network. The default.

All runs of an output folder share `<output_dir>/.trackio` (an SQLite file per project), so that one page compares them;
`TRACKIO_DIR` in the environment takes precedence. trackio reads that variable once, when it is first imported.
"""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from trainers.tracking.base import Identity, Picture, Session, Tracker, optional_import
from trainers.tracking.first_look import ORDER
from trainers.tracking.pictures import enlarge


class TrackioTracker(Tracker):
    """Logs to a local trackio project.

    A resumed run continues under its name. trackio cannot take points back: those that a killed process had logged
    beyond its checkpoint stay as they are, and are not logged again.
    """

    def __init__(self, session: Session) -> None:
        self._trackio = load_trackio(directory_of(session.run, session.identity))
        with quiet():
            self._run = self._trackio.init(
                project=session.project,
                name=session.name,
                config=dict(session.config),
                resume="allow" if session.identity else "never",
                embed=False,
            )
        self._project = session.project
        self._logged = self._known() if session.identity else set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers; trackio writes them within half a second, from a thread of its own."""
        self._send(metrics, step)

    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """Pictures under `key/00`, `key/01`, ...: trackio drops a list under one key."""
        width = len(str(len(pictures) - 1))
        named = {f"{key}/{index:0{width}d}": picture for index, picture in enumerate(pictures)}
        images = {
            name: self._trackio.Image(enlarge(p.image), caption=p.caption.replace("\n", " · "))
            for name, p in named.items()
        }
        self._send(images, step)

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """A histogram of 32 bins."""
        self._send({key: self._trackio.Histogram(list(values), num_bins=32)}, step)

    def page(self, key: str, file: Path, step: int) -> None:
        """A page in a frame of the dashboard."""
        self._send({key: self._trackio.Html(file)}, step)

    def _send(self, values: Mapping[str, object], step: int) -> None:
        """Logs those values that the record has not at this step."""
        new = {key: value for key, value in values.items() if (key, step) not in self._logged}
        if new:
            self._run.log(new, step=step)

    def _known(self) -> set[tuple[str, int]]:
        """Keys and steps of the record that this run continues."""
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._project, self._run.name, run_id=self._run.id)
        return {(key, row["step"]) for row in rows for key in row}

    def identity(self) -> Identity:
        """Project, run and folder: enough to continue it and to show its page."""
        return {"project": self._project, "run": self._run.name, "directory": str(self._trackio.TRACKIO_DIR)}

    def close(self) -> None:
        """Writes what is queued, waiting up to 30 s."""
        with quiet():
            self._run.finish()
        if self._trackio.context_vars.current_run.get() is self._run:
            self._trackio.context_vars.current_run.set(None)  # else trackio finishes it again, aloud, at exit


def default_directory(output_dir: Path) -> str:
    """`TRACKIO_DIR` where the user has set it, else `<output_dir>/.trackio`."""
    return os.environ.get("TRACKIO_DIR") or str(output_dir.resolve() / ".trackio")


def directory_of(run: Path, identity: Identity | None) -> str:
    """Where a run was logged; for a new run, or one that was moved away from there, the default."""
    if identity and Path(identity["directory"]).is_dir():
        return identity["directory"]
    return default_directory(run.resolve().parent)


def load_trackio(directory: str) -> ModuleType:
    """Imports trackio so that it uses `directory`; warns when this process has already bound it to another one."""
    if "trackio" not in sys.modules:
        os.environ["TRACKIO_DIR"] = directory
    os.environ.setdefault("TRACKIO_PLOT_ORDER", ",".join(ORDER))
    trackio = optional_import("trackio", tracker="trackio")
    if Path(trackio.TRACKIO_DIR).resolve() != Path(directory).resolve():
        warnings.warn(
            f"trackio already uses {trackio.TRACKIO_DIR} in this process, and not {directory}: it stays there",
            stacklevel=2,
        )
    return trackio


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what trackio prints about itself; its warnings and errors still come through."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
