"""What rounding in half precision does to ratios of densities.

Sampling and the first update of an epoch round alike, so their ratio is exactly 1. An optimizer's step, however small,
has the network round anew: the log ratio of a step moves by <z, dmean> / std, dmean the change by rounding, independent
over the D latent dimensions; hence by ~ sqrt(D), which says nothing about the policy. It enters the joint ratio whole,
and its D-th root divided by D.
"""

import math

from ddpo.pipeline.denoiser import Precision

NATS = {"fp16": 0.022, "bf16": 0.14}
"""Root mean square of it at `DIMS` dimensions (`python benchmarks/first_ratio.py`)."""

DIMS = 256


def rounding_notice(precision: Precision, *, dims: int, joint_ratio: bool) -> str:
    """What to say before training where rounding alone moves the ratios; empty where it does not.

    Args:
        precision: Of the network.
        dims: D.
        joint_ratio: Whether updates weigh by ratios of whole densities.
    """
    if not joint_ratio or precision not in NATS:
        return ""
    nats = NATS[precision] * math.sqrt(dims / DIMS)
    return (
        f"NOTE: with objective.ratio: joint in {precision}, rounding moves the log ratio of a step by about {nats:.2g} "
        f"nats ({dims} latent dimensions) once the weights have moved at all; updates after an epoch's first one weigh "
        "and clip by it: take model.precision: fp32, one update an epoch, or objective.ratio: per_dimension"
    )
