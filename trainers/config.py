"""Everything a run can be told, as one frozen dataclass, and the checks between its groups of keys.

A YAML file holds differences from the defaults (`trainers.config_io` reads and writes it). The groups are in
`trainers.config_groups` and, where they belong to the algorithm, beside it in `ddpo` and `rewards`. To add an
algorithm, put its config in the type of `Config.objective` with `one_of`.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Discriminator, Tag

from ddpo.advantages import AdvantageConfig
from ddpo.kl import AdaptiveKL, FixedKL
from ddpo.lagrangian import KL_NAME, Constraint
from ddpo.lora import FullConfig, LoraConfig
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.potential import check_steps
from ddpo.samplers import FLOW_ONLY, VP_ONLY, SamplerConfig
from ddpo.validation import FieldError, check
from rewards.combine import RewardTerm
from trainers.config_groups import (
    BatchConfig,
    CheckpointConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RewardProcessConfig,
    RunConfig,
    ShapingConfig,
    TrackingConfig,
)
from trainers.evaluation_sampler import EvaluationSampler
from trainers.prompts import PromptConfig


def one_of(default: str) -> Discriminator:
    """Chooses a member of a union by its `kind`; a mapping without one means `default`, the union's first member."""

    def kind(value: object) -> str | None:
        if isinstance(value, dict):
            tag = value.get("kind", default)
            return tag if isinstance(tag, str) else repr(tag)
        return getattr(value, "kind", None)

    return Discriminator(kind)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        model: The pretrained pipeline.
        adapter: Which weights are trained.
        sampler: How images are sampled.
        objective: The algorithm.
        kl: Weight of the KL to the pretrained pipeline.
        advantages: From scores to advantages.
        batch: Numbers of samples and what fits on a device.
        distributed: How several processes share the network.
        optimizer: AdamW and its learning rate.
        rewards: What is maximised: the weighted sum of these.
        constraints: Bounds on the means of rewards or on the path KL, kept by multipliers.
        heldout_rewards: Measured in evaluations, never optimised.
        reward_processes: Processes and devices of their own for all of these.
        shaping: Intermediate rewards on the predicted clean image.
        prompts: Training prompts.
        evaluation: Fixed prompts and seeds, measured during training.
        checkpoints: What is kept to continue from.
        tracking: Where metrics and pictures go.
        run: The run folder.
        seed: Seed of weights, prompts and noise.
        epochs: Epochs to train.
        max_minutes: Stop after the epoch that passes this training time (evaluations not counted); null for no limit.
        gate_tolerance: Largest mean |log-probability recomputed in training - the one from sampling| before the first
            update of an epoch, nats per latent dimension; null takes 1e-5 for fp32, 1e-3 for bf16 and fp16.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: Annotated[
        Annotated[LoraConfig, Tag("lora")] | Annotated[FullConfig, Tag("full")],
        one_of("lora"),
    ] = field(default_factory=LoraConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    objective: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    kl: Annotated[
        Annotated[FixedKL, Tag("fixed")] | Annotated[AdaptiveKL, Tag("adaptive")],
        one_of("fixed"),
    ] = field(default_factory=FixedKL)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: tuple[RewardTerm, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    heldout_rewards: tuple[RewardTerm, ...] = ()
    reward_processes: RewardProcessConfig = field(default_factory=RewardProcessConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    epochs: int = 100
    max_minutes: float | None = None
    gate_tolerance: float | None = None

    def __post_init__(self) -> None:
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        check(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        for name in ("max_minutes", "gate_tolerance"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "positive or null")
        for name in ("rewards", "heldout_rewards"):
            shown = [term.shown for term in getattr(self, name)]
            cure = "a list that names each reward once, or tells them apart by `label`"
            check(len(set(shown)) == len(shown), name, shown, cure)
        bounded = [constraint.reward for constraint in self.constraints]
        check(len(set(bounded)) == len(bounded), "constraints", bounded, "a list that names each reward once")
        check_steps(self.shaping.steps, self.sampler.num_steps)
        self._check_noise()
        self._check_groups()
        self._check_evaluation()
        self._check_units()
        self._check_network()

    def _check_network(self) -> None:
        """What cannot be trained, split over processes, or compiled together."""
        full = isinstance(self.adapter, FullConfig) and self.model.quantization is not None
        cure = "null with adapter.kind: full (quantised weights cannot be trained; use adapter.kind: lora)"
        check(not full, "model.quantization", self.model.quantization, cure)
        if self.distributed.strategy != "ddp":
            split = f"with distributed.strategy: {self.distributed.strategy}"
            cure = f"bf16 or fp32 {split} (fp16's loss scale sees one process's part only)"
            check(self.model.precision != "fp16", "model.precision", self.model.precision, cure)
            check(not self.model.compile, "model.compile", True, f"false {split} (not tested together)")
            quantization = self.model.quantization
            check(
                quantization is None, "model.quantization", quantization, f"null {split} (packed weights do not split)"
            )
            check(
                not self.optimizer.eight_bit, "optimizer.eight_bit", True, f"false {split} (its averages do not split)"
            )

    def _check_noise(self) -> None:
        """A policy gradient needs a density: sampling must have noise."""
        because = f"with objective.kind: {self.objective.kind} (without noise there is no log-probability)"
        check(self.sampler.kind != "ode", "sampler.kind", self.sampler.kind, f"a stochastic sampler {because}")
        check(self.sampler.eta > 0, "sampler.eta", self.sampler.eta, f"positive {because}")

    def _check_groups(self) -> None:
        group, samples = self.batch.group_size, self.batch.samples_per_epoch
        alone = self.advantages.baseline == "group" and group < 2
        cure = "at least 2 with advantages.baseline: group (or choose baseline: prompt or batch)"
        check(not alone, "batch.group_size", group, cure)
        check(samples >= 2, "batch.samples_per_epoch", samples, "at least 2 (an advantage compares samples)")

    def _check_evaluation(self) -> None:
        """The evaluation's sampler must be possible, and of the same model family as training's."""
        try:
            kind = self.evaluation_sampler.kind
        except FieldError as error:
            raise FieldError(f"evaluation.sampler.{error.field}", error.value, error.expected) from error
        family = FLOW_ONLY if self.sampler.kind in FLOW_ONLY else VP_ONLY
        fitting = f"{', '.join(family)} or ode, as sampler.kind is {self.sampler.kind}"
        check(kind in (*family, "ode"), "evaluation.sampler.kind", kind, fitting)

    def _check_units(self) -> None:
        """What is in reward units cannot be added to GDPO's deviations; the KL needs no second multiplier."""
        is_gdpo = self.advantages.combination == "gdpo"
        used = {"constraints": bool(self.constraints), "shaping.steps": bool(self.shaping.steps)}
        extra = [name for name, is_used in used.items() if is_used]
        cure = f"sum with {' and '.join(extra)} (they are in reward units, gdpo's advantages are not)"
        check(not (is_gdpo and extra), "advantages.combination", self.advantages.combination, cure)
        twice = isinstance(self.kl, AdaptiveKL) and KL_NAME in [constraint.reward for constraint in self.constraints]
        check(not twice, "kl.kind", self.kl.kind, f"fixed with a constraint on {KL_NAME}")

    @property
    def weighs_kl(self) -> bool:
        """Whether the KL to the pretrained pipeline has a weight: a penalty, or the multiplier of a bound on it."""
        bounded = any(constraint.reward == KL_NAME for constraint in self.constraints)
        return bounded or isinstance(self.kl, AdaptiveKL) or self.kl.alpha > 0

    @property
    def evaluation_sampler(self) -> SamplerConfig:
        """The sampler of evaluations and of `ddpo sample`, with training's keys filled in."""
        return (self.evaluation.sampler or EvaluationSampler()).resolve(self.sampler)

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """All rewards that are computed in training: `rewards`, and with weight 0 what only constraints name."""
        known = {alias for term in self.rewards for alias in term.aliases}
        wanted = [c.reward for c in self.constraints if c.reward != KL_NAME and c.reward not in known]
        new = [name for name in wanted if "/" not in name or ":" in name or name.partition("/")[0] not in known]
        return (*self.rewards, *(RewardTerm(name=name, weight=0.0) for name in new))

    @property
    def learning_rate(self) -> float:
        """The optimizer's peak learning rate, with the adapter's default filled in."""
        default = 3e-4 if isinstance(self.adapter, LoraConfig) else 1e-5
        return self.optimizer.learning_rate or default

    @property
    def gate_tolerance_nats(self) -> float:
        """Tolerance of the on-policy gate, nats per latent dimension, with the precision's default filled in."""
        default = 1e-5 if self.model.precision == "fp32" else 1e-3
        return self.gate_tolerance or default
