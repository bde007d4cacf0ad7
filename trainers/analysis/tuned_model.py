"""The model that a run has tuned: its policy at the weights to show, its rewards at the scales they had then.

Nothing of training is built: no optimizer, no moments, and of a checkpoint only the weights that are shown are read.
"""

from collections.abc import Collection
from dataclasses import dataclass

from ddpo import Policy
from rewards import WeightedSum
from trainers.config import Config
from trainers.epoch.state import EVALUATED
from trainers.parallel.processes import Processes
from trainers.planning.policy_loading import load_policy
from trainers.run_folder.checkpoint import Values, load_checkpoint
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.model_record import check_model, pinned
from trainers.run_folder.python_runs import made_again
from trainers.run_folder.saved_weights import copy_saved
from trainers.tracking.progress import Progress


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """A run's model at a checkpoint.

    Attributes:
        policy: Its trained weights are the ones to be shown: averaged ones where the run averages.
        reward: At the scales of the checkpoint: those of the run's rewards that can be made again.
        is_complete: Whether these are all, so that their total is what was optimised.
        epoch: Finished epochs of the checkpoint; rewards may change their weights with it.
        shown: Name of the epoch of the weights, such as `epoch_000010`.
        num_processes: How many processes wrote the checkpoint.
    """

    policy: Policy
    reward: WeightedSum
    is_complete: bool
    epoch: int
    shown: str
    num_processes: int


def load_tuned(
    folder: RunFolder,
    config: Config,
    processes: Processes,
    *,
    checkpoint: str | None,
    accept: Collection[str] = (),
) -> TunedModel:
    """The model of a run at a checkpoint; says which weights are shown.

    Args:
        folder: The run folder.
        config: The run's.
        processes: Where it is loaded to.
        checkpoint: Name of the checkpoint; None takes the newest, or the best weights where the run stopped early and
            exported those.
        accept: Holds `model` where another pretrained model than the run's is wanted.

    Raises:
        RunError: The pretrained model is another one than the run was trained with.
        CheckpointError: There is no such checkpoint, it is damaged, or holds other weights than the configuration
            trains.
    """
    source = folder.checkpoint(checkpoint)
    _, values = load_checkpoint(source, groups=())
    best = folder.best_weights() if checkpoint is None and _stopped_early(config, values) else None
    shown = EVALUATED if config.optimizer.ema_decay > 0 else "weights"
    saved = load_checkpoint(source, groups=(shown,))[0].get(shown, {}) if best is None else {}
    terms = made_again(folder.path, config.terms)
    reward = WeightedSum(terms, device=processes.device, rewards=None if terms else ())
    reward.load_state_dict({one.name: values["reward"][one.name] for one in reward.rewards})
    policy = load_policy(pinned(config, folder.path), str(processes.device))
    check_model(folder.path, policy, config, accept=accept)
    copy_saved(policy.trainable(), saved if best is None else policy.read(best), what=shown)
    progress = Progress(enabled=processes.is_main)
    if gone := [term.shown for term in config.terms if term not in terms]:
        progress.line(f"without scores of {', '.join(gone)}, which only the program that trained has")
    if best is None:
        progress.line(f"weights: checkpoint {source.name}")
    else:
        progress.line(
            f"weights: those of the best evaluation, {best}, as exported; the last ones with --checkpoint {source.name}"
        )
    return TunedModel(
        policy=policy,
        reward=reward,
        is_complete=len(terms) == len(config.terms),
        epoch=values["epoch"],
        shown=(best or source).name,
        num_processes=len(values["rng"]),
    )


def _stopped_early(config: Config, values: Values) -> bool:
    """Whether enough evaluations in a row had found over-optimisation to stop."""
    options = config.evaluation
    return options.stop_on_overoptimisation and values["overoptimised"] >= options.overoptimisation_patience
