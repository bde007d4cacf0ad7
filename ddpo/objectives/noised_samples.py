"""Noised clean samples, and what the trained weights and the frozen ones see in them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ddpo.objectives.base import Models
from ddpo.objectives.clean_sample_presets import Knobs
from ddpo.objectives.noising import draw_noises, step_shares
from ddpo.sampling.prediction import Prediction
from ddpo.trajectory import Condition, Trajectory

if TYPE_CHECKING:  # the configuration is read without loading diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class NoisedSamples:
    """A micro-batch of N noises of clean latents.

    Attributes:
        steps: Step k at whose noise level each is, (N,) int64.
        clean: Clean latents, (N, *latent).
        eps: Standard normal noise, (N, *latent).
        weights: What the samples are worth, (N,): weights with mean 1 over those compared, or clipped advantages.
        condition: N rows.
    """

    steps: Tensor
    clean: Tensor
    eps: Tensor
    weights: Tensor
    condition: Condition


def drawn(knobs: Knobs, path: Trajectory, rows: Tensor, slots: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Steps (N,) and noises (N, *latent) of the units (rows[n], slots[n]), on the CPU.

    Args:
        knobs: All settings.
        path: The samples of this process.
        rows: Samples, (N,) int64.
        slots: Which of a sample's noises, (N,) int64.
        seed: Of the pass.
    """
    shares = step_shares(path.schedule, knobs.times, skip=knobs.skip_steps)
    strata, seeds = knobs.noises if knobs.stratified else 1, path.seeds[rows].tolist()
    return draw_noises(seed, seeds, slots.tolist(), shares, strata=strata, like=path.final[rows])


def predictions(knobs: Knobs, policy: "Policy", models: Models, batch: NoisedSamples) -> dict[str, Prediction]:
    """What the samples themselves stand for (`data`), and what the weights see: `own`, and `old` and `reference`.

    Args:
        knobs: Say which of the last two are needed.
        policy: The view that is trained.
        models: Have the old policy's weights.
        batch: N noised samples.
    """
    x = policy.schedule.noised(batch.steps, batch.clean, batch.eps)

    def look() -> Prediction:
        return policy.predict(batch.steps, x, batch.condition)

    seen = {"data": Prediction(x0=batch.clean, eps=batch.eps), "own": look()}
    if knobs.uses_old:
        assert models.old is not None, "the demand has asked for it"
        with policy.using(models.old):
            seen["old"] = look()
    if knobs.uses_reference:
        with policy.reference():
            seen["reference"] = look()
    return seen


def mean_square(difference: Tensor) -> Tensor:
    """Over the latent dimensions, of (N, *latent): (N,)."""
    return difference.square().flatten(1).mean(1)
