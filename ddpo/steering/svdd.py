"""SVDD (Li et al., arXiv:2408.08252): of M candidates for every next state, one is chosen by its value.

    x_{k+1}^j ~ N(mean_k, std_k^2),   P(j) = softmax_j( v(x_{k+1}^j) / alpha ),   v(x) = r(x0_hat(x))

With the soft value v = alpha log E exp(r(x_T) / alpha | x) it is the tilted chain as M grows; r(x0_hat) is that value
with the spread of x_T given x left out, so its limit is biased. At alpha -> infinity, and for M = 1, it is the plain
sampler. Candidate 0 is the chain's own. What the network says of the chosen one is handed on, so that a step costs M
passes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpo.steering.base import Draw, Score, Selection, Steer, weights_of
from ddpo.steering.particles import uniforms

if TYPE_CHECKING:  # the policy loads diffusers
    from ddpo.policy import Outputs, Policy


@dataclass(frozen=True, kw_only=True)
class Svdd(Steer):
    """Chooses among candidates; see the module docstring.

    Attributes:
        score: r.
        alpha: Reward units per nat: the temperature.
        candidates: M.
    """

    score: Score
    alpha: float
    candidates: int

    def select(self, draw: Draw, policy: "Policy") -> Selection:
        """One of the candidates; the one there is where the step has no noise."""
        if not draw.is_noisy or self.candidates == 1:
            return Selection(latents=draw.candidates, then=self)
        state, rows = draw.state, torch.arange(len(draw.candidates))
        others = [draw.proposal.sample(state.noise(j)) for j in range(1, self.candidates)]
        every = [draw.candidates, *others]
        looks = [self._look(one, draw, policy) for one in every]
        values = torch.stack([self.score(policy.decode(x0), rows).double().cpu() for x0, _ in looks], dim=1)
        levels = (values / self.alpha).softmax(1).cumsum(1)
        chosen = torch.searchsorted(levels, uniforms(state.seeds, state.k, 1), right=True)[:, 0]
        chosen = chosen.clamp(max=self.candidates - 1).to(draw.candidates.device)
        outputs = [outputs for _, outputs in looks if outputs is not None]
        return Selection(
            latents=_picked(every, chosen), outputs=_picked_outputs(outputs, chosen) if outputs else None, then=self
        )

    def _look(self, x: Tensor, draw: Draw, policy: "Policy") -> "tuple[Tensor, Outputs | None]":
        """The clean latents seen in x_{k+1}, and what the network said; after the last step x itself."""
        after = draw.state.k + 1
        if after == policy.schedule.num_steps:
            return x, None
        with weights_of(policy, after):
            outputs = policy.outputs(after, x, draw.state.condition)
        return policy.prediction(after, x, outputs).x0, outputs


def _picked(values: list[Tensor], chosen: Tensor) -> Tensor:
    return torch.stack(values)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _picked_outputs(outputs: "list[Outputs]", chosen: Tensor) -> "Outputs":
    negatives = [one.negative for one in outputs if one.negative is not None]
    return outputs[0]._replace(
        negative=_picked(negatives, chosen) if negatives else None,
        positive=_picked([one.positive for one in outputs], chosen),
    )
