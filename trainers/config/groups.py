"""The groups of a run's keys, as frozen dataclasses, each checked when it is built; `trainers.config` joins them.

Keys that belong to the algorithm are declared beside it: `ddpo.weights.adapter`, `ddpo.sampling.samplers`,
`ddpo.objectives`, `ddpo.credit.kl`, `ddpo.credit.advantages`, `rewards.combine.weighted_sum` and `trainers.prompts`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ddpo.pipeline.quantization import Quantization
from ddpo.seeds import GroupNoise
from ddpo.validation import check
from trainers.config.evaluation_sampler import EvaluationSampler
from trainers.config.optimizer import OptimizerConfig as OptimizerConfig
from trainers.prompts import PromptConfig

_LONGEST_NAME = 200
"""Of a run, in bytes: file systems take 255, and files beside the folder have its name and more."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained pipeline and where it runs.

    Attributes:
        path: Folder or Hugging Face id of a diffusers text-to-image pipeline, or a single `.safetensors` file of one;
            `shapes` is the one shipped here.
        revision: Branch, tag or commit on the hub; null takes the main branch.
        variant: Weight file variant, e.g. `fp16`; null takes the plain files.
        config: Of a single file: folder or Hugging Face id of a pipeline of the same kind, for settings, tokenizers and
            networks that the file lacks; null takes the one that diffusers knows such weights by.
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
    config: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    offload: bool = False
    quantization: Quantization | None = None
    compile: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check(bool(self.path.strip()), "path", self.path, "a folder, a file or a Hugging Face id")

    @property
    def described(self) -> str:
        """Where the pipeline's configuration files are, as far as that is known before it is loaded."""
        return self.config or self.path


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is sampled per epoch (over all processes), and what fits on one device.

    Attributes:
        samples_per_epoch: Images per epoch over all processes; a multiple of group_size, and at least one a process.
            With a reward that compares the images of a group, a multiple of group_size times the number of processes.
        group_size: Images per prompt in an epoch.
        group_noise: How the noises of a prompt's images belong together: `independent`; `antithetic`, pairs of opposite
            noises, which are left out of each other's baseline; `shared`, the same initial noise, so that images differ
            by the noise of their steps alone. Neither changes what the gradient is on average, both its variance. With
            one stochastic step, `shared` images are branches of one trajectory.
        sample_batch_size: Per device: images per denoiser call while sampling (two rows each with guidance).
        train_batch_size: Per device: transitions (sample, step) per forward and backward pass. Bounds memory; the size
            of an update does not depend on it.
        trajectories: Where an epoch's latents and prompt embeddings wait for training: on the `device`, or in pinned
            `cpu` memory, from which each micro-batch is fetched. The numbers are the same.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    samples_per_epoch: int = 256
    group_size: int = 8
    group_noise: GroupNoise = "independent"
    sample_batch_size: int = 8
    train_batch_size: int = 8
    trajectories: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        for name in ("samples_per_epoch", "group_size", "sample_batch_size", "train_batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        odd = self.group_noise == "antithetic" and self.group_size % 2 == 1
        check(not odd, "group_size", self.group_size, "even with group_noise: antithetic (its images are pairs)")
        alone = self.group_noise == "shared" and self.group_size < 2
        check(not alone, "group_size", self.group_size, "at least 2 with group_noise: shared")


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
        overoptimisation_false_alarms: Share of runs without over-optimisation that may be warned of it, over all their
            evaluations: a warning needs a held-out reward so far below its best evaluation, and the training reward so
            far above, that chance does it in no larger share; 0 never warns.
        overoptimisation_threshold: Standard errors that both must have changed by in place of that, in every
            evaluation alike, so that false alarms add up over a run; 0 never warns. null for the share above.
        stop_on_overoptimisation: Stop after `overoptimisation_patience` such evaluations in a row and export the
            weights of the best evaluation instead of the last; needs held-out rewards.
        overoptimisation_patience: Evaluations in a row before stopping.
        spread: Also measure how different the pictures are, within a prompt and across prompts, by the features of
            `colour`, `imagenet` or your own `file.py:name`: Vendi scores, mean and nearest distances; null for not.
        forgetting: Noised states of each image for the denoising loss, under the weights that are evaluated, of what
            the pretrained model makes of the same prompts; 0 for not.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    every_epochs: int = 10
    prompts: PromptConfig | None = None
    num_prompts: int = 16
    images_per_prompt: int = 4
    seed: int = 1234
    ode: bool = True
    sampler: EvaluationSampler | None = None
    overoptimisation_false_alarms: float = 0.05
    overoptimisation_threshold: float | None = None
    stop_on_overoptimisation: bool = False
    overoptimisation_patience: int = 2
    spread: str | None = None
    forgetting: int = 0

    def __post_init__(self) -> None:
        check(self.every_epochs >= 0, "every_epochs", self.every_epochs, "at least 0")
        check(0 <= self.seed < 2**63, "seed", self.seed, "at least 0 and below 2^63")
        share, threshold = self.overoptimisation_false_alarms, self.overoptimisation_threshold
        check(0 <= share < 1, "overoptimisation_false_alarms", share, "at least 0 and below 1")
        check(threshold is None or threshold >= 0, "overoptimisation_threshold", threshold, "at least 0, or null")
        for name in ("num_prompts", "images_per_prompt", "overoptimisation_patience"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.forgetting >= 0, "forgetting", self.forgetting, "at least 0")
        known = self.spread is None or self.spread in ("colour", "imagenet") or ":" in self.spread
        check(known, "spread", self.spread, "colour, imagenet, your own as file.py:name, or null")
        never = self.stop_on_overoptimisation and self.every_epochs == 0
        cure = "at least 1 with stop_on_overoptimisation (it compares the evaluations of a run)"
        check(not never, "every_epochs", self.every_epochs, cure)
        name = "overoptimisation_false_alarms" if threshold is None else "overoptimisation_threshold"
        cure = "positive with stop_on_overoptimisation (0 never warns, so it would never stop)"
        check(self.warns or not self.stop_on_overoptimisation, name, getattr(self, name), cure)

    @property
    def warns(self) -> bool:
        """Whether over-optimisation is looked for."""
        rule = self.overoptimisation_threshold
        return (self.overoptimisation_false_alarms if rule is None else rule) > 0


@dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    """The reward of the predicted clean image as a potential: lowers variance, changes no optimum (`credit.potential`).

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
        short = self.name is None or len(self.name.encode(errors="replace")) <= _LONGEST_NAME
        check(short, "name", self.name, f"at most {_LONGEST_NAME} bytes long")
        check(bool(self.output_dir.strip()), "output_dir", self.output_dir, "a folder")

    @property
    def folder(self) -> Path:
        """`output_dir`, with `~` for the home folder."""
        return Path(self.output_dir).expanduser()
