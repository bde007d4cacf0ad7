"""What must be so where an objective differentiates a sample's chain beside its steps with noise."""

from typing import TYPE_CHECKING

from ddpo.credit.lagrangian import KL_NAME
from ddpo.validation import check

if TYPE_CHECKING:
    from trainers.config.config import Config


def check_chain_unit(config: "Config") -> None:
    """A chain's reward is differentiated in its own unit, and there must be a step that only this sees.

    Raises:
        FieldError: Advantages are in other units than the total, something else than rewards and the KL is maximised,
            or no trained step is without noise.
    """
    chosen, advantages = "with objective.noise_free_steps: pathwise", config.advantages
    cure = f"batch_std or none {chosen} (each group would have a unit of its own, and a derivative has one)"
    check(advantages.scale in ("batch_std", "none"), "advantages.scale", advantages.scale, cure)
    cure = f"sum {chosen} (deviations of each reward have no derivative)"
    check(advantages.combination == "sum", "advantages.combination", advantages.combination, cure)
    cure = f"null {chosen} (advantages times a distance are no longer those of the reward)"
    check(advantages.diversity is None, "advantages.diversity", advantages.diversity, cure)
    bounded = [constraint.reward for constraint in config.constraints if constraint.reward != KL_NAME]
    check(not bounded, "constraints", bounded, f"[] but for {KL_NAME} {chosen} (bounds are multipliers of scores)")
    cure = f"stock {chosen} (no trained step is without noise else)"
    check(not config.sampler.hides_no_step, "sampler.last_step", config.sampler.last_step, cure)
