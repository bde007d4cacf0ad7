"""Everything a run can be told, as frozen dataclasses: one group of keys per class, checked when it is built.

A YAML file holds differences from the defaults below (`trainers.config_io` reads and writes it). Keys that belong to
the algorithm are declared beside it: `ddpo.lora`, `ddpo.samplers`, `ddpo.objectives`, `ddpo.kl`, `ddpo.advantages`,
`rewards.combine` and `trainers.prompts`. To add an algorithm, put its config in the type of `Config.objective` with
`one_of`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Tag

from ddpo.advantages import AdvantageConfig
from ddpo.kl import AdaptiveKL, FixedKL
from ddpo.lagrangian import KL_NAME, Constraint
from ddpo.lora import FullConfig, LoraConfig
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.potential import check_steps
from ddpo.quantization import Quantization
from ddpo.samplers import FLOW_ONLY, VP_ONLY, SamplerConfig
from ddpo.validation import FieldError, check
from rewards.combine import RewardTerm
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
class ModelConfig:
    """The pretrained pipeline and where it runs.

    Attributes:
        path: Folder or Hugging Face id of a diffusers text-to-image pipeline; `shapes` is the one shipped here.
        revision: Branch, tag or commit on the hub; null takes the main branch.
        variant: Weight file variant, e.g. `fp16`; null takes the plain files.
        precision: Number format of the networks; latents and advantages are always float32, log-probabilities float64.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.3 times the time.
        offload: Keep the text encoder and the VAE on the CPU while they are not needed; an epoch's prompts are encoded
            in one go, and the text encoder is not needed for decoding.
        quantization: Number format of the pretrained denoiser's linear layers under a LoRA, by diffusers' quantisers:
            bitsandbytes (needs a GPU) or torchao; null for none.
        compile: Compile the denoiser by torch.compile: some minutes at the start, faster after. Both phases run the
            same compiled network, with rows padded to fixed counts.
        vae_slicing: Decode one image at a time: less memory.
        vae_tiling: Decode an image in overlapping tiles: less memory for large images, slightly other pixels.
        device: A torch device such as `cuda:1` or `cpu`; null takes this process's accelerator, else the CPU; `mps`
            is refused, since log-probabilities need float64.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str = "shapes"
    revision: str | None = None
    variant: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    offload: bool = False
    quantization: Quantization | None = None
    compile: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check(bool(self.path.strip()), "path", self.path, "a folder or a Hugging Face id")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is sampled per epoch (over all processes), and what fits on one device.

    Attributes:
        samples_per_epoch: Images per epoch over all processes; a multiple of group_size, and at least one a process.
            With a reward that compares the images of a group, a multiple of group_size times the number of processes.
        group_size: Images per prompt in an epoch.
        sample_batch_size: Per device: images per denoiser call while sampling (two rows each with guidance).
        train_batch_size: Per device: transitions (sample, step) per forward and backward pass. Bounds memory; the size
            of an update does not depend on it.
        trajectories: Where an epoch's latents and prompt embeddings wait for training: on the `device`, or in pinned
            `cpu` memory, from which each micro-batch is fetched. The numbers are the same.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    samples_per_epoch: int = 256
    group_size: int = 8
    sample_batch_size: int = 8
    train_batch_size: int = 8
    trajectories: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        for name in ("samples_per_epoch", "group_size", "sample_batch_size", "train_batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How several processes share the network; a single process ignores it.

    Attributes:
        strategy: `ddp` keeps the whole network on every device. `fsdp` splits weights, gradients and optimizer state
            over the devices and gathers the weights of a block while it computes: the least memory, the most traffic.
            `zero2` splits gradients and optimizer state only (for all-weights training; LoRA has little of either).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    strategy: Literal["ddp", "fsdp", "zero2"] = "ddp"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
        eight_bit: Keep the averages of gradients in 8 bits (bitsandbytes): 2 bytes a trained weight instead of 8.
        learning_rate: Peak step size; null takes 3e-4 for LoRA, 1e-5 for all weights.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        epsilon: Added to the denominator.
        weight_decay: Decoupled weight decay.
        max_grad_norm: The gradient is scaled down to this norm when it is longer.
        schedule: Course of the learning rate over the run's optimizer steps, after the warm-up.
        warmup_updates: Optimizer steps over which the rate rises linearly from 0.
        ema_decay: Decay of the moving average of the weights that is evaluated and exported; 0 takes the last weights.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    eight_bit: bool = False
    learning_rate: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: int = 0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        rate = self.learning_rate
        check(rate is None or rate > 0, "learning_rate", rate, "positive or null")
        for name in ("beta1", "beta2", "ema_decay"):
            check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("epsilon", "max_grad_norm"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("weight_decay", "warmup_updates"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("learning_rate", "epsilon", "weight_decay"):
            value = getattr(self, name)
            check(value is None or value < math.inf, name, value, "finite")


@dataclass(frozen=True, kw_only=True)
class RewardProcessConfig:
    """Processes of their own for rewards: they score while the next batch is sampled, on their own devices.

    Attributes:
        devices: One process for each entry on every machine, e.g. `[cuda:6, cuda:7]` or `[cpu, cpu]`; each holds all
            rewards, and batches go to whichever is free. `[]` computes rewards in the training processes.
        timeout: Seconds for the scores of one batch.
        start_timeout: Seconds for a process to load the rewards.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    devices: tuple[str, ...] = ()
    timeout: float = 600.0
    start_timeout: float = 1800.0

    def __post_init__(self) -> None:
        check(all(device.strip() for device in self.devices), "devices", list(self.devices), "a list of torch devices")
        for name in ("timeout", "start_timeout"):
            check(getattr(self, name) > 0, name, getattr(self, name), "positive")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Fixed prompts and seeds, measured before, during and after training.

    Attributes:
        every_epochs: Epochs between evaluations; 0 evaluates only at the start and the end.
        prompts: Evaluation prompts; null takes the training source.
        num_prompts: Prompts, the same in every evaluation.
        images_per_prompt: Images per prompt; at least 2 for diversity.
        seed: Seed of the evaluation noise.
        ode: Also evaluate the ODE of the same schedule, where the evaluation's sampler is not noise-free already.
        sampler: How evaluations and `ddpo sample` sample, where it differs from training; null for no difference.
        overoptimisation_threshold: Warn when a held-out reward lies this many standard errors below its best
            evaluation while the training reward lies as many above (paired differences per image); 0 never warns.
        stop_on_overoptimisation: Stop after `overoptimisation_patience` such evaluations in a row and export the
            weights of the best evaluation instead of the last; needs held-out rewards.
        overoptimisation_patience: Evaluations in a row before stopping.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every_epochs: int = 10
    prompts: PromptConfig | None = None
    num_prompts: int = 16
    images_per_prompt: int = 4
    seed: int = 1234
    ode: bool = True
    sampler: EvaluationSampler | None = None
    overoptimisation_threshold: float = 3.0
    stop_on_overoptimisation: bool = False
    overoptimisation_patience: int = 2

    def __post_init__(self) -> None:
        for name in ("every_epochs", "seed", "overoptimisation_threshold"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("num_prompts", "images_per_prompt", "overoptimisation_patience"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        never = self.stop_on_overoptimisation and self.every_epochs == 0
        cure = "at least 1 with stop_on_overoptimisation (it compares the evaluations of a run)"
        check(not never, "every_epochs", self.every_epochs, cure)
        blind = self.stop_on_overoptimisation and self.overoptimisation_threshold == 0
        cure = "positive with stop_on_overoptimisation (0 never warns, so it would never stop)"
        check(not blind, "overoptimisation_threshold", self.overoptimisation_threshold, cure)


@dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    """The reward of the predicted clean image as a potential: lowers variance, changes no optimum (`ddpo.potential`).

    Attributes:
        steps: Denoising steps, from 0, before which the predicted clean image is decoded and scored: one pass of the
            network, a decoding and a score each per image; `[]` for no shaping.
        strength: Factor on that score.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    steps: tuple[int, ...] = ()
    strength: float = 1.0

    def __post_init__(self) -> None:
        steps = list(self.steps)
        rising = all(a < b for a, b in zip(steps, steps[1:], strict=False))
        check(rising and all(k >= 0 for k in steps), "steps", steps, "rising numbers from 0")
        check(0 < self.strength < math.inf, "strength", self.strength, "positive and finite")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept to continue from.

    Attributes:
        every_epochs: Epochs between checkpoints; 0 saves only at the end.
        keep_last: Newest checkpoints to keep.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every_epochs: int = 10
    keep_last: int = 3

    def __post_init__(self) -> None:
        check(self.every_epochs >= 0, "every_epochs", self.every_epochs, "at least 0")
        check(self.keep_last >= 1, "keep_last", self.keep_last, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics and pictures go, besides the run folder (always).

    Attributes:
        trackers: Any of `trackio` (local page, `ddpo dashboard`), `wandb`, `tensorboard`; `[]` for none.
        project: Project name in the tracker.
        pictures_every_epochs: Epochs between sample grids; 0 for none.
        num_pictures: Images in a grid.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    trackers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ("trackio",)
    project: str = "ddpo"
    pictures_every_epochs: int = 5
    num_pictures: int = 16

    def __post_init__(self) -> None:
        twice = len(set(self.trackers)) < len(self.trackers)
        check(not twice, "trackers", list(self.trackers), "a list that names each tracker once")
        every = self.pictures_every_epochs
        check(every >= 0, "pictures_every_epochs", every, "at least 0")
        check(self.num_pictures >= 1, "num_pictures", self.num_pictures, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder.

    Attributes:
        name: Folder name; null takes the time (UTC) and the configuration file's name, from Python the first reward's.
        output_dir: Folder of all runs.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str | None = None
    output_dir: str = "runs"

    def __post_init__(self) -> None:
        plain = self.name is None or (bool(self.name.strip()) and "/" not in self.name and self.name not in (".", ".."))
        check(plain, "name", self.name, "a folder name without '/', or null")
        check(bool(self.output_dir.strip()), "output_dir", self.output_dir, "a folder")

    @property
    def folder(self) -> Path:
        """`output_dir`, with `~` for the home folder."""
        return Path(self.output_dir).expanduser()


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
