"""What is forgotten: the denoising loss of the pretrained model's samples under the weights that are evaluated.

The samples are of the evaluation's prompts and seeds, by the conditional branch, made in the first evaluation and
remembered while the run goes on; steps and noises are the same in every evaluation. It rises from what the pretrained
model has on samples of its own, where it is near its least.
"""

import torch
from torch import Tensor

from ddpo import Keep, Policy, rollout
from ddpo.objectives.noising import draw_noises, step_shares
from ddpo.regularization import denoising_losses, unclipped
from ddpo.trajectory import Condition

NAME = "forgetting/denoising"


class Forgetting:
    """Measures it on batches of images, each known by its seeds.

    Args:
        noises: Noised states of each image; stratified over the sampler's steps.
    """

    def __init__(self, noises: int) -> None:
        self._noises = noises
        self._clean: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, policy: Policy, condition: Condition, seeds: Tensor) -> Tensor:
        """Mean square error of the network's output on noised pretrained samples, (B,) float32 on the CPU.

        Args:
            policy: At the weights to be measured.
            condition: B rows.
            seeds: (B,) int64.
        """
        known = tuple(seeds.tolist())
        if known not in self._clean:
            with policy.reference():
                self._clean[known] = rollout(policy.conditional, condition, seeds, keep=Keep.FINAL).final.cpu()
        clean, view = self._clean[known], unclipped(policy)
        shares = step_shares(view.schedule, "grid", skip=0)
        losses = []
        for slot in range(self._noises):
            slots = [slot] * len(known)
            steps, eps = draw_noises(0, known, slots, shares, strata=self._noises, like=clean)
            at, x, noise = (value.to(policy.device) for value in (steps, clean, eps))
            losses.append(denoising_losses(view, at, x, noise, condition).cpu())
        return torch.stack(losses).mean(0)
