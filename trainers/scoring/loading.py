"""The rewards of a configuration, in this process or in processes of their own."""

from rewards import WeightedSum
from trainers.config import Config
from trainers.parallel.processes import Processes
from trainers.scoring.reward_processes import start_rewards


def load_rewards(config: Config, processes: Processes) -> tuple[WeightedSum, WeightedSum | None]:
    """What a run optimises, and what it only measures; None for nothing."""
    if config.reward_processes.devices and config.terms:
        return start_rewards(config, processes)
    device = str(processes.device)
    return load_total(config, device), load_heldout(config, device)


def load_total(config: Config, device: str) -> WeightedSum:
    """What a run optimises, in this process; a sum of none where it learns from judged images without a reward."""
    if not config.terms and config.offline is not None:
        return WeightedSum((), rewards=())
    return WeightedSum(config.terms, device=device)


def load_heldout(config: Config, device: str) -> WeightedSum | None:
    """The rewards that are only measured; None for none."""
    return WeightedSum(config.heldout_rewards, device=device) if config.heldout_rewards else None
