"""Tells when the training reward rises at the expense of rewards that nobody optimises (Goodhart; Gao et al. 2022).

Evaluations use fixed prompts and seeds, so two of them compare image by image. With d the paired differences of a
measure between two evaluations, z = mean(d) / se(d), the images of a caption counting as one draw. At the e-th
evaluation after the first and for each of H held-out rewards h, let e* be the earlier evaluation with the highest mean
of h. The rule:

    over-optimised   if   z of h from e* to e  < -t(e)   and   z of the training reward from e* to e  > t(e)

    t(e)    Student's quantile of C - 1 degrees of freedom, for C captions, with the tail
            q / ( H e^2 (e + 1) ),    q the share of unchanged runs in which the rule may warn at all (.05)

As e* is one of e earlier evaluations, chosen for its height, the tail is shared among e comparisons; a run looks again
and again, so the looks share q by 1 / (e (e + 1)), which sums to 1 over a run of any length. The sum holds whatever the
dependence of the looks (Bonferroni); each look's share is Student's, so it is right for differences that are roughly
normal over captions: from about eight captions on where a reward is 0 or 1. A fixed threshold instead is given by
number: its false alarms add up over a run.

A held-out reward that stays, or falls together with the training reward, is no over-optimisation. Several evaluations
in a row are asked before a run is stopped. A held-out reward of negative weight is one to be small.

The best evaluation is the one with the highest sum over held-out rewards of their change since the start, each divided
by its spread over images at the start. E images of C captions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from scipy import stats
from torch import Tensor

from rewards import WeightedSum
from trainers.evaluation.evaluator import CAPTIONS, VALUE
from trainers.evaluation.statistics import Measure
from trainers.run_folder.folder import RunFolder

Values = Mapping[str, Tensor]

TRAINING = "reward"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One held-out reward at one evaluation.

    Attributes:
        reward: Its name.
        since: Epoch of its best earlier evaluation.
        heldout_z: Its change since then, in standard errors; negative is worse.
        training_z: The training reward's change since then, in standard errors.
        limit: What both must pass, in standard errors.
        over_optimised: Whether the rule of the module docstring holds.
    """

    reward: str
    since: int
    heldout_z: float
    training_z: float
    limit: float
    over_optimised: bool

    def __str__(self) -> str:
        return (
            f"{self.reward} has fallen by {-self.heldout_z:.1f} standard errors since its best evaluation, at epoch "
            f"{self.since}, while the training reward rose by {self.training_z:.1f} (both must pass {self.limit:.1f})"
        )


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a change counts.

    Attributes:
        false_alarms: q, the share of unchanged runs that may be warned of.
        threshold: A fixed number of standard errors in its place; None for the sequential test.
    """

    false_alarms: float = 0.05
    threshold: float | None = None

    def limit(self, look: int, *, rewards: int, captions: int) -> float:
        """t(e) of the module docstring.

        Args:
            look: e, from 1.
            rewards: H.
            captions: Draws that the errors are made of, at least 2.
        """
        if self.threshold is not None:
            return self.threshold
        tail = self.false_alarms / (rewards * look**2 * (look + 1))
        return float(stats.t.isf(tail, captions - 1))


def paired_z(now: Tensor, then: Tensor, captions: Tensor) -> float:
    """Mean of the paired differences over its standard error.

    Differences that are all equal and not 0 have no standard error; they weigh what C signs that agree do, the normal
    quantile of 2^-C for C captions: few captions of a reward that is 0 or 1 often agree by chance.
    """
    change = Measure.of(now.double() - then.double(), captions)
    if change.error:
        return change.mean / change.error
    draws = len(captions.unique()) if len(captions.unique()) > 1 else len(captions)
    return math.copysign(float(-stats.norm.ppf(0.5**draws)), change.mean) if change.mean else 0.0


def find(history: Mapping[int, Values], signs: Mapping[str, int], captions: Tensor, *, rule: Rule) -> list[Finding]:
    """Judges the newest evaluation.

    Args:
        history: Values of the evaluations by epoch, rising; `reward` and each held-out reward, (E,) each.
        signs: +1 or -1 by held-out reward: whether more of it is better.
        captions: Numbers of the images' captions, (E,) int64.
        rule: When a change counts.

    Returns:
        One finding per held-out reward; none for a single evaluation or a single image.
    """
    epochs = list(history)
    newest = history[epochs[-1]]
    if len(epochs) < 2 or len(captions) < 2:
        return []
    distinct = len(captions.unique())
    draws = distinct if distinct > 1 else len(captions)
    limit = rule.limit(len(epochs) - 1, rewards=len(signs), captions=draws)
    findings = []
    for name, sign in signs.items():
        best = max(epochs[:-1], key=lambda epoch: float(sign * history[epoch][name].double().mean()))
        fall = sign * paired_z(newest[name], history[best][name], captions)
        rise = paired_z(newest[TRAINING], history[best][TRAINING], captions)
        caught = fall < -limit and rise > limit
        findings.append(
            Finding(reward=name, since=best, heldout_z=fall, training_z=rise, limit=limit, over_optimised=caught)
        )
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
    terms = zip(heldout.terms, heldout.rewards, strict=True)
    return {f"heldout/{reward.name}": -1 if term.weight < 0 else 1 for term, reward in terms}


# ---- a run's files ---------------------------------------------------------------------------------------------------


def read_values(file: Path) -> dict[str, Tensor]:
    """The values of an evaluation, without its images."""
    with safe_open(file, framework="pt") as opened:
        return {key.removeprefix(VALUE): opened.get_tensor(key) for key in opened.keys() if key.startswith(VALUE)}  # noqa: SIM118


def read_captions(file: Path) -> Tensor:
    """Numbers of the captions of an evaluation's images, (E,) int64; older files tell them by the diversity of each."""
    with safe_open(file, framework="pt") as opened:
        names = set(opened.keys())
        if CAPTIONS in names:
            return opened.get_tensor(CAPTIONS)
        count = opened.get_slice("images").get_shape()[0]
        of_each = next((name for name in ("pixel_diversity", "diversity") if f"{VALUE}{name}" in names), None)
        captions = count if of_each is None else opened.get_slice(f"{VALUE}{of_each}").get_shape()[0]
    return torch.arange(count) // (count // captions)


def read_history(
    run: RunFolder, reward: WeightedSum, prompts: Sequence[str], *, epoch: int
) -> dict[int, dict[str, Tensor]]:
    """All evaluations of a run by epoch, the training reward by the first one's scales and by weights at `epoch`."""
    history = {evaluated: read_values(run.evaluated(evaluated)) for evaluated in run.evaluated_epochs()}
    scales = first_scales(run, reward, prompts)
    for values in history.values():
        values[TRAINING] = scales.total(values, prompts, epoch=epoch)
    return history


def first_scales(run: RunFolder, reward: WeightedSum, prompts: Sequence[str]) -> WeightedSum:
    """The reward by the scales of a run's first evaluation, by which all of them are scored."""
    first = read_values(run.evaluated(run.evaluated_epochs()[0]))
    return reward.scaled_by({one.name: first[one.name] for one in reward.rewards}, prompts)


def save_record(run: RunFolder, epoch: int, summary: Mapping[str, Measure], findings: Sequence[Finding]) -> None:
    """Writes means, standard errors, and what was found about the held-out rewards beside an evaluation, as JSON."""
    record = {
        "epoch": epoch,
        "measures": {name: vars(measure) for name, measure in summary.items()},
        "heldout": [{key: _finite(value) for key, value in vars(finding).items()} for finding in findings],
    }
    run.save_json(run.relative(run.evaluation(epoch).with_suffix(".json")), record)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
