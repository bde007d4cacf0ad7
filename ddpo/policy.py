"""A pretrained diffusers pipeline as a stepwise Gaussian policy.

    (k, x_k, condition) -> N(mean, std_k^2 I),    mean = a' x0_hat + direction * eps_hat

where (x0_hat, eps_hat) is what the denoiser predicts after classifier-free guidance and a', direction, std are the
schedule's (`ddpo.sampling.schedule`). A policy is a frozen view of a model (`ddpo.model`): what is sampled otherwise,
follows another chain or leaves guidance out is another view of the same weights. B is the batch, `latent` the latent
shape.
"""

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ddpo.loading import Source, load_pipeline
from ddpo.model import Model, Wiring
from ddpo.pipeline.call import PipelineCall
from ddpo.pipeline.denoiser import DTYPES, Denoiser, Precision
from ddpo.pipeline.guidance import GuidanceRule, unguided
from ddpo.pipeline.quantization import Quantization
from ddpo.pipeline.scheduler import default_sampler
from ddpo.sampling.gaussian import Gaussian
from ddpo.sampling.prediction import Prediction, network_output
from ddpo.sampling.samplers import SamplerConfig, epoch_schedule, predicted, step
from ddpo.sampling.schedule import PredictionType, Schedule, coefficient
from ddpo.sampling.step_selection import StepSelection
from ddpo.seeds import fill_noise
from ddpo.trajectory import Condition
from ddpo.validation import UserError
from ddpo.weights.adapter import AdapterConfig, LoraConfig
from ddpo.weights.beginning import begin_at, begins_with
from ddpo.weights.export import read_weights, save_weights
from ddpo.weights.trained_network import TrainedNetwork


class Outputs(NamedTuple):
    """What one pass of the network returns of its branches, (B, ...) each; negative is None where it did not run."""

    negative: Tensor | None
    positive: Tensor


@dataclass(frozen=True, kw_only=True)
class View:
    """How a policy looks at its model.

    Attributes:
        sampler: How it is sampled.
        wiring: The pipeline as understood for this sampler.
        schedule: Coefficients of the chain.
        rule: How the two branches are combined.
    """

    sampler: SamplerConfig
    wiring: Wiring
    schedule: Schedule
    rule: GuidanceRule


class Policy:
    """A stepwise Gaussian policy over a pipeline's latents.

    Latents and means are float32; the network runs in `precision`. Log-probabilities are of the transition that was
    sampled, in nats, summed over the latent dimensions, float64. Nothing about a policy changes but the weights, which
    all views of a model share.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        sampler: SamplerConfig,
        adapter: AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        offload: bool = False,
        seed: int = 0,
        source: Source | None = None,
    ) -> None:
        """Traces a pipeline and attaches what is to be trained.

        Args:
            pipeline: Any pipeline from prompts, with an input image each if it edits, or from nothing, with one
                denoiser; taken over, its scheduler is replaced.
            sampler: How to sample.
            adapter: What to train; None trains nothing.
            precision: Of the network. LoRA weights stay float32.
            device: Where to run.
            offload: Keep text encoders and VAE on the CPU when they are not in use.
            seed: Of the adapter's initialisation, and of the stochastic steps of the first epoch.
            source: What the pipeline was loaded from; None for one that was made otherwise.

        Raises:
            UntraceableError: The pipeline does not fit; the message says why.
            UserError: The sampler or the scheduler does not fit the model, or the denoiser has an adapter already.
        """
        beginning = begins_with(pipeline, adapter)
        self._model = Model(pipeline, precision=precision, device=device, offload=offload, source=source)
        self._view = _first_epoch(sampler, self._model.wire(sampler), seed=seed)
        self._trained = TrainedNetwork(self._model.network, adapter, used=self._view.wiring.reading.used, seed=seed)
        if isinstance(adapter, LoraConfig):
            begin_at(self._model.network.module, adapter, beginning)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        sampler: SamplerConfig | None = None,
        adapter: AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        offload: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        quantization: Quantization | None = None,
        seed: int = 0,
    ) -> Self:
        """Loads a pipeline by `DiffusionPipeline.from_pretrained` and wraps it.

        Args:
            path: A folder, a single `.safetensors` file, a Hugging Face hub id, or `shapes` for the small pipeline that
                ships with ddpo.
            sampler: How to sample; default 50 steps with guidance 5 of the sampler that fits the model, `ddim` with
                eta 1 or `flow_sde` with eta 0.7.
            adapter: What to train; default LoRA of rank 16 on the attention projections.
            precision: Of the network.
            device: Where to run; default this process's GPU, else the CPU.
            offload: Keep text encoders and VAE on the CPU when they are not in use.
            revision: Of the hub repository.
            variant: Of the weight files, such as `fp16`.
            config: Of a single file: folder or hub id of a pipeline of the same kind (`ddpo.loading`).
            quantization: Of the denoiser's linear layers (`ddpo.pipeline.quantization`); default none.
            seed: Of the adapter's initialisation.

        Raises:
            FieldError: There is no such folder, and the hub has no such model or cannot be reached.
            UntraceableError: The pipeline does not fit; the message says why.
        """
        source = Source(path=str(path), revision=revision, variant=variant, config=config, quantization=quantization)
        pipeline = load_pipeline(dtype=DTYPES[precision], **asdict(source))
        return cls(
            pipeline,
            sampler=sampler or default_sampler(pipeline.scheduler),
            adapter=adapter or LoraConfig(),
            precision=precision,
            device=device or default_device(),
            offload=offload,
            seed=seed,
            source=source,
        )

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline; its scheduler is the one that the schedule was read from."""
        return self._model.pipeline

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """All networks of the pipeline, by the names of its components."""
        components = self.pipeline.components.items()
        return {name: component for name, component in components if isinstance(component, nn.Module)}

    @property
    def source(self) -> Source | None:
        """What the pipeline was loaded from; None for one that was made otherwise."""
        return self._model.source

    @property
    def name(self) -> str:
        """The denoiser's component name, `unet` or `transformer`."""
        return self._model.name

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    @property
    def offload(self) -> bool:
        """Whether text encoders and VAE rest on the CPU."""
        return self._model.offload.enabled

    @property
    def adapter(self) -> AdapterConfig | None:
        """What is trained; None for nothing."""
        return self._trained.adapter

    @property
    def sampler(self) -> SamplerConfig:
        """How it is sampled."""
        return self._view.sampler

    @property
    def schedule(self) -> Schedule:
        """Coefficients of its chain, float32 on the device."""
        return self._view.schedule

    @property
    def rule(self) -> GuidanceRule:
        """How it guides: the pipeline's way, found by comparing with its own output, or not at all."""
        return self._view.rule

    @property
    def kind(self) -> PredictionType:
        """What its network predicts."""
        return self._view.wiring.reading.kind

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return self._view.wiring.reading.latent_shape

    @property
    def call(self) -> PipelineCall:
        """How the pipeline is called."""
        return self._view.wiring.reading.call

    @property
    def denoiser(self) -> Denoiser:
        """The network and how it is called."""
        return self._view.wiring.reading.denoiser

    # ---- other views of the same weights ----------------------------------------------------------------------------

    def at(self, schedule: Schedule) -> Self:
        """The policy on another chain of its sampler, such as the one that some data were sampled on.

        Args:
            schedule: From `schedule_of`, or of a `Trajectory`.

        Raises:
            UserError: It is no schedule.
        """
        if not isinstance(schedule, Schedule):
            raise UserError(f"at() takes a Schedule, as a trajectory's .schedule, got a {type(schedule).__name__}")
        return self._seen(schedule=schedule)

    def schedule_of(self, epoch: int, *, seed: int) -> Schedule:
        """The chain of an epoch: which steps are stochastic may change (`ddpo.sampling.step_selection`).

        Args:
            epoch: Finished epochs.
            seed: Of the run.
        """
        return _schedule(self.sampler, self._view.wiring, epoch=epoch, seed=seed)

    @property
    def noise_free(self) -> Self:
        """The policy on the ODE of the same chain."""
        return self._seen(schedule=self._view.wiring.reading.ode)

    @property
    def full_noise(self) -> Self:
        """The policy with noise in all steps that have any under its sampler, whichever were chosen."""
        return self._seen(schedule=self._view.wiring.reading.noisy)

    @property
    def conditional(self) -> Self:
        """The policy without guidance: its distribution is that of the conditional branch, which alone runs."""
        return self._seen(rule=unguided(self.rule))

    def with_sampler(self, sampler: SamplerConfig, *, seed: int = 0) -> Self:
        """The policy sampled otherwise, with the stochastic steps of a first epoch.

        Args:
            sampler: How to sample.
            seed: Of the stochastic steps.

        Raises:
            UserError: The sampler does not fit the model.
        """
        wiring, everything = self._view.wiring, StepSelection()
        # Which steps are stochastic changes nothing of what is read.
        if replace(sampler, stochastic_steps=everything) != replace(self.sampler, stochastic_steps=everything):
            wiring = self._model.wire(sampler, like=wiring)
        return self._of(_first_epoch(sampler, wiring, seed=seed))

    def _seen(self, *, schedule: Schedule | None = None, rule: GuidanceRule | None = None) -> Self:
        return self._of(replace(self._view, schedule=schedule or self.schedule, rule=rule or self.rule))

    def _of(self, view: View) -> Self:
        other = copy.copy(self)
        other._view = view
        return other

    # ---- the distribution of a step ---------------------------------------------------------------------------------

    def __call__(self, k: int | Tensor, x: Tensor, condition: Condition) -> Gaussian:
        """The distribution of the next latents.

        Args:
            k: Step index, an int or (B,) int64: one call may mix steps.
            x: Latents, (B, *latent).
            condition: B rows.
        """
        return self.distribution(k, self.predict(k, x, condition))

    def predict(self, k: int | Tensor, x: Tensor, condition: Condition) -> Prediction:
        """The clean latents and the noise that the network sees in any latents, (B, *latent) each; one pass of it.

        Args:
            k: Step index, an int or (B,) int64.
            x: Latents, (B, *latent), such as `schedule.noised(k, clean, eps)`.
            condition: B rows.
        """
        return self.prediction(k, x, self.outputs(k, x, condition))

    def outputs(self, k: int | Tensor, x: Tensor, condition: Condition) -> Outputs:
        """What the network returns, before guidance; arguments as for `predict`.

        From what the guided policy's pass returns, its `conditional` view makes a prediction without another pass.
        """
        time = self.schedule.model_time[k].expand(x.shape[0])
        return Outputs(*self.denoiser.branches(x, time, condition, self.rule))

    def prediction(self, k: int | Tensor, x: Tensor, outputs: Outputs) -> Prediction:
        """What the network's outputs on the latents x at step k stand for, after guidance."""
        output = self.rule.combine(outputs.negative, outputs.positive, self.sampler.guidance_scale)
        return predicted(self.schedule, k, x, output, kind=self.kind)

    def distribution(self, k: int | Tensor, prediction: Prediction) -> Gaussian:
        """The distribution of the latents after step k, of what was predicted before it."""
        return step(self.schedule, k, prediction)

    def network_output(self, k: int | Tensor, prediction: Prediction) -> Tensor:
        """What the network would have returned for a prediction at step k, in its own parametrisation, (B, *latent)."""
        a, s = (coefficient(level, k, prediction.x0) for level in (self.schedule.a, self.schedule.s))
        return network_output(prediction, a, s, kind=self.kind)

    # ---- the trained network ----------------------------------------------------------------------------------------

    def reference(self, *, grad: bool = False) -> AbstractContextManager[None]:
        """The pretrained model, for the time of a `with` block.

        Args:
            grad: Whether derivatives by the latents are recorded, with all activations kept; there are none by any
                weights.
        """
        return self._trained.reference(grad=grad)

    def using(self, weights: Mapping[str, Tensor], *, grad: bool = False) -> AbstractContextManager[None]:
        """The model with named weights in place of the trained ones, for the time of a `with` block.

        An old or an average policy, or another LoRA of the same shape, runs without a copy of the network. A compiled
        network is run with them as well. One that is split over processes (FSDP) takes weights that are split in the
        same way, and no `grad`; every process then enters and leaves the block together.

        Args:
            weights: Values for all of `trainable()`, by name.
            grad: Whether derivatives by the latents are recorded, with all activations kept; there are none by any
                weights.

        Raises:
            ValueError: These are not the trained weights' names and shapes, the network is split and `grad` is true, or
                a block of `reference` is open.
        """
        return self._trained.using(weights, grad=grad)

    def moving(self, direction: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """The model whose outputs carry their derivative along a direction in the trained weights, in a `with` block.

        Inside a `torch.autograd.forward_ad.dual_level`; `unpack_dual` of what is computed gives the derivative. The
        graph by the trained weights is recorded as ever.

        Args:
            direction: Values for all of `trainable()`, by name.

        Raises:
            UserError: These are not the trained weights' names and shapes.
        """
        return self._trained.moving(direction)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return self._trained.trainable()

    def gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass: less memory, about 1.3 times the time."""
        self._model.network.module.enable_gradient_checkpointing()

    def networks(self) -> list[nn.Module]:
        """The trained network and, where the pretrained weights are a second copy, that one."""
        return self._trained.modules()

    def compile(self, batch_sizes: Collection[int], *, backend: str = "inductor") -> None:
        """Compiles the denoiser; sampling and training, and all views, then run the same compiled network.

        Args:
            batch_sizes: Samples per call; other numbers are padded to the next of these, or cut into the largest, so
                that nothing is compiled for them.
            backend: Of `torch.compile`.
        """
        self._trained.compile(batch_sizes, backend=backend)

    # ---- prompts, noise and images ----------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None) -> Condition:
        """The condition of B prompts; each text, with its image, is encoded alone and remembered for some time.

        Args:
            prompts: B texts.
            metadata: B dictionaries; default empty ones. For a pipeline that edits, `image` is each prompt's input
                image, a file or a PIL image.

        Raises:
            UserError: There is no prompt, or one text instead of a sequence of them; `metadata` has another length;
                an input image is missing or cannot be read, or the pipeline takes none.
        """
        return self._view.wiring.encoder(prompts, metadata)

    def prefetch(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None) -> None:
        """Encodes what `encode` will be asked for, where text encoders rest on the CPU: they then move there once.

        Arguments and errors are those of `encode`. Elsewhere it does nothing.
        """
        if self.offload:
            self.encode(prompts, metadata)

    def rewards_metadata(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None
    ) -> tuple[Mapping[str, object], ...]:
        """The metadata of B prompts as rewards see it; arguments and errors as for `encode`.

        For a pipeline that edits, `image` is what the pipeline was given, an image of the size of the pictures, and
        `image_path` the file that it came from.
        """
        return self._view.wiring.encoder.rewards_metadata(prompts, metadata)

    def check_inputs(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Refuses prompts without an image where the pipeline edits one, and prompts with one where it does not.

        Raises:
            UserError: Which prompt, and what to do.
        """
        self._view.wiring.encoder.check(prompts, metadata)

    def noise(self, seeds: Tensor) -> Tensor:
        """Standard normal noise of every sample's prior and steps, (B, T+1, *latent) float32 on the device.

        Each row comes from the stream of its own seed on the CPU, so that a sample depends on its seed alone; in the
        order of the steps, so that the prior does not depend on their number. That of `~seed` is the negated one.
        """
        noise = torch.empty(len(seeds), self.schedule.num_steps + 1, *self.latent_shape)
        fill_noise(noise, seeds)
        return noise.to(self.device)

    def prior(self, seeds: Tensor) -> Tensor:
        """The initial states of these seeds, `noise(seeds)[:, 0]`, (B, *latent) float32 on the device."""
        states = torch.empty(len(seeds), *self.latent_shape)
        fill_noise(states, seeds)
        return states.to(self.device)

    def decode(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Images of final latents by the pipeline's own tail.

        Args:
            latents: (B, *latent).
            with_gradient: Whether to record the graph from images to latents.

        Returns:
            (B, 3, H, W) float32 in [0, 1]; of a video its middle frame, F // 2 of F.
        """
        return self._view.wiring.decoder(latents, with_gradient=with_gradient)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """All frames of final latents, (B, F, 3, H, W) float32 in [0, 1]; F is 1 for images."""
        frames = self._view.wiring.decoder.frames(latents)
        return frames if frames.ndim == 5 else frames[:, None]

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents of images, as the sampler would end at them, by the pipeline's own VAE; without a graph.

        Args:
            images: (B, 3, H, W) in [0, 1], of the size of the policy's pictures.

        Returns:
            (B, *latent) float32 on the device: the mean of the VAE's posterior, scaled, shifted and packed; of a
            pipeline without a VAE the images in [-1, 1].

        Raises:
            UntraceableError: How images become latents cannot be told of this pipeline; the message says why.
            ValueError: The images have another size, type or range, or the pipeline makes videos.
        """
        return self._view.wiring.image_encoder(images)

    def save_decoding_memory(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Decodes one image at a time, or each in overlapping tiles; `ValueError` where the VAE cannot."""
        self._view.wiring.decoder.save_memory(slicing=slicing, tiling=tiling)

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes weights in diffusers' format: see `ddpo.weights.export.save_weights`.

        Args:
            folder: Where to write; made if missing.
            weights: Values for all of `trainable()`; None takes the present ones.

        Raises:
            UserError: Nothing is trained.
        """
        trained = weights or self.trainable()
        if not trained or self.adapter is None:
            raise UserError("the policy trains nothing to save; give Policy an adapter: LoraConfig() or FullConfig()")
        save_weights(self.pipeline, self.name, self.denoiser.module, folder, trained, adapter=self.adapter)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The weights that `save` wrote, for all of `trainable()`: see `ddpo.weights.export.read_weights`."""
        assert self.adapter is not None, "something is trained"
        return read_weights(self.pipeline, self.name, folder, self.trainable(), adapter=self.adapter)


def default_device() -> torch.device:
    """This process's GPU (the launcher's LOCAL_RANK), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _first_epoch(sampler: SamplerConfig, wiring: Wiring, *, seed: int) -> View:
    """The guided view with the stochastic steps of a first epoch."""
    schedule = _schedule(sampler, wiring, epoch=0, seed=seed)
    return View(sampler=sampler, wiring=wiring, schedule=schedule, rule=wiring.reading.rule)


def _schedule(sampler: SamplerConfig, wiring: Wiring, *, epoch: int, seed: int) -> Schedule:
    reading = wiring.reading
    return epoch_schedule(reading.noisy, reading.ode, sampler.stochastic_steps, epoch=epoch, seed=seed)
