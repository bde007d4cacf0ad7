"""What regression on clean samples can be told, and the published methods as settings of it.

    rwr             reward-weighted regression (Peters and Schaal 2007; the baseline of DDPO, arXiv:2305.13301)
    raft            the best of each prompt alone (arXiv:2304.06767)
    ram             Reinforce Adjoint Matching (arXiv:2605.10759)
    tilt_matching   explicit Tilt Matching (arXiv:2512.21829): small tilts of the policy itself, one an epoch
    nft             DiffusionNFT (arXiv:2509.16117) as its paper has it
    nft_published   the same as its code has it: errors in clean latents, each divided by its own size
    awm             Advantage Weighted Matching (arXiv:2509.25050)
    dgpo            Direct Group Preference Optimization (arXiv:2510.08425): `ddpo.objectives.group_regression`

NFT's beta is 1 / (5 multiplier), with advantages bounded by 5 deviations as published.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from ddpo.objectives.noising import Times
from ddpo.objectives.regression_losses import Normalisation, Target

Preset = Literal["rwr", "raft", "ram", "tilt_matching", "nft", "nft_published", "awm", "dgpo"]
Worth = Literal["exponential", "advantage"]
Compare = Literal["epoch", "prompt"]
Anchor = Literal["reference", "old"]
ErrorOf = Literal["output", "clean"]
Sampling = Literal["policy", "old"]
Guidance = Literal["same", "none"]


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """All settings of the regression; `CleanSampleConfig` has their meanings."""

    worth: Worth = "advantage"
    temperature: float = 0.2
    compare: Compare = "epoch"
    best_fraction: float | None = None
    clip: float = math.inf
    multiplier: float = 1.0
    target: Target = "sample"
    anchor: Anchor = "old"
    error_of: ErrorOf = "output"
    normalisation: Normalisation = "none"
    times: Times = "grid"
    skip_steps: int = 0
    stratified: bool = True
    noises: int = 4
    reference_weight: float = 0.0
    old_weight: float = 0.0
    old_rate: float = 0.0
    old_limit: float = 0.0
    sample_from: Sampling = "policy"
    train_guidance: Guidance = "none"

    @property
    def uses_old(self) -> bool:
        """Whether losses need the old policy's outputs."""
        return self.target in ("shifted", "contrast") or self.old_weight > 0

    @property
    def uses_reference(self) -> bool:
        """Whether losses need the pretrained model's outputs."""
        anchored = self.target in ("shifted", "contrast") and self.anchor == "reference"
        return anchored or self.target == "group" or self.reference_weight > 0

    @property
    def keeps_old(self) -> bool:
        """Whether there is an old policy at all."""
        return self.uses_old or self.sample_from == "old"

    def old_decay(self, epochs: int) -> float:
        """Share of itself that the old policy keeps after an epoch, `epochs` having been taken in before."""
        return min(self.old_rate * epochs, self.old_limit)


NAMES = tuple(field.name for field in fields(Knobs))

_RWR = Knobs(worth="exponential", train_guidance="same")
_NFT = Knobs(
    clip=5.0,
    multiplier=0.2,
    target="shifted",
    noises=10,
    reference_weight=1e-4,
    old_rate=0.001,
    old_limit=0.5,
    sample_from="old",
)

PRESETS: dict[Preset, Knobs] = {
    "rwr": _RWR,
    "raft": replace(_RWR, compare="prompt", best_fraction=0.0),
    "ram": Knobs(
        multiplier=100.0,
        target="shifted",
        anchor="reference",
        times="noisy",
        noises=8,
        old_rate=0.01,
        old_limit=0.9,
        sample_from="old",
    ),
    "tilt_matching": Knobs(multiplier=0.1, target="shifted"),
    "nft": _NFT,
    "nft_published": replace(_NFT, target="contrast", error_of="clean", normalisation="relative"),
    "awm": Knobs(
        clip=5.0,
        multiplier=0.2,
        skip_steps=1,
        noises=6,
        reference_weight=0.003,
        old_weight=1.0,
        old_rate=0.001,
        old_limit=0.3,
    ),
    "dgpo": Knobs(multiplier=100.0, target="group", noises=1),
}
