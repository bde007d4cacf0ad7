"""Everything that must be saved to continue a run bit-exactly, in one place."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.credit.advantages import AdvantageEstimator
from ddpo.credit.critic import Critic
from ddpo.credit.kl import first_alpha
from ddpo.credit.kl_course import KLCourse, next_alpha
from ddpo.credit.lagrangian import Multipliers
from ddpo.objectives.base import Preparation
from ddpo.seeds import NOISE
from ddpo.validation import UserError
from ddpo.weights.average import Average, ramped
from rewards import WeightedSum
from trainers.config import Config
from trainers.config.evaluation_sampler import write_samplers
from trainers.epoch.critic import make_critic
from trainers.epoch.learner import POLICY, Learner
from trainers.epoch.optimizers import make_optimizer
from trainers.parallel.processes import Processes
from trainers.parallel.rng import RandomValues, rng_state, set_rng_state
from trainers.parallel.sharding import collected, local
from trainers.prompts import PromptStream
from trainers.run_folder.checkpoint import save_checkpoint
from trainers.run_folder.model_card import write_model_card

EVALUATED = "ema"  # the average of weights that is evaluated and exported
OLD = "old"  # the one that counts as the old policy


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of what is no tensor, to go back to.

    Attributes:
        values: Counters and statistics.
        rng: This process's random states.
    """

    values: dict[str, Any]
    rng: tuple[dict[str, Tensor], RandomValues]


@dataclass(kw_only=True)
class Counts:
    """How far a run has come.

    Attributes:
        epoch: Finished epochs.
        samples: Images sampled for training, over all processes.
        seconds: Time spent in epochs; evaluations and checkpoints not included.
        overoptimised: Newest evaluations in a row that found over-optimisation.
    """

    epoch: int = 0
    samples: int = 0
    seconds: float = 0.0
    overoptimised: int = 0


@dataclass(kw_only=True)
class TrainState:
    """A run between two epochs; the only mutable record of the trainer.

    Attributes:
        config: The run's configuration.
        policy: Its trainable weights are saved; the pretrained ones are not.
        learners: What is trained; the policy's weights come first, a critic's are the last.
        scaler: Loss scale of fp16; disabled otherwise.
        advantages: Remembered scores per prompt.
        reward: Running scales of the rewards.
        multipliers: Of the constraints.
        prompts: Position in the prompt source.
        critic: Expects what states are worth; None for no critic.
        start_weights: A copy of the trained weights before the first update, where something holds them there; made
            again with the policy, and not saved.
        alpha: Present KL weight, reward units per nat; None before the first epoch's scores where they set it.
        course: What an adaptive weight knows of the KL; begun anew where a checkpoint has none.
        preparation: What the objective makes of an epoch before its updates, and remembers; None for nothing.
        counts: How far the run has come.
        saved_epoch: Finished epochs in the newest checkpoint; -1 before the first.
    """

    config: Config
    policy: Policy
    learners: tuple[Learner, ...]
    scaler: torch.amp.GradScaler
    advantages: AdvantageEstimator
    reward: WeightedSum
    multipliers: Multipliers
    prompts: PromptStream
    alpha: float | None
    critic: Critic | None = None
    start_weights: Mapping[str, Tensor] | None = None
    course: KLCourse = field(default_factory=KLCourse)
    preparation: Preparation | None = None
    counts: Counts = field(default_factory=Counts)
    saved_epoch: int = -1

    @classmethod
    def start(cls, config: Config, policy: Policy, reward: WeightedSum, prompts: PromptStream) -> "TrainState":
        """The state before the first epoch."""
        fp16 = config.model.precision == "fp16"
        critic, learners = None, [policy_learner(config, policy)]
        if config.critic.is_on:
            critic, of_critic = make_critic(config, policy, reward, prompts.entries[0])
            learners.append(of_critic)
        return cls(
            config=config,
            policy=policy,
            learners=tuple(learners),
            scaler=torch.amp.GradScaler(policy.device.type, init_scale=1024.0, enabled=fp16),
            advantages=AdvantageEstimator(config.advantages),
            reward=reward,
            multipliers=Multipliers(config.constraints),
            prompts=prompts,
            alpha=config.kl.alpha,
            critic=critic,
            start_weights=_copy_of(policy.trainable()) if config.regularization.is_on else None,
            preparation=None if config.demand.prepare is None else config.demand.prepare.make(),
        )

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.counts.epoch

    @property
    def learner(self) -> Learner:
        """The policy's."""
        return self.learners[0]

    @property
    def old(self) -> Mapping[str, Tensor] | None:
        """The weights of the old policy; None where the objective demands none."""
        average = self.learner.averages.get(OLD)
        return None if average is None else average.average

    @property
    def stops_early(self) -> bool:
        """Whether enough evaluations in a row have found over-optimisation to stop; the main process knows."""
        options = self.config.evaluation
        return options.stop_on_overoptimisation and self.counts.overoptimised >= options.overoptimisation_patience

    def kl_weight(self, scores: Tensor) -> float:
        """The KL weight of this epoch, given its total rewards (N,)."""
        if self.alpha is None:
            self.alpha = first_alpha(self.config.kl, float(scores.double().std(correction=0)))
        return self.alpha

    def follow_kl(self, path_kl: float) -> None:
        """Takes an epoch's path KL, nats, into the weight of the next."""
        assert self.alpha is not None, "the first epoch has set it"
        self.alpha, self.course = next_alpha(self.config.kl, self.alpha, path_kl, course=self.course)

    def save(self, folder: Path, processes: Processes, *, beside: Callable[[Path], None] | None = None) -> None:
        """Writes a checkpoint; called on every process, written by the main one, with all tensors whole.

        Args:
            folder: Where to.
            processes: Who shares the run.
            beside: Adds files of its own to the folder being written.
        """
        rng_tensors, rng_values = rng_state()
        everyones_tensors, everyones_values = processes.gather_tensors(rng_tensors), processes.gather_json(rng_values)
        remembered = [] if self.preparation is None else processes.gather_tensors(self.preparation.tensors())
        keep = processes.is_main
        tensors = {group: collected(members, keep=keep) for group, members in self._tensors().items()}
        if keep:
            random = {f"rng_{rank}": state for rank, state in enumerate(everyones_tensors)}
            random |= {f"prepared_{rank}": own for rank, own in enumerate(remembered)}
            values = {**self._values(), "rng": {str(rank): state for rank, state in enumerate(everyones_values)}}
            used = tensors.get(EVALUATED, tensors["weights"])

            def extra(path: Path) -> None:
                self._write(path, used)
                if beside is not None:
                    beside(path)

            save_checkpoint(folder, tensors={**tensors, **random}, values=values, extra=extra)
        self.saved_epoch = self.epoch
        processes.wait()

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights that are evaluated and exported in the model, for the time of a `with` block."""
        average = self.learner.averages.get(EVALUATED)
        if average is None:
            yield
            return
        with average.applied():
            yield

    def export(self, folder: Path, processes: Processes) -> None:
        """Writes the weights to use (averaged, if they are) for `pipeline.load_lora_weights(folder)`.

        Called on every process, written by the main one.
        """
        average = self.learner.averages.get(EVALUATED)
        used = collected(self.policy.trainable() if average is None else average.average, keep=processes.is_main)
        if processes.is_main:
            self._write(folder, used)

    def _write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Weights in diffusers' format, with both samplers and a card beside them."""
        self.policy.save(folder, weights)
        if self.critic is not None:
            self.critic.save(folder)
        write_samplers(folder, rollout=self.config.sampler, evaluation=self.config.evaluation_sampler)
        write_model_card(folder, self.policy, self.config, epoch=self.epoch, samples=self.counts.samples)

    @contextmanager
    def undone_on(self, *errors: type[Exception]) -> Iterator[None]:
        """Counters, statistics and random states go back to the start of a `with` block that ends with such an error.

        Where the start is in a checkpoint, nothing is copied and nothing goes back.
        """
        snapshot = None if self.saved_epoch == self.epoch else Snapshot(values=self._values(), rng=rng_state())
        try:
            yield
        except errors:
            if snapshot is not None:
                self._set_values(snapshot.values)
                set_rng_state(*snapshot.rng)
            raise

    @contextmanager
    def weights_undone_on(self, *errors: type[Exception]) -> Iterator[None]:
        """The same for weights, optimizer moments and averages, of which a copy waits in host memory meanwhile."""
        copies = {} if self.saved_epoch == self.epoch else self._copied()
        remembered = None if self.preparation is None else self.preparation.tensors()
        try:
            yield
        except errors:
            if self.preparation is not None and remembered is not None:
                self.preparation.load(remembered)
            for learner in self.learners if copies else ():
                learner.go_back(copies)
            raise

    def _copied(self) -> dict[str, dict[str, Tensor]]:
        """All tensors on the CPU; of split ones this process's part."""
        return {
            group: {name: local(value.detach()).to("cpu", copy=True) for name, value in members.items()}
            for group, members in self._tensors().items()
        }

    def load(
        self, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any], processes: Processes
    ) -> None:
        """Continues from a checkpoint's contents.

        Raises:
            CheckpointError: It holds other weights than this configuration trains.
        """
        for learner in self.learners:
            learner.load(tensors)
        self._set_values(values)
        self.saved_epoch = self.epoch
        rank = str(processes.rank)
        if rank in values["rng"]:
            set_rng_state(tensors[f"rng_{rank}"], values["rng"][rank])
        if self.preparation is not None:
            self.preparation.load(self._remembered(tensors, processes))

    def _remembered(self, tensors: Mapping[str, Mapping[str, Tensor]], processes: Processes) -> Mapping[str, Tensor]:
        """This process's part of what the preparation remembers; nothing where as many processes did not save it."""
        saved = sum(group.startswith("prepared_") for group in tensors)
        return tensors[f"prepared_{processes.rank}"] if saved == processes.count else {}

    def use(self, weights: Mapping[str, Tensor]) -> None:
        """Takes other weights, whole, for the trained ones and their averages."""
        self.learner.use({"weights": weights, **dict.fromkeys(self.learner.averages, weights)})

    def _set_values(self, values: Mapping[str, Any]) -> None:
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
        self.advantages.load_state_dict(values["advantages"])
        self.reward.load_state_dict(values["reward"])
        self.multipliers.load_state_dict(values.get("multipliers", {}))
        self.prompts.position = values["prompts"]
        self.alpha, self.course = values["alpha"], KLCourse.from_values(values.get("kl_course", {}))
        self.counts = Counts(**{name: values[name] for name in asdict(Counts())})
        for learner in self.learners:
            learner.load_values(values)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        return {group: members for learner in self.learners for group, members in learner.tensors().items()}

    def _values(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "kl_course": asdict(self.course),
            **asdict(self.counts),
            **{name: value for learner in self.learners for name, value in learner.values().items()},
            "scaler": self.scaler.state_dict(),
            "advantages": self.advantages.state_dict(),
            "reward": self.reward.state_dict(),
            "multipliers": self.multipliers.state_dict(),
            "prompts": self.prompts.position,
            "noise": NOISE,
        }


def _copy_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def policy_learner(config: Config, policy: Policy) -> Learner:
    """The learner of a policy's weights, with the averages that the configuration and its objective ask for.

    Raises:
        UserError: There is nothing to train.
    """
    parameters, decay = policy.trainable(), config.optimizer.ema_decay
    if not parameters:
        raise UserError("the policy has nothing to train; give Policy an adapter: LoraConfig() or FullConfig()")
    averages = {EVALUATED: Average(parameters, ramped(decay), after="step")} if decay > 0 else {}
    lag = config.demand.old_policy
    if lag is not None:
        averages[OLD] = Average(parameters, lag, after="epoch")
    optimizer = make_optimizer(config, parameters.values())
    return Learner(name=POLICY, parameters=parameters, optimizer=optimizer, averages=averages)
