"""Everything a run can be told, as one frozen dataclass, and the checks between its groups of keys.

A YAML file holds differences from the defaults (`trainers.config.io` reads and writes it). The groups are in
`trainers.config.groups` and, where they belong to the algorithm, beside it in `ddpo` and `rewards`. To add an
algorithm, put its config in the type of `Config.objective` with `one_of`.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Tag

from ddpo.credit.advantages import AdvantageConfig
from ddpo.credit.critic import CriticConfig
from ddpo.credit.kl import AdaptiveKL, FixedKL
from ddpo.credit.lagrangian import KL_NAME, Constraint
from ddpo.credit.potential import check_steps
from ddpo.objectives.adjoint_matching import AdjointMatchingConfig
from ddpo.objectives.base import Demand
from ddpo.objectives.clean_sample import CleanSampleConfig
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.objectives.preference import PreferenceConfig
from ddpo.objectives.reward_gradient import RewardGradientConfig
from ddpo.regularization import RegularizationConfig
from ddpo.sampling.samplers import FLOW_ONLY, VP_ONLY, SamplerConfig
from ddpo.steering.kinds import BestOfN, FeynmanKacKind, LangevinKind, RewardGradientKind, SvddKind
from ddpo.trajectory import Keep
from ddpo.validation import check, within
from ddpo.weights.adapter import FullConfig, LoraConfig
from rewards.combine.weighted_sum import RewardTerm
from trainers.config.chain_unit import check_chain_unit
from trainers.config.evaluation_sampler import EvaluationSampler
from trainers.config.groups import (
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
from trainers.config.plausible import check_plausible
from trainers.offline.read import OfflineConfig
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
        optimizer: How gradients become steps.
        critic: A learnt value function, the baseline of each step.
        regularization: Holds the weights to what they could do at the start, beside or in place of the KL.
        rewards: What is maximised: the weighted sum of these.
        constraints: Bounds on the means of rewards or on the path KL, kept by multipliers.
        heldout_rewards: Measured in evaluations, never optimised.
        reward_processes: Processes and devices of their own for all of these.
        shaping: Intermediate rewards on the predicted clean image.
        steer: Steers what is sampled to learn from, with objectives that take clean latents alone; null for none.
        offline: Images that were judged already, to learn from in place of samples; null to sample.
        prompts: Training prompts; with `offline` only the evaluation's.
        evaluation: Fixed prompts and seeds, measured during training.
        checkpoints: What is kept to continue from.
        tracking: Where metrics and pictures go.
        run: The run folder.
        seed: Seed of weights, prompts and noise, and of the global generators that rewards may draw from.
        epochs: Epochs to train.
        max_minutes: Stop after the epoch that passes this training time (evaluations not counted); null for no limit.
        clock: What training time is: `wall`, or `process`, the processor time of this process alone, which other work
            on the machine does not lengthen (not an accelerator's, nor that of other processes).
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
    objective: Annotated[
        Annotated[PolicyGradientConfig, Tag("policy_gradient")]
        | Annotated[CleanSampleConfig, Tag("clean_sample")]
        | Annotated[RewardGradientConfig, Tag("reward_gradient")]
        | Annotated[AdjointMatchingConfig, Tag("adjoint_matching")]
        | Annotated[PreferenceConfig, Tag("preference")],
        one_of("policy_gradient"),
    ] = field(default_factory=PolicyGradientConfig)
    kl: Annotated[
        Annotated[FixedKL, Tag("fixed")] | Annotated[AdaptiveKL, Tag("adaptive")],
        one_of("fixed"),
    ] = field(default_factory=FixedKL)
    advantages: AdvantageConfig = field(default_factory=AdvantageConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    rewards: tuple[RewardTerm, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    heldout_rewards: tuple[RewardTerm, ...] = ()
    reward_processes: RewardProcessConfig = field(default_factory=RewardProcessConfig)
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    steer: (
        Annotated[
            Annotated[BestOfN, Tag("best_of_n")]
            | Annotated[FeynmanKacKind, Tag("feynman_kac")]
            | Annotated[SvddKind, Tag("svdd")]
            | Annotated[RewardGradientKind, Tag("reward_gradient")]
            | Annotated[LangevinKind, Tag("langevin")],
            one_of("best_of_n"),
        ]
        | None
    ) = None
    offline: OfflineConfig | None = None
    prompts: PromptConfig = field(default_factory=PromptConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
    epochs: int = 100
    max_minutes: float | None = None
    clock: Literal["wall", "process"] = "wall"
    gate_tolerance: float | None = None

    def __post_init__(self) -> None:
        check_plausible(self)
        check(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
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
        with within("shaping"):
            check_steps(self.shaping.steps, self.sampler.num_steps)
        self._check_noise()
        self._check_last_step()
        self._check_offline()
        self._check_critic()
        self._check_groups()
        self._check_group_noise()
        self._check_steer()
        self._check_evaluation()
        self._check_units()
        self._check_network()
        self._check_regularization()
        self._check_trust_region()

    def _check_network(self) -> None:
        """What cannot be trained, split over processes, or compiled together."""
        full = isinstance(self.adapter, FullConfig) and self.model.quantization is not None
        cure = "null with adapter.kind: full (quantised weights cannot be trained; use adapter.kind: lora)"
        check(not full, "model.quantization", self.model.quantization, cure)
        stacked = isinstance(self.adapter, LoraConfig) and self.adapter.reference == "start"
        cure = "base with model.quantization (nothing can be added to quantised weights)"
        check(not stacked or self.model.quantization is None, "adapter.reference", "start", cure)
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
            cure = f"ddp with the objective {self.demand.name} (how often it calls the network is drawn)"
            check(not self.demand.varies, "distributed.strategy", self.distributed.strategy, cure)

    def _check_regularization(self) -> None:
        """Terms that need passes of their own, or whole weights."""
        options, strategy = self.regularization, self.distributed.strategy
        cure = "ddp with regularization (a split network is not held to its start)"
        check(strategy == "ddp" or not options.is_on, "distributed.strategy", strategy, cure)
        cure = "adamw with regularization (a trust region's search does not see its terms)"
        check(not (options.is_on and self.optimizer.is_trust_region), "optimizer.kind", self.optimizer.kind, cure)
        passes = options.ewc.strength > 0 or options.denoising.strength > 0
        cure = "false with regularization.ewc or regularization.denoising (their passes have batches of their own)"
        check(not (passes and self.model.compile), "model.compile", True, cure)

    def _check_trust_region(self) -> None:
        """Steps in nats need steps that have them, and a network that can be differentiated twice."""
        kind, chosen = self.optimizer.kind, f"with optimizer.kind: {self.optimizer.kind}"
        if not self.optimizer.is_trust_region:
            return
        what = "has no recorded steps with noise alone, whose KL is a step's length"
        cure = f"adamw with objective.kind: {self.objective.kind} and these keys of it (it {what})"
        check(self.demand.recorded, "optimizer.kind", kind, cure)
        strategy = self.distributed.strategy
        check(strategy == "ddp", "distributed.strategy", strategy, f"ddp {chosen} (split weights have no directions)")
        check(self.model.precision != "fp16", "model.precision", "fp16", f"fp32 or bf16 {chosen} (no scaled losses)")
        check(not self.model.compile, "model.compile", True, f"false {chosen} (compiled passes derive once)")
        packed = self.model.quantization
        check(packed is None, "model.quantization", packed, f"null {chosen} (packed layers derive once)")

    def _check_noise(self) -> None:
        """Where an objective needs a density, sampling must have noise; only there a step has a KL and a worth."""
        chosen, least = f"with objective.kind: {self.objective.kind}", self.demand.least_steps
        cure = f"at least {least} {chosen} (it leaves out the first {least - 1})"
        check(self.sampler.num_steps >= least, "sampler.num_steps", self.sampler.num_steps, cure)
        last, cure = self.demand.last_steps, f"at most {self.sampler.num_steps}, sampler.num_steps, or all"
        check(last <= self.sampler.num_steps, "objective.last_steps", last, cure)
        if self.demand.needs_kl:
            why = "the weight of a nat is what its targets are made of"
            check(not self.sampler.is_noise_free, "sampler.kind", self.sampler.kind, f"a stochastic sampler {chosen}")
            check(self.kl.alpha != 0, "kl.alpha", self.kl.alpha, f"positive {chosen} ({why})")
        if self.demand.kept_targets:
            why = "with objective.replay_epochs (targets of earlier epochs hold the weight that the KL had then)"
            check(isinstance(self.kl, FixedKL), "kl.kind", self.kl.kind, f"fixed {why}")
            bounded = [constraint.reward for constraint in self.constraints]
            check(KL_NAME not in bounded, "constraints", bounded, f"without {KL_NAME} {why}")
        if not self.demand.likelihood:
            has_term, has_kl = self.demand.weighs_kl, not self.sampler.is_noise_free
            why = "steps without noise have no KL" if has_term else "it has no KL term"
            cure = f"0 {chosen} ({why}), without a constraint on {KL_NAME}"
            check((has_term and has_kl) or not self.weighs_kl, "kl.alpha", self.kl.alpha, cure)
            cure = f"[] {chosen} (all its steps are worth the same)"
            check(not self.shaping.steps, "shaping.steps", list(self.shaping.steps), cure)
        if not self.demand.needs_noise:
            return
        because = f"{chosen} (without noise there is no log-probability)"
        check(self.sampler.kind != "ode", "sampler.kind", self.sampler.kind, f"a stochastic sampler {because}")
        check(self.sampler.eta > 0, "sampler.eta", self.sampler.eta, f"positive {because}")
        steps, demand = self.sampler.max_stochastic_steps, self.demand
        cure = f"more than objective.first_step {chosen} (next states are compared at the steps from there on)"
        check(not demand.contenders or demand.contended(steps) > 0, "sampler.num_steps", self.sampler.num_steps, cure)

    def _check_last_step(self) -> None:
        """The end of a chain that a sampler is told must be one that it can have; evaluations may take training's."""
        with within("sampler"):
            self.sampler.check_last_step()
        own = self.evaluation.sampler
        if own is not None and own.last_step is not None:
            with within("evaluation.sampler"):
                self.evaluation_sampler.check_last_step()

    def _check_offline(self) -> None:
        """Judged images have neither chains nor new scores."""
        if self.offline is None:
            return
        demand, source = self.demand, self.offline.source
        own = demand.needs_noise or demand.reward_gradient or demand.keep != Keep.FINAL or demand.old_policy is not None
        cure = f"null with {demand.name} (it learns from what the policy samples itself; dpo and kto do not)"
        check(not own, "offline", source, cure)
        cure = "at most 1 with offline (judged images score 1 and 0: no pair differs by more)"
        check(demand.margin <= 1, "objective.margin", demand.margin, cure)
        cure = "[] with offline (judged images have no rewards to bound)"
        check(not self.constraints, "constraints", [one.reward for one in self.constraints], cure)

    def _check_critic(self) -> None:
        """A critic is learnt where it is the baseline, of steps that are worth different amounts."""
        is_baseline, kind = self.advantages.has_critic, self.critic.kind
        cure = "network or features with advantages.baseline: critic (none would be learnt)"
        check(self.critic.is_on or not is_baseline, "critic.kind", kind, cure)
        cure = f"none without advantages.baseline: critic (now {self.advantages.baseline}), which alone asks it"
        check(is_baseline or not self.critic.is_on, "critic.kind", kind, cure)
        if not is_baseline:
            return
        cure = f"group, prompt or batch with objective.kind: {self.objective.kind} (all its steps are worth the same)"
        check(self.demand.likelihood, "advantages.baseline", "critic", cure)
        read = self.critic.kind == "features" and self.model.compile
        check(not read, "critic.kind", kind, "network with model.compile (what runs inside is not read)")
        cure = "[] with advantages.baseline: critic (a critic is a potential that is learnt)"
        check(not self.shaping.steps, "shaping.steps", list(self.shaping.steps), cure)
        cure = "none, std or zscore with advantages.baseline: critic (it does not know a prompt's remembered scores)"
        for number, term in enumerate(self.rewards):
            check(term.normalize != "prompt_zscore", f"rewards.{number}.normalize", term.normalize, cure)

    def _check_groups(self) -> None:
        group, samples = self.batch.group_size, self.batch.samples_per_epoch
        if not self._compares_samples:
            return
        alone = self.advantages.baseline == "group" and group < 2 and self.offline is None
        cure = "at least 2 with advantages.baseline: group (or choose baseline: prompt or batch)"
        check(not alone, "batch.group_size", group, cure)
        alone = self.demand.whole_groups and group < 2
        cure = f"at least 2 with objective.preset: {self.demand.name} (it compares the images of a prompt)"
        check(not alone, "batch.group_size", group, cure)
        check(samples >= 2, "batch.samples_per_epoch", samples, "at least 2 (an advantage compares samples)")

    def _check_group_noise(self) -> None:
        """A baseline needs samples besides a pair; samples that share their start need other noise to differ by."""
        batch, baseline = self.batch, self.advantages.baseline
        if batch.group_noise == "antithetic":
            chosen = "with batch.group_noise: antithetic"
            cure = f"group or batch {chosen} (a prompt's remembered scores do not tell pairs apart)"
            check(baseline != "prompt", "advantages.baseline", baseline, cure)
            name = "samples_per_epoch" if baseline == "batch" else "group_size"
            cure = f"at least 4 {chosen} (the baseline of a pair is the mean over other pairs)"
            check(getattr(batch, name) >= 4, f"batch.{name}", getattr(batch, name), cure)
        same = self.demand.same_start and batch.group_noise == "antithetic"
        cure = f"shared with objective.preset: {self.demand.name} (its pairs start from the same noise)"
        check(not same, "batch.group_noise", batch.group_noise, cure)
        same = batch.group_noise == "shared" and self.sampler.is_noise_free
        cure = "independent or antithetic with a sampler without noise (a prompt's images would all be the same)"
        check(not same, "batch.group_noise", batch.group_noise, cure)

    def _check_steer(self) -> None:
        """Steering acts through the sampler's noise; what it makes are clean latents without a density."""
        if self.steer is None:
            return
        demand, kind = self.demand, self.steer.kind
        own = demand.needs_noise or demand.reward_gradient or demand.keep != Keep.FINAL or demand.contenders > 0
        cure = f"null with {demand.name} (it learns from the policy's own chains; clean_sample does not)"
        check(not own, "steer.kind", kind, cure)
        check(self.offline is None, "steer.kind", kind, "null with offline, which samples nothing")
        cure = "null with a KL that is measured in sampling (kl.kind: adaptive, or a bound on it), which has none then"
        check(not self.measures_kl, "steer.kind", kind, cure)
        noise = "shared" if demand.same_start else self.batch.group_noise
        cure = f"null where the samples of a group have {noise} noise (particles are independent)"
        check(noise == "independent", "steer.kind", kind, cure)
        lacks_noise = self.steer.needs_noise and self.sampler.is_noise_free
        cure = "best_of_n with a sampler without noise (the others act through it), or choose a sampler with noise"
        check(not lacks_noise, "steer.kind", kind, cure)
        cure = f"at most batch.sample_batch_size, {self.batch.sample_batch_size} (all are in one batch)"
        check(self.steer.particles <= self.batch.sample_batch_size, "steer.particles", self.steer.particles, cure)

    def _check_evaluation(self) -> None:
        """The evaluation's sampler must be possible, and of the same model family as training's."""
        with within("evaluation.sampler"):
            kind = self.evaluation_sampler.kind
        if self.sampler.kind == "ode":  # of either family
            return
        family = FLOW_ONLY if self.sampler.kind in FLOW_ONLY else VP_ONLY
        fitting = f"{', '.join(family)} or ode, as sampler.kind is {self.sampler.kind}"
        check(kind in (*family, "ode"), "evaluation.sampler.kind", kind, fitting)

    def _check_units(self) -> None:
        """What is in reward units cannot be added to GDPO's deviations; the KL needs no second multiplier."""
        named = self.advantages.diversity
        known = [alias for term in self.rewards for alias in term.aliases]
        listed = named is None or named in known or named.partition("/")[0] in known
        cure = "null, a reward of `rewards` (its weight may be 0), or a component of one such as diversity/nearest"
        check(listed, "advantages.diversity", named, cure)
        if not self._compares_samples:
            cure = (
                f"sum with objective.kind: {self.objective.kind} (it takes the gradient of the total, in its own unit)"
            )
            check(self.advantages.combination == "sum", "advantages.combination", self.advantages.combination, cure)
            bounded = [constraint.reward for constraint in self.constraints if constraint.reward != KL_NAME]
            cure = f"[] but for {KL_NAME} with objective.kind: {self.objective.kind} (bounds are multipliers of scores)"
            check(not bounded, "constraints", bounded, cure)
        if self.demand.chain_unit:
            check_chain_unit(self)
        is_gdpo = self.advantages.combination == "gdpo"
        used = {"constraints": bool(self.constraints), "shaping.steps": bool(self.shaping.steps)}
        extra = [name for name, is_used in used.items() if is_used]
        cure = f"sum with {' and '.join(extra)} (they are in reward units, gdpo's advantages are not)"
        check(not (is_gdpo and extra), "advantages.combination", self.advantages.combination, cure)
        twice = isinstance(self.kl, AdaptiveKL) and KL_NAME in [constraint.reward for constraint in self.constraints]
        check(not twice, "kl.kind", self.kl.kind, f"fixed with a constraint on {KL_NAME}")

    @property
    def demand(self) -> Demand:
        """What the objective needs of a run."""
        demand = self.objective.build().demand
        return replace(demand, rows=demand.rows * self.batch.group_size) if demand.group_rows else demand

    @property
    def init(self) -> str | None:
        """The LoRA that the trained one begins from, or lies on; None for none."""
        return self.adapter.init if isinstance(self.adapter, LoraConfig) else None

    @property
    def frozen_passes(self) -> int:
        """Passes of the network without a graph that a unit of work takes in training, the KL's among them.

        Where an epoch is prepared by the pretrained network, its updates have none.
        """
        return self.demand.frozen_passes + (self.weighs_kl and self.demand.prepare is None)

    @property
    def weighs_kl(self) -> bool:
        """Whether the KL to the pretrained pipeline has a weight: a penalty, or the multiplier of a bound on it."""
        bounded = any(constraint.reward == KL_NAME for constraint in self.constraints)
        return bounded or isinstance(self.kl, AdaptiveKL) or self.kl.alpha > 0

    @property
    def measures_kl(self) -> bool:
        """Whether the KL is measured at every noisy step of every sample; else it is estimated from a few.

        It is where the samples' worth has it, or where something follows it.
        """
        return self.weighs_kl and (self.demand.likelihood or self.follows_kl)

    @property
    def follows_kl(self) -> bool:
        """Whether an adaptive weight or a constraint follows the KL: no step is then estimated from a few samples."""
        return not isinstance(self.kl, FixedKL) or any(bound.reward == KL_NAME for bound in self.constraints)

    @property
    def _compares_samples(self) -> bool:
        """Whether samples are worth something in comparison with others: not where the reward's gradient says it."""
        return self.demand.likelihood or not self.demand.reward_gradient

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
