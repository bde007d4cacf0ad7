"""Tells when the training reward rises at the expense of rewards that nobody optimises (Goodhart; Gao et al. 2022).

Evaluations use fixed prompts and seeds, so two of them compare image by image. With d the E paired differences of a
measure between two evaluations, z = mean(d) / (std(d) / sqrt(E)). At evaluation e and for each held-out reward h, let
e* be the earlier evaluation with the highest mean of h. The rule, at a threshold t (3 by default):

    over-optimised   if   z of h from e* to e  < -t   and   z of the training reward from e* to e  > +t

A held-out reward that stays, or falls together with the training reward, is no over-optimisation. As e* is chosen for
its height, z is somewhat pessimistic: the threshold allows for it, and several evaluations in a row are asked before a
run is stopped. A held-out reward of negative weight is one to be small.

The best evaluation is the one with the highest sum over held-out rewards of their change since the start, each divided
by its spread over images at the start.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from rewards import WeightedSum
from trainers.evaluation import Measure

Values = Mapping[str, Tensor]

TRAINING = "reward"
_PREFIX = "value."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One held-out reward at one evaluation.

    Attributes:
        reward: Its name.
        since: Epoch of its best earlier evaluation.
        heldout_z: Its change since then, in standard errors; negative is worse.
        training_z: The training reward's change since then, in standard errors.
        over_optimised: Whether the rule of the module docstring holds.
    """

    reward: str
    since: int
    heldout_z: float
    training_z: float
    over_optimised: bool

    def __str__(self) -> str:
        return (
            f"{self.reward} has fallen by {-self.heldout_z:.1f} standard errors since its best evaluation, at epoch "
            f"{self.since}, while the training reward rose by {self.training_z:.1f}"
        )


def paired_z(now: Tensor, then: Tensor) -> float:
    """Mean of the paired differences over its standard error; infinite where all differences are equal and not 0."""
    change = now.double() - then.double()
    mean, error = float(change.mean()), float(change.std(correction=1)) / math.sqrt(len(change))
    if error > 0:
        return mean / error
    return math.copysign(math.inf, mean) if mean else 0.0


def find(history: Mapping[int, Values], signs: Mapping[str, int], *, threshold: float) -> list[Finding]:
    """Judges the newest evaluation.

    Args:
        history: Values of the evaluations by epoch, rising; `reward` and each held-out reward, (E,) each.
        signs: +1 or -1 by held-out reward: whether more of it is better.
        threshold: In standard errors.

    Returns:
        One finding per held-out reward; none for a single evaluation or a single image.
    """
    epochs = list(history)
    newest = history[epochs[-1]]
    if len(epochs) < 2 or len(newest[TRAINING]) < 2:
        return []
    findings = []
    for name, sign in signs.items():
        best = max(epochs[:-1], key=lambda epoch: float(sign * history[epoch][name].double().mean()))
        fall = sign * paired_z(newest[name], history[best][name])
        rise = paired_z(newest[TRAINING], history[best][TRAINING])
        caught = fall < -threshold and rise > threshold
        findings.append(Finding(reward=name, since=best, heldout_z=fall, training_z=rise, over_optimised=caught))
    return findings


def best_epoch(history: Mapping[int, Values], signs: Mapping[str, int]) -> int:
    """The epoch of the best evaluation by the held-out rewards; the earliest of equals.

    Args:
        history: As for `find`.
        signs: As for `find`.
    """
    start = history[next(iter(history))]

    def height(epoch: int) -> float:
        total = 0.0
        for name, sign in signs.items():
            spread = float(start[name].double().std(correction=0)) or 1.0
            total += sign * float((history[epoch][name] - start[name]).double().mean()) / spread
        return total

    return max(history, key=height)


def heldout_signs(heldout: WeightedSum) -> dict[str, int]:
    """Measure names of the held-out rewards and whether more is better."""
    return {f"heldout/{name}": -1 if weight < 0 else 1 for name, weight in heldout.weights().items()}


# ---- a run's files ---------------------------------------------------------------------------------------------------


def evaluation_epochs(folder: Path) -> list[int]:
    """Epochs of the evaluations in a folder, rising."""
    return sorted(int(path.stem.removeprefix("epoch_")) for path in folder.glob("epoch_*.safetensors"))


def read_values(folder: Path, epoch: int) -> dict[str, Tensor]:
    """The values of an evaluation, without its images."""
    with safe_open(folder / f"epoch_{epoch:06d}.safetensors", framework="pt") as file:
        return {key.removeprefix(_PREFIX): file.get_tensor(key) for key in file.keys() if key.startswith(_PREFIX)}  # noqa: SIM118


def read_history(folder: Path, reward: WeightedSum, prompts: Sequence[str]) -> dict[int, dict[str, Tensor]]:
    """All evaluations of a folder by epoch, with the training reward by its present scales and weights."""
    history = {}
    for epoch in evaluation_epochs(folder):
        values = read_values(folder, epoch)
        values[TRAINING] = reward.total(values, prompts)
        history[epoch] = values
    return history


def discard_evaluations(folder: Path, epoch: int) -> None:
    """Removes evaluations and best weights later than `epoch`, which a run resumed from there no longer continues."""
    for later in [found for found in evaluation_epochs(folder) if found > epoch]:
        for suffix in ("safetensors", "json"):
            (folder / f"epoch_{later:06d}.{suffix}").unlink(missing_ok=True)
    for path in (folder.parent / "best").glob("epoch_*"):
        if int(path.name.removeprefix("epoch_")) > epoch:
            shutil.rmtree(path)


def save_record(folder: Path, epoch: int, summary: Mapping[str, Measure], findings: Sequence[Finding]) -> None:
    """Writes `epoch_<n>.json`: means, standard errors, and what was found about the held-out rewards."""
    record = {
        "epoch": epoch,
        "measures": {name: vars(measure) for name, measure in summary.items()},
        "heldout": [{key: _finite(value) for key, value in vars(finding).items()} for finding in findings],
    }
    (folder / f"epoch_{epoch:06d}.json").write_text(json.dumps(record, indent=1) + "\n")


def forget_worse(run: Path, epoch: int) -> None:
    """Removes the best weights of evaluations before that of `epoch`."""
    for path in (run / "best").glob("epoch_*"):
        if path.name != f"epoch_{epoch:06d}":
            shutil.rmtree(path)


def best_weights(run: Path) -> Path | None:
    """The folder of the best evaluation's weights, or None when there is none."""
    return max((run / "best").glob("epoch_*"), default=None)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
