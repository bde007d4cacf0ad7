"""Holding on to what the weights could do at the start of a run, beside whatever an objective learns.

Terms of the loss, theta_0 the trained parameters at the start and D the latent dimensions:

    l2         strength / 2  sum_i (theta_i - theta_0i)^2
    ewc        strength / 2  sum_i F_i (theta_i - theta_0i)^2          elastic weight consolidation (arXiv:1612.00796)
    denoising  strength  E mean_d |out_theta(x_k) - target|^2          the loss of pretraining, on samples of theta_0

A denoiser that predicts out(x_k) is a Gaussian N(y; out(x_k), I) of its regression target y, whose negative
log-density is the denoising loss. Its Fisher information is the expectation of the squared score over targets y = out +
z that the *model* draws, not over those of the data (the "empirical Fisher"), for which there would be no guarantee:

    d log N(out + z; out, I) / d theta = J^T z,  z ~ N(0, I)      J = d out / d theta at theta_0
    F_i = E_x E_z (J^T z)_i^2 / D = E_x (J^T J)_ii / D            per latent dimension

so that `1/2 sum F_i d_i^2` is to second order, and but for what the diagonal leaves out, half the mean square change of
the network's output on samples of its own. x_k = a_k x_0 + s_k eps, x_0 sampled at theta_0 by the conditional branch, k
any step of the sampler alike.

A LoRA adds B A to a weight and begins at B = 0. There d out / d A = B^T (...) = 0: all F of A are exactly 0, and `ewc`
leaves A free. It holds B, by the Fisher information at the A of the start; since no output changes while B = 0,
nothing can be forgotten through A alone, and `l2` beside it holds A. A LoRA that begins elsewhere (`adapter.init`) and
full weights are held in all of their parameters.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ddpo.objectives.noised_samples import mean_square
from ddpo.sampling.prediction import Prediction
from ddpo.trajectory import Condition
from ddpo.validation import check

if TYPE_CHECKING:  # the configuration is read without loading diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class EwcConfig:
    """Elastic weight consolidation: each parameter is held as firmly as the model at the start depends on it.

    Attributes:
        strength: Of the quadratic; 0 for none.
        samples: Samples of the model at the start, on which the diagonal Fisher information is measured.
        noises: Noised states of each, one forward and backward pass each, once.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    strength: float = 0.0
    samples: int = 64
    noises: int = 4

    def __post_init__(self) -> None:
        _check_strength(self.strength, "strength")
        for name in ("samples", "noises"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """The denoising loss on what the model at the start makes, or on images of a folder.

    Attributes:
        strength: Weight of the loss; 0 for none.
        samples: Samples of the model at the start, made once and kept in the run folder.
        images: Folder of images in place of these, each NAME.png (.jpg, .jpeg, .webp) with its caption in NAME.txt;
            null for samples.
        batch_size: Noised images of every update, over all processes.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    strength: float = 0.0
    samples: int = 256
    images: str | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        _check_strength(self.strength, "strength")
        for name in ("samples", "batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        cure = "null where regularization.denoising.strength is 0, which reads none"
        check(self.images is None or self.strength > 0, "images", self.images, cure)


@dataclass(frozen=True, kw_only=True)
class RegularizationConfig:
    """What holds the weights to where they began; all terms may be used together, and beside a KL.

    Attributes:
        l2: Strength of the squared distance to the weights of the start; 0 for none.
        ewc: The same, weighed by the diagonal Fisher information.
        denoising: The denoising loss.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    l2: float = 0.0
    ewc: EwcConfig = field(default_factory=EwcConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)

    def __post_init__(self) -> None:
        _check_strength(self.l2, "l2")

    @property
    def is_on(self) -> bool:
        """Whether there is any term."""
        return max(self.l2, self.ewc.strength, self.denoising.strength) > 0

    @property
    def own_samples(self) -> int:
        """Samples of the model at the start that are made once."""
        of_denoising = self.denoising.samples if self.denoising.strength and self.denoising.images is None else 0
        return max(self.ewc.samples if self.ewc.strength else 0, of_denoising)

    @property
    def fisher_rows(self) -> int:
        """Passes of the network, forward and back, that measure the Fisher information once."""
        return self.ewc.samples * self.ewc.noises if self.ewc.strength else 0


def _check_strength(value: float, name: str) -> None:
    check(0 <= value < float("inf"), name, value, "at least 0")


# ---- the denoising loss ----------------------------------------------------------------------------------------------


def unclipped(policy: "Policy") -> "Policy":
    """The conditional branch of a policy, whose predicted clean latents are not clamped: as pretraining sees it."""
    policy = policy.conditional
    return policy.at(replace(policy.schedule, clip=None))


def noised_output(policy: "Policy", steps: Tensor, clean: Tensor, eps: Tensor, condition: Condition) -> Tensor:
    """What the network returns for noised clean latents, in its own parametrisation, (N, *latent).

    Args:
        policy: From `unclipped`.
        steps: Step k at whose noise level each is, (N,) int64.
        clean: (N, *latent).
        eps: Standard normal noise, (N, *latent).
        condition: N rows.
    """
    x = policy.schedule.noised(steps, clean, eps)
    return policy.network_output(steps, policy.predict(steps, x, condition))


def denoising_losses(policy: "Policy", steps: Tensor, clean: Tensor, eps: Tensor, condition: Condition) -> Tensor:
    """Mean square error of the network's output over the latent dimensions, (N,); arguments of `noised_output`."""
    target = policy.network_output(steps, Prediction(x0=clean, eps=eps))
    return mean_square(noised_output(policy, steps, clean, eps, condition) - target)


# ---- the quadratics --------------------------------------------------------------------------------------------------


def summed_fisher(
    parameters: Mapping[str, Tensor], outputs: Iterable[Tensor], draw: Callable[[int, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sum over states of an unbiased estimate of the diagonal Fisher information per latent dimension, float64.

    Args:
        parameters: By which it is, by name.
        outputs: The network's output at one state each, (1, *latent), with its graph.
        draw: z of state number n, standard normal, in the shape and on the device of an output.
    """
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    for number, output in enumerate(outputs):
        score = (output * draw(number, output.detach())).sum()
        gradients = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
        for sums, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                sums += gradient.double().square() / output.numel()
    return total


Curvature = Mapping[str, Tensor] | float
"""Of a quadratic, of each parameter by its name, or of all alike."""


@torch.no_grad()
def quadratic(parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], curvature: Curvature) -> Tensor:
    """`1/2 sum_i curvature_i (theta_i - start_i)^2`, a float64 scalar."""
    pulls = _pulls(parameters, start, curvature)
    return (
        sum(
            ((pull.double() * (parameters[name] - start[name]).double()).sum() for name, pull in pulls),
            start=torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device),
        )
        / 2
    )


@torch.no_grad()
def add_pull(
    parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], curvature: Curvature, *, scale: float
) -> None:
    """Adds the gradient of `quadratic`, times a scale, to `.grad`."""
    for name, pull in _pulls(parameters, start, curvature):
        parameter = parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(pull.to(parameter.grad), alpha=scale)


def _pulls(
    parameters: Mapping[str, Tensor], start: Mapping[str, Tensor], curvature: Curvature
) -> Iterable[tuple[str, Tensor]]:
    for name, parameter in parameters.items():
        weight = curvature if isinstance(curvature, float) else curvature[name]
        yield name, weight * (parameter.detach() - start[name])
