"""Everything a run can be told, as frozen dataclasses: one group of keys per class, checked when it is built.

A YAML file holds differences from the defaults below (`trainers.config_io` reads and writes it). Keys that belong to
the algorithm are declared beside it: `ddpo.lora`, `ddpo.samplers`, `ddpo.objectives`, `ddpo.kl`, `ddpo.advantages`,
`rewards.combine` and `trainers.prompts`. To add an algorithm, put its config in the type of `Config.objective` with
`one_of`.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Tag

from ddpo.advantages import AdvantageConfig
from ddpo.kl import AdaptiveKL, FixedKL
from ddpo.lora import FullConfig, LoraConfig
from ddpo.objectives.policy_gradient import PolicyGradientConfig
from ddpo.quantization import Quantization
from ddpo.samplers import SamplerConfig
from ddpo.validation import check
from rewards.combine import RewardTerm
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
        precision: Number format of the networks; latents, log-probabilities and advantages are always float32.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.3 times the time.
        offload: Keep the text encoder and the VAE on the CPU while they are not needed; an epoch's prompts are encoded
            in one go, and the text encoder is not needed for decoding.
        quantization: Number format of the pretrained denoiser's linear layers under a LoRA, by diffusers' quantisers:
            bitsandbytes (needs a GPU) or torchao; null for none.
        compile: Compile the denoiser by torch.compile: some minutes at the start, faster after. Both phases run the
            same compiled network, with rows padded to fixed counts.
        vae_slicing: Decode one image at a time: less memory.
        vae_tiling: Decode an image in overlapping tiles: less memory for large images, slightly other pixels.
        device: A torch device such as `cuda:1` or `cpu`; null takes this process's accelerator, else the CPU.
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
        samples_per_epoch: Images per epoch over all processes; a multiple of group_size x processes.
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


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Fixed prompts and seeds, measured before, during and after training.

    Attributes:
        every_epochs: Epochs between evaluations; 0 evaluates only at the start and the end.
        prompts: Evaluation prompts; null takes the training source.
        num_prompts: Prompts, the same in every evaluation.
        images_per_prompt: Images per prompt; at least 2 for diversity.
        seed: Seed of the evaluation noise.
        ode: Also evaluate noise-free (ODE) sampling.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every_epochs: int = 10
    prompts: PromptConfig | None = None
    num_prompts: int = 16
    images_per_prompt: int = 4
    seed: int = 1234
    ode: bool = True

    def __post_init__(self) -> None:
        for name in ("every_epochs", "seed"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("num_prompts", "images_per_prompt"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


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
        name: Folder name; null takes the time and the first reward.
        output_dir: Folder of all runs.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str | None = None
    output_dir: str = "runs"

    def __post_init__(self) -> None:
        plain = self.name is None or (bool(self.name.strip()) and "/" not in self.name and self.name not in (".", ".."))
        check(plain, "name", self.name, "a folder name without '/', or null")
        check(bool(self.output_dir.strip()), "output_dir", self.output_dir, "a folder")


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
        optimizer: AdamW and its learning rate.
        rewards: What is maximised: the weighted sum of these.
        heldout_rewards: Measured in evaluations, never optimised.
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
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rewards: tuple[RewardTerm, ...] = ()
    heldout_rewards: tuple[RewardTerm, ...] = ()
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
            names = [term.name for term in getattr(self, name)]
            check(len(set(names)) == len(names), name, names, "a list that names each reward once")
        self._check_noise()
        self._check_groups()
        full = isinstance(self.adapter, FullConfig) and self.model.quantization is not None
        cure = "null with adapter.kind: full (quantised weights cannot be trained; use adapter.kind: lora)"
        check(not full, "model.quantization", self.model.quantization, cure)

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
