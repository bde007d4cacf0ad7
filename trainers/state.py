"""Everything that must be saved to continue a run bit-exactly, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.advantages import AdvantageEstimator
from rewards import WeightedSum
from trainers.checkpoint import CheckpointError, save_checkpoint
from trainers.config import Config
from trainers.ema import Ema
from trainers.optimizers import load_optimizer, make_optimizer, optimizer_tensors
from trainers.processes import Processes
from trainers.prompts import PromptStream
from trainers.rng import rng_state, set_rng_state

COUNTERS = ("alpha", "epoch", "updates", "skipped", "skipped_in_a_row", "samples", "seconds")


@dataclass(kw_only=True)
class TrainState:
    """A run between two epochs; the only mutable record of the trainer.

    Attributes:
        config: The run's configuration.
        policy: Its trainable weights are saved; the pretrained ones are not.
        optimizer: AdamW over the trainable weights.
        scaler: Loss scale of fp16; disabled otherwise.
        ema: Averaged weights.
        advantages: Remembered scores per prompt.
        reward: Running scales of the rewards.
        prompts: Position in the prompt source.
        alpha: Present KL weight, reward units per nat.
        epoch: Finished epochs.
        updates: Optimizer steps taken, skipped ones included.
        skipped: Optimizer steps skipped for non-finite gradients.
        skipped_in_a_row: The same, since the last good one.
        samples: Images sampled for training, over all processes.
        seconds: Time spent in epochs; evaluations and checkpoints not included.
    """

    config: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema
    advantages: AdvantageEstimator
    reward: WeightedSum
    prompts: PromptStream
    alpha: float
    epoch: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    seconds: float = 0.0

    @classmethod
    def start(cls, config: Config, policy: Policy, reward: WeightedSum, prompts: PromptStream) -> "TrainState":
        """The state before the first epoch."""
        options = config.optimizer
        parameters = policy.trainable()
        if not parameters:
            raise ValueError("the policy has nothing to train; give Policy an adapter: LoraConfig() or FullConfig()")
        optimizer = make_optimizer(config, parameters.values())
        fp16 = config.model.precision == "fp16"
        return cls(
            config=config,
            policy=policy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(policy.device.type, init_scale=1024.0, enabled=fp16),
            ema=Ema(parameters, options.ema_decay),
            advantages=AdvantageEstimator(config.advantages),
            reward=reward,
            prompts=prompts,
            alpha=config.kl.alpha,
        )

    def save(self, folder: Path, processes: Processes) -> None:
        """Writes a checkpoint; called on every process, written by the main one."""
        rng_tensors, rng_values = rng_state()
        everyones_tensors, everyones_values = processes.gather_tensors(rng_tensors), processes.gather_json(rng_values)
        if processes.is_main:
            random = {f"rng_{rank}": tensors for rank, tensors in enumerate(everyones_tensors)}
            values = {**self._values(), "rng": {str(rank): state for rank, state in enumerate(everyones_values)}}
            save_checkpoint(folder, tensors={**self._tensors(), **random}, values=values, extra=self.export)
        processes.wait()

    def export(self, folder: Path) -> None:
        """Writes the weights to use (averaged, if they are) for `pipeline.load_lora_weights(folder)`."""
        with self.ema.applied():
            self.policy.save(folder)

    def load(
        self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], processes: Processes
    ) -> None:
        """Continues from a checkpoint's contents.

        Raises:
            CheckpointError: It holds other weights than this configuration trains.
        """
        self._load_weights(tensors)
        load_optimizer(self.optimizer, list(self.policy.trainable()), tensors["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        self.advantages.load_state_dict(values["advantages"])
        self.reward.load_state_dict(values["reward"])
        self.prompts.position = values["prompts"]
        self.ema.steps = values["ema_steps"]
        for name in COUNTERS:
            setattr(self, name, values[name])
        rank = str(processes.rank)
        if rank in values["rng"]:
            set_rng_state(tensors[f"rng_{rank}"], values["rng"][rank])

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = optimizer_tensors(self.optimizer, self.policy.trainable())
        weights = {name: value.detach() for name, value in self.policy.trainable().items()}
        groups = {"weights": weights, "optimizer": moments}
        return {**groups, "ema": self.ema.average} if self.ema.average else groups

    def _values(self) -> dict[str, object]:
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "reward": self.reward.state_dict(),
            "prompts": self.prompts.position,
            "ema_steps": self.ema.steps,
        }

    def _load_weights(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        parameters = self.policy.trainable()
        for group, targets in (("weights", parameters), ("ema", self.ema.average)):
            saved = tensors.get(group, {})
            wrong = [name for name in targets if name not in saved or saved[name].shape != targets[name].shape]
            if wrong or len(saved) != len(targets):
                raise CheckpointError(
                    f"the checkpoint's {group} do not fit this configuration ({len(saved)} tensors for {len(targets)}"
                    + (f", first misfit {wrong[0]}" if wrong else "")
                    + "); resume with the adapter and model that the run was started with"
                )
            with torch.no_grad():
                for name, value in targets.items():
                    value.copy_(saved[name])
