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
from trainers.model_card import write_model_card
from trainers.optimizers import load_optimizer, make_optimizer, optimizer_tensors, reset_optimizer
from trainers.processes import Processes
from trainers.prompts import PromptStream
from trainers.rng import RandomValues, rng_state, set_rng_state
from trainers.sharding import collected, local, split_like

COUNTERS = ("alpha", "epoch", "updates", "skipped", "skipped_in_a_row", "samples", "seconds", "overoptimised")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of a state in this process's memory, to go back to; of split tensors this process's part.

    Attributes:
        tensors: Trainable weights, optimizer moments and averages, by group and name, on the CPU.
        values: Counters and statistics.
        rng: This process's random states.
    """

    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    rng: tuple[dict[str, Tensor], RandomValues]


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
        saved_epoch: Finished epochs in the newest checkpoint; -1 before the first.
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
    saved_epoch: int = -1

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
            multipliers=Multipliers(config.constraints),
            prompts=prompts,
            alpha=config.kl.alpha,
        )

    @property
    def stops_early(self) -> bool:
        """Whether enough evaluations in a row have found over-optimisation to stop; the main process knows."""
        options = self.config.evaluation
        return options.stop_on_overoptimisation and self.overoptimised >= options.overoptimisation_patience

    def save(self, folder: Path, processes: Processes) -> None:
        """Writes a checkpoint; called on every process, written by the main one, with all tensors whole."""
        rng_tensors, rng_values = rng_state()
        everyones_tensors, everyones_values = processes.gather_tensors(rng_tensors), processes.gather_json(rng_values)
        keep = processes.is_main
        tensors = {group: collected(members, keep=keep) for group, members in self._tensors().items()}
        if keep:
            random = {f"rng_{rank}": state for rank, state in enumerate(everyones_tensors)}
            values = {**self._values(), "rng": {str(rank): state for rank, state in enumerate(everyones_values)}}
            used = tensors.get("ema", tensors["weights"])
            save_checkpoint(
                folder, tensors={**tensors, **random}, values=values, extra=lambda path: self._write(path, used)
            )
        self.saved_epoch = self.epoch
        processes.wait()

    def export(self, folder: Path, processes: Processes) -> None:
        """Writes the weights to use (averaged, if they are) for `pipeline.load_lora_weights(folder)`.

        Called on every process, written by the main one.
        """
        used = collected(self.ema.average or self.policy.trainable(), keep=processes.is_main)
        if processes.is_main:
            self._write(folder, used)

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Weights in diffusers' format, with both samplers and a card beside them."""
        self.policy.save(folder, weights)
        write_samplers(folder, rollout=self.config.sampler, evaluation=self.config.evaluation_sampler)
        write_model_card(folder, self.policy, self.config, epoch=self.epoch, samples=self.samples)

    def snapshot(self) -> Snapshot:
        """A copy of everything that an epoch changes, in host memory."""
        tensors = {
            group: {name: local(value.detach()).to("cpu", copy=True) for name, value in members.items()}
            for group, members in self._tensors().items()
        }
        return Snapshot(tensors=tensors, values=self._values(), rng=rng_state())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this state."""
        reset_optimizer(self.optimizer, self.policy.trainable(), snapshot.tensors["optimizer"])
        with torch.no_grad():
            for group in ("weights", "ema") if self.ema.average else ("weights",):
                for name, value in self._tensors()[group].items():
                    local(value.detach()).copy_(snapshot.tensors[group][name])
        self.optimizer.zero_grad(set_to_none=True)
        self._set_values(snapshot.values)
        set_rng_state(*snapshot.rng)

    def load(
        self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], processes: Processes
    ) -> None:
        """Continues from a checkpoint's contents.

        Raises:
            CheckpointError: It holds other weights than this configuration trains.
        """
        self._load_weights(tensors)
        load_optimizer(self.optimizer, self.policy.trainable(), tensors["optimizer"])
        self._set_values(values)
        self.saved_epoch = self.epoch
        rank = str(processes.rank)
        if rank in values["rng"]:
            set_rng_state(tensors[f"rng_{rank}"], values["rng"][rank])

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Takes other weights, whole, for the trained ones and their average."""
        self._load_weights({"weights": weights, **({"ema": weights} if self.ema.average else {})})

    def _set_values(self, values: Mapping[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        self.advantages.load_state_dict(values["advantages"])
        self.reward.load_state_dict(values["reward"])
        self.multipliers.load_state_dict(values.get("multipliers", {}))
        self.prompts.position = values["prompts"]
        self.ema.steps = values["ema_steps"]
        for name in COUNTERS:
            setattr(self, name, values[name])
        self.reward.epoch = self.epoch

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        moments = optimizer_tensors(self.optimizer, self.policy.trainable())
        weights = {name: value.detach() for name, value in self.policy.trainable().items()}
        groups = {"weights": weights, "optimizer": moments}
        return {**groups, "ema": self.ema.average} if self.ema.average else groups

    def _values(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in COUNTERS},
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "reward": self.reward.state_dict(),
            "multipliers": self.multipliers.state_dict(),
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
                    value.copy_(split_like(saved[name], value))
