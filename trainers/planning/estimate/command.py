"""The second half of `ddpo plan`: memory and speed."""

import json
from dataclasses import asdict

from trainers.config import Config
from trainers.config.errors import ConfigError
from trainers.planning.estimate.blueprint import read_blueprint
from trainers.planning.estimate.memory import estimate
from trainers.planning.estimate.report import as_mapping, as_text
from trainers.planning.plan import BatchPlan


def describe(config: Config, plan: BatchPlan, *, utilisation: float, as_json: bool) -> str:
    """The estimate of a run, or why there is none, as text or as JSON with the plan.

    Args:
        config: The run.
        plan: Its epoch.
        utilisation: Share of a card's published peak that is assumed to be reached, in (0, 1].
        as_json: For programs.
    """
    try:
        blueprint = read_blueprint(config.model.described)
    except ConfigError as error:
        return json.dumps({"plan": asdict(plan), "estimate": None, "reason": str(error)}) if as_json else f"\n{error}"
    estimated = estimate(config, blueprint, plan)
    if not as_json:
        return "\n" + as_text(config, estimated, utilisation=utilisation)
    numbers = as_mapping(config, estimated, utilisation=utilisation)
    return json.dumps({"plan": asdict(plan), "estimate": numbers}, indent=1)
