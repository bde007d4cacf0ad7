"""Reads the denoiser's features at every step of a rollout, and leaves the samples as the policy makes them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ddpo.pipeline.features import FeatureReader
from ddpo.sampling.gaussian import Gaussian
from ddpo.steering.base import State, Steer

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Policy


@dataclass(frozen=True, kw_only=True)
class Reading(Steer):
    """Takes what the network computed for each step.

    Attributes:
        reader: Inside its `reading` block.
        features: Takes in (B, F) of each step, in order.
    """

    reader: FeatureReader
    features: list[Tensor]

    def propose(self, state: State, policy: "Policy") -> Gaussian:
        """The policy's own distribution."""
        self.features.append(self.reader.take(len(state.x)))
        return state.gaussian
