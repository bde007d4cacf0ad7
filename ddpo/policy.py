"""A pretrained diffusers pipeline as a stepwise Gaussian policy.

    (k, x_k, condition) -> N(mean, std_k^2 I),    mean = a' x0_hat + direction * eps_hat

where (x0_hat, eps_hat) is what the denoiser predicts after classifier-free guidance and a', direction, std are the
schedule's (`ddpo.schedule`). B is the batch, `latent` the latent shape.
"""

import copy
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL.Image import Image
from torch import Tensor, nn

from ddpo import lora
from ddpo.decoding import Decoder
from ddpo.denoiser import DTYPES, Denoiser, Precision
from ddpo.encoding import Encoder
from ddpo.gaussian import Gaussian
from ddpo.guidance import GuidanceRule, unguided
from ddpo.loading import Source, load_pipeline
from ddpo.pipeline_call import PipelineCall, read_call
from ddpo.quantization import Quantization, is_quantized
from ddpo.reading import read_pipeline, recorded_steps
from ddpo.samplers import SamplerConfig, default_sampler, epoch_schedule, predicted, transition
from ddpo.schedule import PredictionType, Schedule, training_scheduler
from ddpo.step_selection import StepSelection
from ddpo.tracing import find_denoiser
from ddpo.trajectory import Condition


class Policy:
    """A stepwise Gaussian policy over a pipeline's latents.

    Latents and means are float32; the network runs in `precision`. Log-probabilities are of the transition that was
    sampled, in nats, summed over the latent dimensions, float64.

    Attributes:
        pipeline: The stock pipeline; its scheduler is the one that the schedule was read from.
        sampler: How it is sampled.
        adapter: What is trained; None for nothing.
        offload: Whether text encoders and VAE rest on the CPU.
        source: What the pipeline was loaded from; None for one that was made otherwise.
        schedule: Coefficients of the chain in the present epoch, float32 on the device.
        latent_shape: Shape of one sample's latents.
        name: The denoiser's component name, `unet` or `transformer`.
        call: How the pipeline is called.
        denoiser: The network and how it is called.
        rule: The pipeline's way to guide, found by comparing with its own output.
    """

    call: PipelineCall
    latent_shape: tuple[int, ...]
    rule: GuidanceRule
    schedule: Schedule
    _kind: PredictionType
    _noisy: Schedule
    _ode: Schedule
    _unguided: GuidanceRule

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        sampler: SamplerConfig,
        adapter: lora.AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        offload: bool = False,
        seed: int = 0,
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
            seed: Of the adapter's initialisation, and of the stochastic steps before `begin_epoch`.

        Raises:
            UntraceableError: The pipeline does not fit; the message says why.
            ValueError: The sampler or the scheduler does not fit the model, or the denoiser has an adapter already.
        """
        self.name = find_denoiser(pipeline)
        module: ModelMixin = getattr(pipeline, self.name)
        lora.check_has_none(module, self.name)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = training_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.sampler = sampler
        self.adapter = adapter
        self.offload = offload
        self.source: Source | None = None
        self.device = torch.device(device)
        call = read_call(pipeline, module, sampler)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(self.device).requires_grad_(False).eval()
                if component.dtype != DTYPES[precision] and not is_quantized(component):
                    component.to(DTYPES[precision])
        self.denoiser = Denoiser(module, precision=precision, device=self.device)
        self._read(call)
        self._decoder = Decoder(pipeline, module, self.call, device=self.device, offload=offload)
        self._encoder = self._make_encoder()
        self.begin_epoch(0, seed=seed)
        if is_quantized(module) and isinstance(adapter, lora.FullConfig):
            raise ValueError("quantised weights cannot be trained; use a LoraConfig, or load without quantization")
        self._reference = lora.frozen_copy(module) if isinstance(adapter, lora.FullConfig) else None
        if adapter is not None:
            lora.attach(module, adapter, seed=seed)
        self._decoder.rest()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        sampler: SamplerConfig | None = None,
        adapter: lora.AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        offload: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        quantization: Quantization | None = None,
        seed: int = 0,
    ) -> "Policy":
        """Loads a pipeline by `DiffusionPipeline.from_pretrained` and wraps it.

        Args:
            path: A folder, a Hugging Face hub id, or `shapes` for the small pipeline that ships with ddpo.
            sampler: How to sample; default 50 steps with guidance 5 of the sampler that fits the model, `ddim` with
                eta 1 or `flow_sde` with eta 0.7.
            adapter: What to train; default LoRA of rank 16 on the attention projections.
            precision: Of the network.
            device: Where to run; default this process's GPU, else the CPU.
            offload: Keep text encoders and VAE on the CPU when they are not in use.
            revision: Of the hub repository.
            variant: Of the weight files, such as `fp16`.
            quantization: Of the denoiser's linear layers (`ddpo.quantization`); default none.
            seed: Of the adapter's initialisation.

        Raises:
            FileNotFoundError: There is no such folder, and the hub has no such model or cannot be reached.
            UntraceableError: The pipeline does not fit; the message says why.
        """
        pipeline = load_pipeline(
            path, dtype=DTYPES[precision], revision=revision, variant=variant, quantization=quantization
        )
        policy = cls(
            pipeline,
            sampler=sampler or default_sampler(pipeline.scheduler),
            adapter=adapter or lora.LoraConfig(),
            precision=precision,
            device=device or default_device(),
            offload=offload,
            seed=seed,
        )
        policy.source = Source(path=str(path), revision=revision, variant=variant, quantization=quantization)
        return policy

    # ---- the distribution of a step ---------------------------------------------------------------------------------

    def __call__(self, k: int | Tensor, x: Tensor, condition: Condition, *, guided: bool = True) -> Gaussian:
        """The distribution of the next latents.

        Args:
            k: Step index, an int or (B,) int64: one call may mix steps.
            x: Latents, (B, *latent).
            condition: B rows.
            guided: Whether classifier-free guidance is applied; without it only the conditional branch runs.
        """
        rule = self.rule if guided else self._unguided
        negative, positive = self.denoiser.branches(x, self._time(k, x), condition, rule)
        output = rule.combine(negative, positive, self.sampler.guidance_scale)
        return transition(self.schedule, k, x, output, kind=self._kind)

    def predicted_x0(self, k: int | Tensor, x: Tensor, condition: Condition) -> Tensor:
        """The clean latents that the guided network predicts from x at step k, (B, *latent); one pass of the network.

        Args:
            k: Step index, an int or (B,) int64.
            x: Latents, (B, *latent).
            condition: B rows.
        """
        negative, positive = self.denoiser.branches(x, self._time(k, x), condition, self.rule)
        output = self.rule.combine(negative, positive, self.sampler.guidance_scale)
        return predicted(self.schedule, k, x, output, kind=self._kind).x0

    def both(self, k: int | Tensor, x: Tensor, condition: Condition) -> tuple[Gaussian, Gaussian]:
        """The guided and the unguided distribution from one pass of the network."""
        negative, positive = self.denoiser.branches(x, self._time(k, x), condition, self.rule)
        guided = self.rule.combine(negative, positive, self.sampler.guidance_scale)
        alone = self._unguided.combine(None, positive, 1.0)
        first, second = (transition(self.schedule, k, x, output, kind=self._kind) for output in (guided, alone))
        return first, second

    def _time(self, k: int | Tensor, x: Tensor) -> Tensor:
        return self.schedule.model_time[k].expand(x.shape[0])

    # ---- the trained network ----------------------------------------------------------------------------------------

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The pretrained model, without gradients, for the time of a `with` block."""
        with torch.no_grad(), self._pretrained():
            yield

    @contextmanager
    def _pretrained(self) -> Iterator[None]:
        if self._reference is None:
            with lora.adapter_off(self.denoiser.module):
                yield
            return
        network, self.denoiser.network = self.denoiser.network, self._reference
        try:
            yield
        finally:
            self.denoiser.network = network

    def begin_epoch(self, epoch: int, *, seed: int) -> None:
        """Takes the schedule of an epoch: which steps are stochastic may change (`ddpo.step_selection`).

        Args:
            epoch: Finished epochs.
            seed: Of the run.
        """
        self.schedule = epoch_schedule(self._noisy, self._ode, self.sampler.stochastic_steps, epoch=epoch, seed=seed)

    def with_sampler(self, sampler: SamplerConfig, *, seed: int = 0) -> "Policy":
        """The same weights and network, sampled otherwise, with the stochastic steps of a first epoch.

        The two policies share the pipeline and all weights; what changes the weights of one changes the other's.

        Args:
            sampler: How to sample.
            seed: Of the stochastic steps.

        Raises:
            ValueError: The sampler does not fit the model.
        """
        other = copy.copy(self)
        other.sampler = sampler
        everything = StepSelection()  # which steps are stochastic changes nothing of what is read below
        if replace(sampler, stochastic_steps=everything) != replace(self.sampler, stochastic_steps=everything):
            module = self.denoiser.module
            call = read_call(self.pipeline, module, sampler)
            other.denoiser = Denoiser(module, precision=self.denoiser.precision, device=self.device)
            with self._decoder.auxiliaries():
                other._read(call)
            other._decoder = self._decoder.with_call(other.call)
            if other.rule != self.rule or replace(other.call, num_steps=self.call.num_steps) != self.call:
                other._encoder = other._make_encoder()  # else the encodings are the same, and are shared
            other.denoiser.batch_sizes = self.denoiser.batch_sizes
            other.denoiser.network = self.denoiser.network  # compared as the plain module, run as it is wrapped
        other.begin_epoch(0, seed=seed)
        return other

    @contextmanager
    def noise_free(self) -> Iterator[None]:
        """Samples by the ODE of the same schedule, for the time of a `with` block."""
        schedule, self.schedule = self.schedule, self._ode
        try:
            yield
        finally:
            self.schedule = schedule

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: value for name, value in self.denoiser.module.named_parameters() if value.requires_grad}

    def gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass: less memory, about 1.3 times the time."""
        self.denoiser.module.enable_gradient_checkpointing()

    def networks(self) -> list[nn.Module]:
        """The trained network and, where the pretrained weights are a second copy, that one."""
        return [self.denoiser.module] if self._reference is None else [self.denoiser.module, self._reference]

    def compile(self, batch_sizes: Collection[int], *, backend: str = "inductor") -> None:
        """Compiles the denoiser; sampling and training then run the same compiled network.

        Args:
            batch_sizes: Samples per call; other numbers are padded to the next of these, or cut into the largest, so
                that nothing is compiled for them.
            backend: Of `torch.compile`.
        """

        def compiled(network: nn.Module) -> nn.Module:
            return cast(nn.Module, torch.compile(network, dynamic=False, backend=backend))

        self.denoiser.network = compiled(self.denoiser.module)
        if self._reference is not None:
            self._reference = compiled(self._reference)
        self.denoiser.batch_sizes = tuple(sorted(set(batch_sizes)))

    # ---- prompts, noise and images ----------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None) -> Condition:
        """The condition of B prompts; each text, with its image, is encoded alone and remembered for some time.

        Args:
            prompts: B texts.
            metadata: B dictionaries for the rewards; default empty ones. For a pipeline that edits, `image` is each
                prompt's input image, a file or a PIL image; rewards find there what the pipeline was given, an image
                of the size of the pictures, and the file under `image_path`.

        Raises:
            ValueError: There is no prompt, or one text instead of a sequence of them; `metadata` has another length;
                an input image is missing or cannot be read, or the pipeline takes none.
        """
        return self._encoder(prompts, metadata)

    def check_inputs(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Refuses prompts without an image where the pipeline edits one, and prompts with one where it does not.

        Raises:
            ValueError: Which prompt, and what to do.
        """
        self._encoder.check(prompts, metadata)

    def noise(self, seeds: Tensor) -> Tensor:
        """Standard normal noise of every sample's prior and steps, (B, T+1, *latent) float32 on the device.

        Each row comes from a generator of its own seed on the CPU, so that a sample depends on its seed alone.
        """
        noise = torch.empty(len(seeds), self.schedule.num_steps + 1, *self.latent_shape)
        generator = torch.Generator()
        for prior, steps, seed in zip(noise[:, 0].unbind(), noise[:, 1:].unbind(), seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            prior.normal_(generator=generator)  # drawn first, so that it does not depend on the number of steps
            steps.normal_(generator=generator)
        return noise.to(self.device)

    def decode(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Images of final latents by the pipeline's own tail.

        Args:
            latents: (B, *latent).
            with_gradient: Whether to record the graph from images to latents.

        Returns:
            (B, 3, H, W) float32 in [0, 1]; of a video its middle frame, F // 2 of F.
        """
        return self._decoder(latents, with_gradient=with_gradient)

    def save_decoding_memory(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Decodes one image at a time, or each in overlapping tiles; `ValueError` where the VAE cannot."""
        self._decoder.save_memory(slicing=slicing, tiling=tiling)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """All frames of final latents, (B, F, 3, H, W) float32 in [0, 1]; F is 1 for images."""
        frames = self._decoder.frames(latents)
        return frames if frames.ndim == 5 else frames[:, None]

    def save(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes weights in diffusers' format: see `ddpo.lora.save_weights`.

        Args:
            folder: Where to write; made if missing.
            weights: Values for all of `trainable()`; None takes the present ones.

        Raises:
            ValueError: Nothing is trained.
        """
        trained = weights or self.trainable()
        if not trained:
            raise ValueError("the policy trains nothing to save; give Policy an adapter: LoraConfig() or FullConfig()")
        lora.save_weights(self.pipeline, self.name, self.denoiser.module, folder, trained)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The weights that `save` wrote, for all of `trainable()`: see `ddpo.lora.read_weights`."""
        return lora.read_weights(self.pipeline, self.name, self.denoiser.module, folder, self.trainable())

    # ---- what the pipeline does -------------------------------------------------------------------------------------

    def _read(self, call: PipelineCall) -> None:
        """Finds the schedule, the arguments that belong to a sample, and the guidance rule."""
        found = read_pipeline(self.pipeline, self.denoiser, call, self.sampler)
        self.call, self.latent_shape, self._kind = found.call, found.latent_shape, found.kind
        self._noisy, self._ode = found.noisy, found.ode
        self.rule, self._unguided = found.rule, unguided(found.rule)

    def _encode(self, prompts: Sequence[str], images: Sequence[Image] | None) -> Iterator[Condition]:
        """The condition of each prompt, with its image where there are images, from a call of its own."""
        with self._decoder.auxiliaries():
            for row, prompt in enumerate(prompts):
                own = None if images is None else [images[row]]
                (step,) = recorded_steps(self.pipeline, self.denoiser.module, self.call, [prompt], own, num_steps=1)
                yield self.denoiser.condition([prompt], step, self.rule)

    def _make_encoder(self) -> Encoder:
        name = type(self.pipeline).__name__
        return Encoder(self._encode, name, self.call, store=self._decoder.stored, device=self.device)


def default_device() -> torch.device:
    """This process's GPU (the launcher's LOCAL_RANK), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
