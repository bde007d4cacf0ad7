"""A part of a sampled chain taken again with its graph: the clean latents as a function of the weights.

    x_{k+1} = mean_k(x_k) + std_k noise_k,    from the stored state on, by the samples' own noise

A step is one of

    trained      its mean is a function of the weights, and of x_k through the network's Jacobian or, where that is left
                 out (DRTune), by the schedule's coefficients alone
    pretrained   the same by the pretrained weights, which are constants
    held         the same by the trained weights as constants
    carried      not computed again: x_{k+1} is known, and moves with x_k by its coefficient

A step's activations may be dropped and computed once more in the backward pass; then those of one step are alive at a
time, whatever the length of the chain.

Legend: `N` chains, `T` steps.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.samplers import predicted, step
from ddpo.sampling.schedule import coefficient
from ddpo.trajectory import Condition, Trajectory

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Outputs, Policy


StepKind = Literal["trained", "pretrained", "held", "carried"]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Which steps of N chains are differentiated: the same pattern, begun at any step.

    Attributes:
        first: Step at which each begins, (N,) int64 on the CPU.
        pattern: What each step from there on is.
        jacobian: Whether the network is differentiated by its input too; where it is, no step is carried.
        predicted: Whether it ends in the clean latents that the last step predicts, not in those after it.
    """

    first: Tensor
    pattern: tuple[StepKind, ...]
    jacobian: bool
    predicted: bool


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Where N chains end.

    Attributes:
        latents: Clean latents with their graph, (N, *latent).
        kl: KL to the pretrained model of trained and held steps, as far as they have noise, with its graph, (N,) nats.
        drift: Half the squared distance of the state after the last step to the sampled one, (N,).
    """

    latents: Tensor
    kl: Tensor
    drift: Tensor


def differentiate(
    policy: "Policy", path: Trajectory, stretch: Stretch, *, weighs_kl: bool, recomputed: bool
) -> Reached:
    """Takes a stretch of N chains again.

    Args:
        policy: That sampled; on any chain, that of the trajectory is taken.
        path: N samples with the states from the first step of the stretch on.
        stretch: Which steps.
        weighs_kl: Whether to compute the KL: one more pass of the pretrained network a step.
        recomputed: Whether activations are dropped and computed again in the backward pass.
    """
    policy = policy.at(path.schedule)
    noise, rows = policy.noise(path.seeds), torch.arange(len(stretch.first), device=policy.device)
    x = latents = _states(path, stretch.first)
    kl = x.new_zeros(len(x))
    for i, kind in enumerate(stretch.pattern):
        k = stretch.first + i
        is_end = i == len(stretch.pattern) - 1 and stretch.predicted
        if kind == "carried" and not is_end:
            x = latents = _states(path, k + 1) + _carried(policy, k, x - _states(path, k))
            continue
        own_kl = weighs_kl and kind in ("trained", "held")
        taken = _Step(policy, _common(k), path.condition, kind=kind, jacobian=stretch.jacobian, weighs_kl=own_kl)
        mean, clean, own = checkpoint(taken, x, use_reentrant=False) if recomputed else taken(x)
        kl = kl + own
        x = Gaussian(mean=mean, std=coefficient(policy.schedule.std, k, mean)).sample(noise[rows, k.to(x.device) + 1])
        latents = clean if is_end else x
    sampled = _states(path, stretch.first + len(stretch.pattern))
    return Reached(latents=latents, kl=kl, drift=0.5 * (x.detach() - sampled).flatten(1).square().sum(1))


class _Step:
    """One step as a function of the state: its mean, predicted clean latents and KL."""

    def __init__(
        self,
        policy: "Policy",
        k: int | Tensor,
        condition: Condition,
        *,
        kind: StepKind,
        jacobian: bool,
        weighs_kl: bool,
    ) -> None:
        self._policy, self._k, self._condition, self._kind = policy, k, condition, kind
        self._jacobian, self._weighs_kl = jacobian, weighs_kl

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, *latent), (N, *latent) and (N,) nats, at states (N, *latent)."""
        policy, k = self._policy, self._k
        seen = x if self._jacobian else x.detach()
        if self._kind == "pretrained":
            outputs = self._stock(seen)
        elif self._kind == "held":
            with policy.using(policy.trainable(), grad=torch.is_grad_enabled()):
                outputs = policy.outputs(k, seen, self._condition)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._kind == "trained"):
                outputs = policy.outputs(k, seen, self._condition)
        prediction = policy.prediction(k, x, outputs)
        own = policy.distribution(k, prediction)
        kl = x.new_zeros(len(x))
        if self._weighs_kl:
            kl = self._kl(own, policy.distribution(k, policy.prediction(k, x, self._stock(seen))))
        return own.mean, prediction.x0, kl

    def _stock(self, seen: Tensor) -> "Outputs":
        """What the pretrained network returns.

        It is switched to in here, so that a recomputation in the backward pass finds it too.
        """
        with self._policy.reference(grad=self._jacobian and torch.is_grad_enabled()):
            return self._policy.outputs(self._k, seen, self._condition)

    def _kl(self, own: Gaussian, stock: Gaussian) -> Tensor:
        """(N,) nats, 0 where a step has no noise."""
        noisy = own.std > 0
        unit = torch.where(noisy, own.std, torch.ones_like(own.std))
        kl = replace(own, std=unit).kl(replace(stock, std=unit))
        return torch.where(noisy.flatten().expand(len(kl)), kl, torch.zeros_like(kl))


def _states(path: Trajectory, k: Tensor) -> Tensor:
    """The stored states x_k of each row, (N, *latent); k is (N,) int64 on the CPU."""
    places = (k - path.first_state).to(path.latents.device)
    return path.latents[torch.arange(len(k), device=places.device), places]


def _carried(policy: "Policy", k: Tensor, difference: Tensor) -> Tensor:
    """What a difference of states becomes in a step whose network's output stays, (N, *latent)."""
    schedule, k = replace(policy.schedule, clip=None), k.to(policy.schedule.a.device)
    output = torch.zeros_like(difference)
    return step(schedule, k, predicted(schedule, k, difference, output, kind=policy.kind)).mean


def _common(k: Tensor) -> int | Tensor:
    """A step index as one number where all rows have the same."""
    return int(k[0]) if bool((k == k[0]).all()) else k
