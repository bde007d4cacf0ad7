"""Converts what a network predicts into the pair (x0, eps), once, so that nothing else depends on it; and back.

With x = a x0 + s eps (see `ddpo.sampling.schedule`), each kind is one linear solve (v: Salimans and Ho,
arXiv:2202.00512, appendix D; flow: Lipman et al., arXiv:2210.02747, in the convention x = (1 - sigma) x0 + sigma eps,
output eps - x0).
"""

from dataclasses import dataclass

from torch import Tensor

from ddpo.sampling.schedule import PredictionType
from ddpo.validation import UserError


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a denoiser sees in noisy latents x = a x0 + s eps.

    Attributes:
        x0: The clean latents, (B, *latent).
        eps: The noise, (B, *latent).
    """

    x0: Tensor
    eps: Tensor


def predict(output: Tensor, x: Tensor, a: Tensor, s: Tensor, *, kind: PredictionType) -> Prediction:
    """The prediction of (x0, eps) that a network's output stands for.

    Args:
        output: The denoiser's output after guidance, (B, *latent).
        x: The latents it was given, (B, *latent).
        a: Signal level, broadcastable to x; must be positive for `epsilon`.
        s: Noise level, broadcastable to x; must be positive for `sample`.
        kind: What the output is.
    """
    match kind:
        case "epsilon":
            return Prediction(x0=(x - s * output) / a, eps=output)
        case "sample":
            return Prediction(x0=output, eps=(x - a * output) / s)
        case "v_prediction":
            return Prediction(x0=a * x - s * output, eps=a * output + s * x)
        case "flow":
            return Prediction(x0=x - s * output, eps=x + a * output)
    raise UserError(f"prediction type {kind!r} is not one of epsilon, v_prediction, sample, flow")


def network_output(prediction: Prediction, a: Tensor, s: Tensor, *, kind: PredictionType) -> Tensor:
    """What a network would have returned for a prediction, (B, *latent): the inverse of `predict`.

    Losses on the network's own parametrisation compare these: of the prediction (clean latents, drawn noise) it is the
    regression target. Valid on the grid of the kind: a^2 + s^2 = 1 for `v_prediction`, a + s = 1 for `flow`.

    Args:
        prediction: Of x = a x0 + s eps.
        a: Signal level, broadcastable to x.
        s: Noise level, broadcastable to x.
        kind: What the output is.
    """
    match kind:
        case "epsilon":
            return prediction.eps
        case "sample":
            return prediction.x0
        case "v_prediction":
            return a * prediction.eps - s * prediction.x0
        case "flow":
            return prediction.eps - prediction.x0
    raise UserError(f"prediction type {kind!r} is not one of epsilon, v_prediction, sample, flow")
