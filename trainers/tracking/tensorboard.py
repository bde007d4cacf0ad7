"""TensorBoard event files in `<run>/tensorboard`; `tensorboard --logdir <output_dir>` shows them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainers.tracking.base import Identity, Picture, Session, Tracker, optional_import
from trainers.tracking.pictures import captioned


class TensorboardTracker(Tracker):
    """Logs event files. A resumed run hides the steps a killed process had logged beyond its checkpoint."""

    def __init__(self, session: Session) -> None:
        module = optional_import("torch.utils.tensorboard", tracker="tensorboard")
        purge = session.first_step if session.identity is not None else None
        self._writer = module.SummaryWriter(str(session.run / "tensorboard"), purge_step=purge)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers."""
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def images(self, key: str, pictures: Sequence[Picture], step: int) -> None:
        """Images with their captions drawn into them, since TensorBoard has none."""
        for index, picture in enumerate(pictures):
            image = np.asarray(captioned(picture.image, picture.caption))
            self._writer.add_image(f"{key}/{index}", image, step, dataformats="HWC")
        self._writer.flush()

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """A histogram."""
        self._writer.add_histogram(key, np.asarray(values, dtype=np.float64), step)
        self._writer.flush()

    def page(self, key: str, file: Path, step: int) -> None:
        """TensorBoard shows no pages: a text that says where it is."""
        self._writer.add_text(key, str(file), step)
        self._writer.flush()

    def identity(self) -> Identity:
        """The folder is the run's own: only the fact that it was begun is kept."""
        return {"folder": "tensorboard"}

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
