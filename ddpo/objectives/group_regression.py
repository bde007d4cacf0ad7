"""Direct Group Preference Optimization (DGPO, arXiv:2510.08425): one logistic loss of a whole group's errors.

    loss = mean_i w A_i e_i,    w = sigmoid( beta mean_i A_i (e_i - e_ref,i) ), without gradient

over the G samples of a prompt at one step and noise, e = |f - f*|^2 / D the error of the network's output, A the
advantage. It has the gradient of (1 / beta) log(1 + exp(beta mean_i A_i (e_i - e_ref,i))): it fades where the group's
errors have moved as its advantages ask. At the pretrained weights w = 1/2, and the gradient is that of AWM.

A unit is a noise of a sample that all of its group share, so that an image is seen G times as often as it has noises.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ddpo.objectives.base import Demand, Loss, Models
from ddpo.objectives.clean_sample_presets import Knobs
from ddpo.objectives.experience import Experience
from ddpo.objectives.noised_samples import NoisedSamples, drawn, mean_square, predictions
from ddpo.placement import fetch


@dataclass(frozen=True, kw_only=True)
class NoisedGroups:
    """A micro-batch of N groups of G samples, each under one noise.

    Attributes:
        samples: Those of all groups, one after the other, N G.
        size: G.
    """

    samples: NoisedSamples
    size: int


@dataclass(frozen=True, kw_only=True)
class GroupRegression:
    """DGPO: a unit is a noise of a group.

    Attributes:
        demand: The clean latents of whole groups.
        knobs: All settings; `multiplier` is beta.
    """

    demand: Demand
    knobs: Knobs

    def gather(self, experience: Experience, rows: torch.Tensor, slots: torch.Tensor, *, seed: int) -> NoisedGroups:
        """Noise number `slots` of samples `rows`, for all samples of their groups."""
        path, device, knobs = experience.trajectory, experience.trajectory.log_probs.device, self.knobs
        own = experience.groups[experience.start : experience.start + len(path.seeds)]
        groups = [torch.nonzero(own == own[row]).flatten() for row in rows]
        members, size = torch.cat(groups), len(groups[0])
        steps, eps = drawn(knobs, path, rows, slots, seed=seed)
        samples = NoisedSamples(
            steps=steps.repeat_interleave(size),
            clean=fetch(path.final[members], device),
            eps=eps.repeat_interleave(size, 0).to(device),
            weights=experience.advantages[members, 0].clamp(-knobs.clip, knobs.clip),
            condition=path.condition.index(members).to(device),
        )
        return NoisedGroups(samples=samples, size=size)

    def losses(self, models: Models, batch: NoisedGroups) -> Iterator[Loss]:
        """The weighted errors of every group."""
        policy, samples, knobs = models.policy, batch.samples, self.knobs
        policy = policy.at(replace(policy.schedule, clip=None))  # a clamped prediction has no gradient
        seen = predictions(knobs, policy, models, samples)
        outputs = {name: policy.network_output(samples.steps, x) for name, x in seen.items()}
        error = mean_square(outputs["own"] - outputs["data"])
        change = error.detach() - mean_square(outputs["reference"] - outputs["data"])
        gain = (samples.weights * change).reshape(-1, batch.size).mean(1)
        weight = torch.sigmoid(knobs.multiplier * gain).repeat_interleave(batch.size)
        distance = mean_square(outputs["own"] - outputs["reference"])
        loss = weight * samples.weights * error + knobs.reference_weight * distance
        metrics = {
            "regression_error": error.detach(),
            "distance_to_reference": distance.detach(),
            "group_weight": weight,
        }
        yield Loss(value=loss.mean(), metrics=metrics, steps=samples.steps)
