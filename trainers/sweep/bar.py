"""How far a sweep has come: one bar over its runs, a run at work counting by its epochs or minutes."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm.auto import tqdm

from trainers.config import Config
from trainers.run_folder.folder import RunFolder

_TAIL_BYTES = 1 << 17  # of a metrics file: more than two rows


class Bar:
    """A bar on stderr in a terminal, a line for each run that ends; leave it by `close`."""

    def __init__(self, configs: Mapping[Path, Config], *, done: int, total: int) -> None:
        """A bar over `total` runs, `done` of which have ended; `configs` are those of the others, by folder."""
        self._configs, self._done = configs, done
        self._bar = tqdm(
            total=total, initial=done, desc="runs", disable=not sys.stderr.isatty(), dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {postfix} [{elapsed}]",
        )  # fmt: skip
        self._total = total

    def look(self, at_work: Sequence[Path]) -> None:
        """Moves the bar to where the runs at work are."""
        if self._bar.disable:
            return
        self._bar.n = self._done + sum(share(run, self._configs[run]) for run in at_work)
        self._bar.set_postfix_str(f"{self._done} of {self._total} ended, {len(at_work)} at work", refresh=False)
        self._bar.refresh()

    def ended(self, run: Path, failure: str) -> None:
        """A run has ended; `failure` is empty if it is finished."""
        self._done += 1
        tqdm.write(f"[{self._done}/{self._total}] {failure or f'{run.name} finished'}", file=sys.stderr)

    def close(self) -> None:
        """Takes the bar off the terminal's last line."""
        self._bar.close()


def share(run: Path, config: Config) -> float:
    """How much of a run is done, 0 to 1, by the last row of its metrics."""
    path = RunFolder(path=run).metrics_path
    rows: list[dict] = []
    with suppress(OSError):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            for line in file.read().splitlines():
                with suppress(ValueError):
                    rows.append(json.loads(line))
    if not rows:
        return 0.0
    by_epochs = rows[-1].get("epoch", 0) / config.epochs
    by_time = 0.0 if config.max_minutes is None else rows[-1].get("time/total_seconds", 0) / 60 / config.max_minutes
    return float(min(1.0, max(by_epochs, by_time)))
