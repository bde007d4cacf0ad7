"""From the labels of a run's pictures to a fine-tuned model: DPO on the pairs, with no reward in between."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpo.validation import UserError

if TYPE_CHECKING:  # `ddpo --help` imports nothing heavy
    from trainers.config import Config
    from trainers.offline.read import OfflineConfig

MOST_PAIRS = 64  # of an epoch
NOISES = 4


def train_on_labels(source: Path, labels: Path, overrides: Sequence[str]) -> Path:
    """Trains on all labels of a file, from the pretrained model, as the run was told that showed the pictures.

    Args:
        source: The run folder.
        labels: What `ddpo rewards label` wrote.
        overrides: `--key value` tokens.

    Returns:
        The new run's folder.

    Raises:
        UserError: The labels hold nothing to learn from, or something that the run needs is missing.
    """
    from trainers.config.goal import describe_goal
    from trainers.config.io import ConfigFile, load_config, to_plain, to_yaml
    from trainers.loop import train_from_config
    from trainers.offline.read import OfflineConfig, load_judged
    from trainers.parallel.launcher import num_processes
    from trainers.planning.preflight import preflight
    from trainers.run_folder.folder import RunFolder
    from trainers.run_folder.python_runs import refuse_objects

    refuse_objects(source)
    offline = OfflineConfig(source=str(labels.absolute()))
    told = on_pairs(load_config(RunFolder(path=source).config_file), offline, count=len(load_judged(offline)))
    config = ConfigFile(path=labels, data=to_plain(told, full=False)).config(overrides)
    plan = preflight(config, num_processes=num_processes())
    print(f"{describe_goal(config)}\n{plan.describe()}", flush=True)
    return train_from_config(config, config_yaml=to_yaml(config, full=True), stem=labels.stem, plan=plan)


def on_pairs(config: "Config", offline: "OfflineConfig", *, count: int) -> "Config":
    """A run's configuration with DPO on pairs in the place of its algorithm and rewards.

    Args:
        config: The run's.
        offline: The pairs.
        count: How many there are.
    """
    from ddpo.credit.advantages import AdvantageConfig
    from ddpo.credit.kl import FixedKL
    from ddpo.objectives.preference import PreferenceConfig
    from trainers.config.groups import RunConfig, ShapingConfig

    return replace(
        config,
        objective=PreferenceConfig(noises=NOISES),
        offline=offline,
        kl=FixedKL(),
        advantages=AdvantageConfig(),
        shaping=ShapingConfig(),
        rewards=(),
        constraints=(),
        batch=replace(
            config.batch, group_size=2, samples_per_epoch=2 * min(count, MOST_PAIRS), group_noise="independent"
        ),
        evaluation=replace(config.evaluation, stop_on_overoptimisation=False),
        run=RunConfig(output_dir=config.run.output_dir),
    )


def check_is_run(source: Path) -> None:
    """Refuses what is no run folder: a training needs its configuration.

    Raises:
        UserError: It is something else.
    """
    if not (source / "config.yaml").is_file():
        raise UserError(f"--train needs a run folder to train as, got {source}; or use ddpo train with offline.source")
