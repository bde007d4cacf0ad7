"""The sweep over the weight of one reward, by which `ddpo pareto` makes the runs that it compares."""

from collections.abc import Sequence
from pathlib import Path

from ddpo.validation import UserError
from trainers.config.io import load_config
from trainers.sweep.plan import Sweep, make_member


def plan_weights(source: str, weights: str, overrides: Sequence[str]) -> Sweep:
    """A run for each weight, in `run.output_dir`.

    Args:
        source: A configuration file or shipped name.
        weights: `NAME=0,1,5`, NAME one of its rewards.
        overrides: `--key value` tokens for every run.

    Raises:
        UserError: There is no such reward, or no weights.
    """
    config = load_config(source, overrides)
    name, _, text = weights.partition("=")
    places = [i for i, term in enumerate(config.rewards) if name in (term.shown, *term.aliases)]
    if not places:
        known = ", ".join(term.shown for term in config.rewards)
        raise UserError(f"--weights {weights}: the configuration has no reward {name!r}; it has {known}")
    try:
        values = [f"{value:g}" for value in dict.fromkeys(float(value) for value in text.split(","))]
    except ValueError as error:
        raise UserError(f"--weights must be written NAME=0,1,5, got {weights!r}") from error
    key, plain = f"rewards.{places[0]}.weight", name.rpartition(":")[2]
    runs = {value: config.run.folder / f"{Path(source).stem}-{plain}-{value}" for value in values}
    members = [make_member(source, run, [*overrides, f"--{key}={value}"], {key: value}) for value, run in runs.items()]
    return Sweep(source=source, folder=config.run.folder, members=tuple(members))
