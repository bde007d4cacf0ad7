"""Weights & Biases: online, or offline with `WANDB_MODE=offline` and `wandb sync` later.

wandb asks a person for a key when it finds none, which would hang an unattended run. Here a run without credentials and
without a mode of the user's choice is logged offline, and says so.
"""

import netrc
import os
import uuid
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from trainers.tracking.base import Identity, Picture, Session, Tracker, TrackerError, optional_import
from trainers.tracking.pictures import enlarge


class WandbTracker(Tracker):
    """Logs to a wandb run whose horizontal axis is the epoch; a resumed run continues under its id.

    What a killed process had sent beyond its checkpoint stays as it is and is not sent again; offline, where wandb
    does not know its own record, the run folder does.
    """

    def __init__(self, session: Session) -> None:
        self._wandb = optional_import("wandb", tracker="wandb")
        self._id = session.identity["id"] if session.identity else uuid.uuid4().hex[:8]
        try:
            self._run = self._wandb.init(
                project=session.project,
                name=session.name,
                id=self._id,
                resume="allow" if session.identity else None,
                config=dict(session.config),
                dir=os.environ.get("WANDB_DIR") or str(session.run.resolve()),
                mode=None if os.environ.get("WANDB_MODE") or has_credentials(self._wandb) else _offline(),
            )
        except self._wandb.Error as error:
            raise TrackerError(f"wandb cannot start: {error}; log offline with WANDB_MODE=offline") from error
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")
        self._sent = Sent(session.run / "wandb_sent.txt", fresh=session.identity is None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers."""
        self._send(metrics, step)

    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """A list of captioned images under one key."""
        images = [
            self._wandb.Image(enlarge(picture.image), caption=picture.caption.replace("\n", " · "))
            for picture in pictures
        ]
        self._send({key: images}, step)

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """A histogram of 32 bins."""
        self._send({key: self._wandb.Histogram(list(values), num_bins=32)}, step)

    def page(self, key: str, file: Path, step: int) -> None:
        """A panel with the page."""
        self._send({key: self._wandb.Html(str(file), inject=False)}, step)

    def _send(self, values: Mapping[str, object], step: int) -> None:
        new = {key: value for key, value in values.items() if self._sent.is_new(key, step)}
        if new:
            self._run.log({**new, "epoch": step})
            self._sent.note(new, step)

    def identity(self) -> Identity:
        """The run's id."""
        return {"id": self._id}

    def close(self) -> None:
        """Uploads what is left, or closes the offline file."""
        self._run.finish()


class Sent:
    """Which keys earlier processes of a run sent at which step, in a file that outlives them."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        """Reads the file, or begins it anew."""
        self._path = path
        lines = [] if fresh or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        self._known = {tuple(line.split(" ", 1)) for line in lines}
        if fresh:
            path.write_text("", encoding="utf-8")

    def is_new(self, key: str, step: int) -> bool:
        """Whether no earlier process sent the key at this step."""
        return (str(step), key) not in self._known

    def note(self, keys: Collection[str], step: int) -> None:
        """Writes down what was sent, for a process that resumes this run."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{step} {key}\n" for key in keys)


def has_credentials(wandb: ModuleType) -> bool:
    """Whether wandb will find a key, looked for where it looks, but without its questions and without a network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(wandb.Settings().base_url).netloc, "api.wandb.ai"}
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in hosts)


def _offline() -> str:
    warnings.warn(
        "wandb finds no credentials: logging offline. Run `wandb login` before the next run, or set WANDB_MODE",
        stacklevel=2,
    )
    return "offline"
