"""The critic in an epoch: what it expects of the samples, and its regression on what they earned.

It is asked before the epoch's advantages are made and fitted after, so that no advantage knows its own outcome. An
update takes each of the N samples at one of its steps, in an order of its own that goes through all T steps before any
comes again.

N samples of all processes, B of this one, T steps, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo import Policy
from ddpo.credit.critic import Critic, CriticShape, pooled_prompt
from ddpo.credit.gae import generalised_advantages
from ddpo.credit.lagrangian import KL_NAME
from ddpo.pipeline.features import FeatureReader
from ddpo.placement import fetch
from ddpo.seeds import Purpose, one_seed, random_orders, stream
from ddpo.trajectory import Condition, Samples, Trajectory
from ddpo.validation import UserError
from rewards import WeightedSum
from trainers.config import Config
from trainers.config.groups import OptimizerConfig
from trainers.epoch.learner import Learner
from trainers.epoch.path_kl import EpochKL
from trainers.epoch.score import Scored
from trainers.epoch.step_rules import StepRule, adamw
from trainers.parallel.gradients import sum_gradients
from trainers.parallel.processes import Processes
from trainers.planning.plan import BatchPlan
from trainers.prompts import Prompt
from trainers.tracking.metrics import Means

NAME = "critic"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an epoch's samples earned and what the critic had expected, on the CPU in float64, in each score's own unit.

    Attributes:
        heads: Names of the scores.
        values: At x_0 .. x_{T-1}, (N, T, H).
        final: Earned at the end of the chain, (N, H).
        earned: By each step, (N, T, H).
        decisions: Which steps have noise, (T,) bool.
        states: What the critic sees of this process's samples, (B, T or more, *state), where trajectories wait.
    """

    heads: tuple[str, ...]
    values: Tensor
    final: Tensor
    earned: Tensor
    decisions: Tensor
    states: Tensor

    def targets(self, target_lambda: float) -> Tensor:
        """Lambda-returns, (N, T, H)."""
        advantages = generalised_advantages(
            self.final, self.earned, self.values, gae_lambda=target_lambda, decisions=self.decisions
        )
        return self.values + advantages


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """The critic's updates of an epoch, over all processes.

    Attributes:
        loss: Mean of half its squared error, in standard deviations of the targets.
        grad_norm: Mean norm before clipping; NaN if every update was skipped.
    """

    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True)
class ValueLearner:
    """The critic of a run and how it learns.

    Attributes:
        critic: The network.
        reader: Reads what it sees of the denoiser; None where it sees the latents.
        learner: Its parameters and optimizer.
        config: Of the run.
        rule: Steps it.
        plan: Sizes of an epoch.
        processes: Who shares it.
    """

    critic: Critic
    reader: FeatureReader | None
    learner: Learner
    config: Config
    rule: StepRule
    plan: BatchPlan
    processes: Processes

    @torch.no_grad()
    def expect(self, path: Trajectory, states: Tensor) -> Tensor:
        """What is expected at the states x_0 .. x_{T-1} of all processes' samples, (N, T, H) float64 on the CPU.

        Args:
            path: Of this process.
            states: What the critic sees of it, (B, T or more, *state).
        """
        prompts, num_steps = self._prompts(path), path.schedule.num_steps
        sites = torch.arange(len(path.seeds) * num_steps).split(self.config.critic.batch_size)
        parts = [self.critic(*_at(states, prompts, own // num_steps, own % num_steps)) for own in sites]
        own = torch.cat(parts).unflatten(0, (-1, num_steps))
        return self.processes.gather(own).double().cpu()

    def outcome(self, scored: Scored, kl: EpochKL | None) -> Outcome:
        """What the critic expects of an epoch's samples, before it is fitted, beside what they earned.

        Args:
            scored: Samples of this process, scores of all N.
            kl: To the pretrained model, measured of all where it has a head.
        """
        path = scored.samples.trajectory
        states = path.latents if scored.features is None else scored.features
        values = self.expect(path, states)
        final, earned = torch.zeros_like(values[:, 0]), torch.zeros_like(values)
        for head, name in enumerate(self.critic.shape.heads):
            if name == KL_NAME:
                assert kl is not None and kl.of_all is not None, "what has a weight is measured everywhere"
                earned[..., head] = kl.of_all
            else:
                final[:, head] = scored.scores.components[name]
        return Outcome(
            heads=self.critic.shape.heads,
            values=values,
            final=final,
            earned=earned,
            decisions=path.schedule.stochastic.cpu(),
            states=states,
        )

    def fit(self, samples: Samples, outcome: Outcome, *, start: int, epoch: int) -> FitReport:
        """Takes the critic's optimizer steps of an epoch.

        Args:
            samples: Of this process.
            outcome: Of all samples.
            start: Place of this process's first sample.
            epoch: Finished epochs.

        Raises:
            DivergedError: The third non-finite gradient in a row.
            Interrupted: A signal has reached some process.
        """
        options, path = self.config.critic, samples.trajectory
        targets = outcome.targets(options.target_lambda)
        self.critic.rescale(targets.flatten(0, 1))
        own = targets[start : start + len(samples)].float().to(path.log_probs.device)
        prompts, norms = self._prompts(path), []
        losses: list[Tensor] = []
        for steps in self._steps(start, len(samples), epoch=epoch):
            self.processes.safe_point("training")
            update = Regression(
                by=self, states=outcome.states, prompts=prompts, targets=own, steps=steps, losses=losses
            )
            norms.append(self.rule([self.learner], update)[NAME].grad_norm)
        loss = self.processes.sum(torch.stack(losses).sum()) / options.updates_per_epoch
        known = [norm for norm in norms if norm is not None]
        return FitReport(loss=float(loss), grad_norm=sum(known) / len(known) if known else float("nan"))

    def _prompts(self, path: Trajectory) -> Tensor:
        """Pooled prompts of this process's samples, (B, P)."""
        device, rows = path.log_probs.device, torch.arange(len(path.seeds)).split(self.config.critic.batch_size)
        parts = [pooled_prompt(path.condition.index(own), len(own)).to(device) for own in rows]
        return torch.cat(parts)

    def _steps(self, start: int, count: int, *, epoch: int) -> Iterator[Tensor]:
        """The step at which each update takes each of this process's samples, (B,) int64."""
        num_steps = self.plan.num_steps
        for update in range(self.config.critic.updates_per_epoch):
            turn, place = divmod(update, num_steps)
            if place == 0:
                number = self.plan.passes + 1 + turn  # after those of passes and of what is prepared
                seed = one_seed(self.config.seed, epoch, number, purpose=Purpose.PASS)
                order = random_orders(self.plan.images_per_epoch, num_steps, stream(seed))[start : start + count]
            yield order[:, place]


@dataclass(frozen=True, kw_only=True)
class Regression:
    """One update's squared error, in micro-batches (a `trainers.epoch.step_rules.Update`).

    Attributes:
        by: Whose.
        states: What the critic sees of this process's samples, (B, T or more, *state).
        prompts: Pooled, (B, P).
        targets: (B, T, H).
        steps: At which each sample is taken, (B,) int64.
        losses: Takes in this process's part of the mean, micro-batch by micro-batch.
    """

    by: ValueLearner
    states: Tensor
    prompts: Tensor
    targets: Tensor
    steps: Tensor
    losses: list[Tensor]

    def accumulate(self) -> Means:
        """Adds up the gradients of all processes."""
        by = self.by
        for rows in torch.arange(len(self.steps)).split(by.config.critic.batch_size):
            steps = self.steps[rows]
            losses = by.critic.loss(*_at(self.states, self.prompts, rows, steps), self.targets[rows, steps])
            loss = losses.sum() / by.plan.images_per_epoch
            loss.backward()
            self.losses.append(loss.detach())
        sum_gradients(by.learner.parameters.values(), by.processes)
        return Means(self.targets.shape[1], self.prompts.device)


def _at(states: Tensor, prompts: Tensor, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, states and pooled prompts of samples `rows` at `steps`, (N,) int64 on the CPU, on the device."""
    device = prompts.device
    return steps.to(device), fetch(states[rows, steps], device), prompts[rows.to(device)]


def make_critic(config: Config, policy: Policy, reward: WeightedSum, prompt: Prompt) -> tuple[Critic, Learner]:
    """The critic that a configuration asks for, with a head for each reward, bounded component and the weighed KL.

    Args:
        config: The run.
        policy: Whose states it is of.
        reward: What is scored.
        prompt: Any; its condition tells the sizes.

    Raises:
        UserError: The denoiser has no features to read.
    """
    condition = policy.encode([prompt.text], [prompt.metadata])
    reader = make_reader(config, policy)
    shape = CriticShape(
        heads=head_names(config, reward),
        num_steps=config.sampler.num_steps,
        state=policy.latent_shape if reader is None else (count_features(reader, policy, condition),),
        prompt_size=pooled_prompt(condition, 1).shape[1],
        width=config.critic.width,
    )
    critic = Critic(shape, seed=config.seed).to(policy.device)
    parameters = dict(critic.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.critic.learning_rate, weight_decay=0.0)
    return critic, Learner(name=NAME, parameters=parameters, optimizer=optimizer)


def head_names(config: Config, reward: WeightedSum) -> tuple[str, ...]:
    """What has a head."""
    bounded = [reward.component_of(bound.reward) for bound in config.constraints if bound.reward != KL_NAME]
    names = dict.fromkeys([*reward.weights(0), *bounded])
    return (*names, *([KL_NAME] if config.weighs_kl else []))


def make_reader(config: Config, policy: Policy) -> FeatureReader | None:
    """Reads what the critic of a configuration sees of the denoiser; None where it sees the latents.

    Raises:
        UserError: The denoiser has no features to read, or not of all samples of a batch together.
    """
    if config.critic.kind != "features":
        return None
    if policy.denoiser.one_row or policy.denoiser.calls_differ:
        raise UserError(
            "critic.kind must be network with this pipeline, got features: it calls its denoiser for some samples of a "
            "batch at a time"
        )
    return FeatureReader(policy.networks())


@torch.no_grad()
def count_features(reader: FeatureReader, policy: Policy, condition: Condition) -> int:
    """F, by a pass of the denoiser on one sample."""
    with reader.reading():
        policy.outputs(0, torch.zeros(1, *policy.latent_shape, device=policy.device), condition)
        return reader.take(1).shape[1]


def value_learner(
    config: Config, policy: Policy, critic: Critic, learner: Learner, plan: BatchPlan, processes: Processes
) -> ValueLearner:
    """How a critic learns."""
    rule = adamw(OptimizerConfig(), scaler=torch.amp.GradScaler("cpu", enabled=False), total=1, elapsed=lambda: 0.0)
    return ValueLearner(
        critic=critic,
        reader=make_reader(config, policy),
        learner=learner,
        config=config,
        rule=rule,
        plan=plan,
        processes=processes,
    )
