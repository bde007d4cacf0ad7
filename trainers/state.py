"""Everything that must be saved to continue a run bit-exactly, in one place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.advantages import AdvantageEstimator
from ddpo.lagrangian import Multipliers
from rewards import WeightedSum
from trainers.checkpoint import CheckpointError, save_checkpoint
from trainers.config import Config
from trainers.ema import Ema
from trainers.evaluation_sampler import write_samplers
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
        multipliers: Of the constraints.
        prompts: Position in the prompt source.
        alpha: Present KL weight, reward units per nat.
        epoch: Finished epochs.
        updates: Optimizer steps taken, skipped ones included.
        skipped: Optimizer steps skipped for non-finite gradients.
        skipped_in_a_row: The same, since the last good one.
        samples: Images sampled for training, over all processes.
        seconds: Time spent in epochs; evaluations and checkpoints not included.
        overoptimised: Newest evaluations in a row that found over-optimisation.
    """

    config: Config
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema
    advantages: AdvantageEstimator
    reward: WeightedSum
    multipliers: Multipliers
    prompts: PromptStream
    alpha: float
    epoch: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    seconds: float = 0.0
    overoptimised: int = 0

    @classmethod
    def start(cls, config: Config, policy: Policy, reward: WeightedSum, prompts: PromptStream) -> "TrainState":
        """The state before the first epoch."""
        options = config.optimizer
        parameters = policy.trainable()
        if not parameters:
            raise ValueError("the policy has nothing to train; give Policy an adapter: LoraConfig() or FullConfig()")
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=config.learning_rate,
            betas=(options.beta1, options.beta2),
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )
        fp16 = config.model.precision == "fp16"
        return cls(
            config=config,
            policy=policy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler(policy.device.type, init_scale=1024.0, enabled=fp16),
            ema=Ema(parameters, options.ema_decay),
            advantages=AdvantageEstimator(config.advantages),
            reward=reward,
            multipliers=Multipliers(config.constraints),
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
        """Writes the weights (averaged, if they are) for `pipeline.load_lora_weights(folder)`, and both samplers."""
        with self.ema.applied():
            self.policy.save(folder)
        write_samplers(folder, rollout=self.config.sampler, evaluation=self.config.evaluation_sampler)

    def load(
        self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], processes: Processes
    ) -> None:
        """Continues from a checkpoint's contents.

        Raises:
            CheckpointError: It holds other weights than this configuration trains.
        """
        self._load_weights(tensors)
        _load_optimizer(self.optimizer, list(self.policy.trainable()), tensors["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        self.advantages.load_state_dict(values["advantages"])
        self.reward.load_state_dict(values["reward"])
        self.multipliers.load_state_dict(values.get("multipliers", {}))
        self.prompts.position = values["prompts"]
        self.ema.steps = values["ema_steps"]
        for name in COUNTERS:
            setattr(self, name, values[name])
        self.overoptimised = values.get("overoptimised", 0)
        self.reward.epoch = self.epoch
        rank = str(processes.rank)
        if rank in values["rng"]:
            set_rng_state(tensors[f"rng_{rank}"], values["rng"][rank])

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = {}
        for name, parameter in self.policy.trainable().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = torch.as_tensor(value)
        weights = {name: value.detach() for name, value in self.policy.trainable().items()}
        groups = {"weights": weights, "optimizer": moments}
        return {**groups, "ema": self.ema.average} if self.ema.average else groups

    def _values(self) -> dict[str, object]:
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "reward": self.reward.state_dict(),
            "multipliers": self.multipliers.state_dict(),
            "prompts": self.prompts.position,
            "ema_steps": self.ema.steps,
            "overoptimised": self.overoptimised,
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


def _load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Restores AdamW's moments; `names` are those of its parameters, in order."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, name = key.split(".", 1)
        state.setdefault(names.index(name), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
