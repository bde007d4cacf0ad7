"""What alpha means under each scale of the advantages, against closed forms."""

import math
from collections.abc import Callable, Iterator

from ddpo.control.checks.base import Check, Measurement
from ddpo.control.diffusion.effective_alpha import RewardLaw, estimated_ratio, exact_ratio
from ddpo.credit.advantages import AdvantageConfig

GROUP_SIZES = (2, 4, 8)
LAWS = (RewardLaw(), RewardLaw(success=0.9), RewardLaw(success=0.03))
_TOLERANCE = 0.03  # 131,072 samples


def effective_alpha(config: AdvantageConfig) -> Callable[[], Iterator[Measurement]]:
    """The check of one configuration: effective alpha over alpha in groups of 2, 4 and 8."""

    def run() -> Iterator[Measurement]:
        for law in LAWS:
            exact = {size: exact_ratio(law, config.scale, size) for size in GROUP_SIZES}
            finite = {size: ratio for size, ratio in exact.items() if math.isfinite(ratio)}
            found = {size: estimated_ratio(law, config, size) for size in finite}
            yield Measurement(
                name=f"{law}, G {', '.join(map(str, finite))}",
                exact=_shown(finite),
                obtained=_shown(found),
                error=max(abs(found[size] / ratio - 1) for size, ratio in finite.items()),
                tolerance=_TOLERANCE,
            )

    return run


def _shown(ratios: dict[int, float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios.values())


CHECKS = (
    Check(name="alpha", group="advantages", level="fast", run=effective_alpha(AdvantageConfig()),
          claim="By default the KL weighs alpha reward units per nat, whatever the group size and the reward."),
    Check(name="alpha, group_std", group="advantages", level="fast",
          run=effective_alpha(AdvantageConfig(scale="group_std")),
          claim="Divided by each group's own deviation, it weighs this multiple of alpha."),
    Check(name="alpha, std", group="advantages", level="fast", run=effective_alpha(AdvantageConfig(scale="std")),
          claim="Where flat groups lose their KL as well, it weighs this multiple of alpha."),
)  # fmt: skip
